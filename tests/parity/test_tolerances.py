"""Every constant of the verdict and the diagnosis: documented, and measured again in a form that costs little.

The full form is `python -m benchmarks.margins`; what it last measured is held against docs/tolerances.md here, and one
part of it runs again, on another seed, among the slow tests.
"""

import ast
import importlib
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import courts, gates, margins, tables
from convert import Checkpoint
from parity import backward, tokens, trace
from parity.diagnosis import cache_causes, diagnose, fitted, slope, weight_causes
from parity.drawn import DEFAULT, draw
from parity.inputs import suite
from parity.judging import Judge
from parity.metrics import UNIT_ROUNDOFF, margin
from parity.oracle.model import Oracle
from parity.recordings.detail import ALL
from parity.router import EXCUSED_ERRORS, compare_routing
from parity.selftest.faults import FAULTS
from parity.selftest.trials import NAMED_SHARE
from parity.trace import Array, Batch, Trace
from parity.verdict import MARGIN_LIMIT, UNEQUAL_LIMIT

DECIDE = (
    "backward",
    "diagnosis.cache_causes",
    "diagnosis.diagnose",
    "diagnosis.fit",
    "diagnosis.fitted",
    "diagnosis.slope",
    "diagnosis.weight_causes",
    "judging",
    "metrics",
    "router",
    "selftest.trials",
    "tokens",
    "trace",
    "verdict",
)
"""The modules whose constants decide something."""
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROWS = [margins._row(text) for text in tables.load("margins")]


def _figures(name: str) -> list[str]:
    """List the constants that a module defines and that are numbers, or consist of some."""
    module = importlib.import_module(f"parity.{name}")
    assert module.__file__ is not None
    found = []
    for node in ast.parse(Path(module.__file__).read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper():
                value = getattr(module, target.id)
                parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
                if parts and all(type(part) in (int, float) for part in parts):
                    found.append(target.id)
    return found


def test_every_constant_is_on_the_page_with_its_value() -> None:
    rows = [line for line in tables.TOLERANCES.read_text().splitlines() if line.startswith("| `")]
    for module in DECIDE:
        for name in _figures(module):
            shown_as = f"{module.rpartition('.')[2]}.{name}"
            row = next((line for line in rows if line.startswith(f"| `{shown_as}` |")), None)
            assert row is not None, f"{shown_as} is not in docs/tolerances.md"
            value = getattr(importlib.import_module(f"parity.{module}"), name)
            shown = value if isinstance(value, dict) else {"": value}
            for part in shown.values():
                assert _written(part) in row.split("|")[2], f"{shown_as} is {part}, the page has {row}"


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_written, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def test_a_constant_that_is_not_documented_is_noticed() -> None:
    assert _figures("router") == ["EXCUSED_ERRORS"]
    assert {"MARGIN_LIMIT", "UNEQUAL_LIMIT"} == set(_figures("verdict"))


def test_the_tables_are_those_of_the_last_measurement() -> None:
    assert tables.between(tables.TOLERANCES, "margins") == margins.render(ROWS)
    assert tables.between(tables.TOLERANCES, "gates") == gates.render(tables.load("gates"))
    assert tables.between(tables.TOLERANCES, "courts") == courts.render(tables.load("courts"))


def test_every_court_was_held_and_passed() -> None:
    rows = tables.load("courts")
    held = [(row["court"], int(row["seed"]), row["dtype"]) for row in rows]
    assert held == list(product(courts.COURTS, courts.SEEDS, courts.DTYPES))
    for row in rows:
        planted, found, placed, named, _, accused = (int(row[kind]) for kind in courts.COUNTS)
        assert planted == found == placed, row
        assert named >= NAMED_SHARE * planted, row
        assert accused == 0, row


def test_nothing_correct_was_accused_and_every_fault_was_found() -> None:
    assert {row.kind for row in ROWS} == {"control", "fault"}
    assert [row for row in ROWS if row.kind == "control" and row.verdict != "pass"] == []
    assert [row for row in ROWS if row.kind == "fault" and row.verdict == "pass"] == []


def test_limits_lie_between_what_was_measured() -> None:
    for name, dtype, controls, faults in margins._parts(ROWS):
        worst = max(row.margin for row in controls)
        weakest = min((row.margin for row in margins._alone(faults, "margin")), default=np.inf)
        assert worst < MARGIN_LIMIT[dtype] < weakest, name
        alone = [row.unequal for row in margins._alone(faults, "rounding")] if dtype == "bfloat16" else []
        assert max(row.unequal for row in controls) < UNEQUAL_LIMIT < min(alone, default=np.inf), name
        assert max(row.flip for row in controls) < EXCUSED_ERRORS, name


@pytest.mark.slow
def test_margins_on_a_seed_that_was_never_used(tmp_path: Path) -> None:
    source = Checkpoint.open(draw(tmp_path / "drawn", margins.SMALL, seed=7))
    rows = list(margins._measure(("small", "2 layers", 7), source, suite("quick", margins.SMALL, 7), FAULTS, 1))
    assert [row for row in rows if (row.verdict == "pass") != (row.kind == "control")] == []


# --- the same questions, asked of NumPy -----------------------------------------------------------------------------


def _product(x_RD: Array, kernel_DF: Array, *, parts: int) -> Array:
    """Multiply in float32, the sum over D in so many parts, one after the other."""
    sums = [x @ k for x, k in zip(np.split(x_RD, parts, axis=1), np.split(kernel_DF, parts), strict=True)]
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    return total


@pytest.fixture(scope="module")
def operands() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((500, 96), np.float32), rng.standard_normal((96, 160), np.float32) / np.float32(96**0.5)


def test_margin_limit_in_float32(operands: tuple[Array, Array]) -> None:
    x, kernel = operands
    exact = x.astype(np.float64) @ kernel.astype(np.float64)
    torch = _product(x, kernel, parts=1)
    found = [
        margin(torch, _product(x, kernel, parts=parts), exact, UNIT_ROUNDOFF["float32"]).value for parts in (2, 8, 96)
    ]
    lossy = _product(x.astype(BFLOAT16).astype(np.float32), kernel, parts=1)
    assert max(found) < MARGIN_LIMIT["float32"] / 3
    assert margin(torch, lossy, exact, UNIT_ROUNDOFF["float32"]).value > 100 * MARGIN_LIMIT["float32"]


def test_margin_limit_in_bfloat16(operands: tuple[Array, Array]) -> None:
    x, kernel = (array.astype(BFLOAT16).astype(np.float32) for array in operands)
    exact = x.astype(np.float64) @ kernel.astype(np.float64)
    torch, flax = (_product(x, kernel, parts=parts).astype(BFLOAT16) for parts in (1, 8))
    assert margin(torch, flax, exact, UNIT_ROUNDOFF["bfloat16"]).value < MARGIN_LIMIT["bfloat16"] / 3
    other = np.roll(kernel, 1, axis=1)
    assert margin(torch, _product(x, other, parts=1).astype(BFLOAT16), exact, UNIT_ROUNDOFF["bfloat16"]).value > 100


def test_unequal_limit(operands: tuple[Array, Array]) -> None:
    x, kernel = (array.astype(BFLOAT16).astype(np.float32) for array in operands)
    torch, flax = (_product(x, kernel, parts=parts).astype(BFLOAT16) for parts in (1, 8))
    assert 0 < (torch != flax).mean() < UNEQUAL_LIMIT / 3, "sums in another order"
    scale = np.exp(0.25 * np.random.default_rng(1).standard_normal(96)).astype(BFLOAT16).astype(np.float32)
    normed = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    once = (normed * scale).astype(BFLOAT16)
    twice = (normed.astype(BFLOAT16).astype(np.float32) * scale).astype(BFLOAT16)
    assert (once != twice).mean() > 20 * UNEQUAL_LIMIT, "rounded at another place"


def _flips_excused(torch_ME: Array, flax_ME: Array, exact_ME: Array, per_token: int) -> list[bool]:
    """Route two sides by their own logits, and say of each flip whether it is excused."""
    torch, flax = (
        Trace({"router_logits": logits_ME, "router_ids": np.argsort(-logits_ME, axis=1)[:, :per_token]})
        for logits_ME in (torch_ME, flax_ME)
    )
    batch = Batch("b", np.zeros((1, len(exact_ME)), np.int64))
    return [flip.excused for flip in compare_routing(torch, flax, Trace({"router_logits": exact_ME}), batch).flips]


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e-1))
def test_excused_errors_are_what_two_sides_as_wrong_as_torch_can_do(seed: int, error: float) -> None:
    """Each side moves two logits by one error each: their exact margin is 4 errors at most."""
    rng = np.random.default_rng(seed)
    exact_ME = rng.standard_normal((64, 8))
    torch_ME, flax_ME = (exact_ME + error * rng.choice([-1.0, 1.0], exact_ME.shape) for _ in range(2))
    assert all(_flips_excused(torch_ME, flax_ME, exact_ME, 2))


@pytest.mark.parametrize(("errors", "excused"), [(1.0, True), (1.02, False)])
def test_excused_errors_are_not_more_than_that(errors: float, excused: bool) -> None:
    """Flax errs by three of torch's errors: that passes for rounding while the logits are 4 apart, and no farther."""
    torch_error = np.array([[1.0, -1.0, 0.0]])
    exact_ME = np.array([[EXCUSED_ERRORS * errors, 0.0, -99.0]])
    flax_ME = exact_ME - 3 * torch_error
    assert _flips_excused(exact_ME + torch_error, flax_ME, exact_ME, 1) == [excused]


def _margins_of_noise(rows: int, draws: int) -> Array:
    """Draw two sides with independent errors of one size, and give the margins."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        exact = rng.standard_normal((rows, 96))
        torch, flax = (exact + 1e-6 * rng.standard_normal(exact.shape) for _ in range(2))
        found.append(margin(torch, flax, exact, UNIT_ROUNDOFF["float32"]).value)
    return np.array(found)


def test_few_rows_are_those_whose_channels_say_little() -> None:
    assert {tokens.FEW_ROWS, backward.FEW_TOKENS, trace.FEW_ROWS} == {16}
    limit = min(MARGIN_LIMIT.values())
    assert _margins_of_noise(2, 1000).max() > limit, "two rows are accused by chance"
    assert _margins_of_noise(16, 1000).max() < limit / 2


def test_a_sum_in_another_order_rounds_no_more_than_a_random_walk() -> None:
    """A loss is one number that thousands were added up to; one after the other is as right as pairwise."""
    worst = {}
    for summed in (64, 1024, 16384):
        terms_XS = np.random.default_rng(summed).random((200, summed), np.float32)
        exact_X = terms_XS.astype(np.float64).sum(axis=1)
        one_by_one_X = np.add.accumulate(terms_XS, axis=1, dtype=np.float32)[:, -1]
        worst[summed] = (np.abs(one_by_one_X - exact_X) / exact_X).max() / UNIT_ROUNDOFF["float32"]
    assert all(roundings < 2 * math.sqrt(summed) for summed, roundings in worst.items())
    assert worst[16384] > MARGIN_LIMIT["float32"], "without the walk, a correct sum is accused"


def test_an_auxiliary_loss_over_padding_is_far_beyond_rounding() -> None:
    rng = np.random.default_rng(0)
    mask_BT = np.ones((2, 96), np.int64)
    mask_BT[1, :30] = 0
    padded = Batch("padded", rng.integers(0, DEFAULT.vocab_size, mask_BT.shape), mask_BT)
    logits_BTV = rng.standard_normal((*mask_BT.shape, DEFAULT.vocab_size))
    router_LME = list(rng.standard_normal((DEFAULT.num_hidden_layers, mask_BT.size, DEFAULT.num_local_experts)))
    exact, over_padding = (
        Oracle(DEFAULT, {}).losses(logits_BTV, router_LME, batch)["aux_loss"]
        for batch in (padded, replace(padded, attention_mask=None))
    )
    margins_found: list[float] = []
    for aux_loss, verdict in ((exact, "pass"), (over_padding, "fail")):
        traces = [Trace({"aux_loss": loss}) for loss in (exact.astype(np.float32), aux_loss.astype(np.float32), exact)]
        findings = Judge(DEFAULT, "float32", ALL).head("local", padded, (traces[0], traces[1], traces[2]), settled=True)
        (finding,) = (finding for finding in findings if finding.point == "aux_loss")
        assert finding.verdict == verdict
        assert finding.margin is not None
        margins_found.append(finding.margin)
    assert margins_found[1] > 100 * MARGIN_LIMIT["float32"], margins_found


def test_clearly_is_less_than_what_an_explained_fault_gains() -> None:
    """A fault that just fails is `MARGIN_LIMIT` times the noise, and explained it is the noise."""
    assert diagnose.CLEARLY == cache_causes.CLEARLY
    assert 1 < diagnose.CLEARLY < min(MARGIN_LIMIT.values())


def test_a_slope_cannot_be_flat_and_in_proportion() -> None:
    assert UNIT_ROUNDOFF["bfloat16"] / UNIT_ROUNDOFF["float32"] > slope.FLAT**2


def test_a_fit_counts_as_met_far_above_rounding_and_below_a_contribution(operands: tuple[Array, Array]) -> None:
    x, kernel = operands
    for dtype, limit in fitted.EXACTLY.items():
        narrow = np.dtype(np.float32) if dtype == "float32" else BFLOAT16
        rounded = [array.astype(narrow).astype(np.float32) for array in (x, kernel)]
        exact = rounded[0].astype(np.float64) @ rounded[1].astype(np.float64)
        found = _product(*rounded, parts=1).astype(narrow).astype(np.float64)
        worst = (np.sqrt(np.square(found - exact).mean(axis=1)) / np.sqrt(np.square(exact).mean(axis=1))).max()
        assert 8 * worst < limit
    assert max(fitted.EXACTLY.values()) < 0.1, "a missing expert is a good part of the sum"


def test_few_tokens_recognise_an_expert(operands: tuple[Array, Array]) -> None:
    x, _ = operands
    kernels = np.random.default_rng(2).standard_normal((64, 96, 160))
    outputs = np.einsum("rd,edf->erf", x[: fitted.PROBED_ROWS], kernels)
    observed = outputs[5].astype(BFLOAT16).astype(np.float64)
    distances = np.sqrt(np.square(outputs - observed).mean(axis=(1, 2)))
    assert distances.argmin() == 5
    assert np.sort(distances)[1] > 100 * distances.min()


def test_noise_without_a_pattern_stays_within_its_scatter_and_mean() -> None:
    rng = np.random.default_rng(0)
    scatters, means = [], []
    for _ in range(3000):
        white = rng.standard_normal((100, 8))
        size = np.sqrt(np.square(white).mean())
        scatters.append((np.square(white).mean(axis=1) / size**2).std() * 2)
        means.append(np.abs(white.mean(axis=0)).max() * 10 / size)
    assert max(scatters) < fitted.MOST_SCATTER
    assert max(means) < fitted.MOST_MEAN


def test_a_jitter_is_neither_rounding_nor_another_input() -> None:
    least, most = fitted.NOISE
    assert 100 * UNIT_ROUNDOFF["float32"] < least < UNIT_ROUNDOFF["bfloat16"]
    assert most < 1


def test_a_correlation_by_chance() -> None:
    rng = np.random.default_rng(0)
    found = [np.corrcoef(*rng.standard_normal((2, 1000)))[0, 1] for _ in range(2000)]
    assert max(map(abs, found)) < weight_causes.CHANCE / 1000**0.5
