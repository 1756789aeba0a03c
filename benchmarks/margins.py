"""Margins of correct variants and of planted faults, on models small, deep, wide and trained.

    python -m benchmarks.margins [small] [trained] [deep] [wide]

Measures the groups that are named (wide writes 3 GB and holds 6), replaces their rows in
benchmarks/measured/margins.csv and renders the tables of docs/tolerances.md from all rows. Controls run as users run
the model; a fault runs op by op, so that what is planted is what is computed.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax

from benchmarks import tables
from convert import Checkpoint
from flax_mixtral.config import MixtralConfig
from parity import embedded
from parity.drawn import DEFAULT, draw
from parity.inputs import padded, suite, tokenized
from parity.metrics import Precision
from parity.result import Result
from parity.router import EXCUSED_ERRORS
from parity.selftest.controls import CONTROLS, Control
from parity.selftest.faults import FAULTS
from parity.selftest.planting import Fault, planted
from parity.selftest.trials import Court
from parity.trace import Batch
from parity.verdict import MARGIN_LIMIT, UNEQUAL_LIMIT, Finding

DTYPES: tuple[Precision, ...] = ("float32", "bfloat16")

SMALL = replace(DEFAULT, num_hidden_layers=2, sliding_window=37)
CHOOSING, HELD_OUT = (0,), (1, 2)
"""Seeds of the small model: those that constants are chosen by, and those that they are tried on."""

DEEP = replace(SMALL, num_hidden_layers=32)
WIDE = MixtralConfig(
    vocab_size=331,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
    sliding_window=None,
)
"""8x7B's width; half of its experts, since each is multiplied alike."""

SUBTLE = (
    "norm-eps",
    "norm-cast-order",
    "norm-not-upcast",
    "rope-freq-low-precision",
    "softmax-low-precision",
    "router-low-precision",
    "router-probs-rounded",
    "combine-low-precision",
    "jitter-on",
    "matmul-low-precision",
)
"""Those that lose precision only: planted where planting all of them would take too long."""

WIDE_TOKENS = (21, 16)
TEXT_TOKENS = (241, 113)


@dataclass(frozen=True)
class Row:
    """One control or fault, in one model and dtype.

    Args:
        group: small, deep, wide or trained.
        model: which of the group.
        seed: of weights and ids.
        dtype: what was computed in.
        kind: control or fault.
        slug: its name.
        verdict: the run's.
        margin: the largest that decides.
        at: where that is, as mode, layer and point.
        unequal: the largest share of a bfloat16 operation's elements that are not torch's.
        flip: the largest margin of a flipped token, in its calibrated logit errors; 0 without a flip.
        guards: what failed: margin, rounding, routing, equality, weights.
    """

    group: str
    model: str
    seed: int
    dtype: str
    kind: str
    slug: str
    verdict: str
    margin: float
    at: str
    unequal: float
    flip: float
    guards: str


def main(wanted: Sequence[str]) -> None:
    """Measure, store and render."""
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for name in wanted:
            measured = list(GROUPS[name](Path(folder)))
            rows = [row for row in _stored() if row.group != name] + measured
            rows.sort(key=lambda row: list(GROUPS).index(row.group))
            tables.store("margins", [asdict(row) for row in rows])
    tables.put(tables.TOLERANCES, "margins", render(_stored()))


def _stored() -> list[Row]:
    return [_row(text) for text in tables.load("margins")]


def _small(folder: Path) -> Iterator[Row]:
    for seed in (*CHOOSING, *HELD_OUT):
        source, batches = Checkpoint.open(draw(folder / f"small-{seed}", SMALL, seed=seed)), suite("quick", SMALL, seed)
        yield from _measure(("small", "2 layers", seed), source, batches, FAULTS, 1)


def _deep(folder: Path) -> Iterator[Row]:
    source = Checkpoint.open(draw(folder / "deep", DEEP))
    faults = [fault for fault in FAULTS if fault.slug in SUBTLE]
    yield from _measure(("deep", "32 layers", 0), source, suite("quick", DEEP, 0), faults, DEEP.num_hidden_layers - 2)


def _wide(folder: Path) -> Iterator[Row]:
    source = Checkpoint.open(draw(folder / "wide", WIDE))
    (drawn,) = suite("quick", WIDE, 0)
    rows = [ids_T[-length:] for ids_T, length in zip(drawn.input_ids, WIDE_TOKENS, strict=True)]
    batch = padded("left-padded", rows, WIDE, side="left")
    faults = [fault for fault in FAULTS if fault.slug in SUBTLE]
    yield from _measure(("wide", "D 4096, F 14336", 0), source, [batch], faults, 0)


def _trained(_: Path) -> Iterator[Row]:
    """Feed the trained model text that it was not trained on."""
    source = Checkpoint.open(embedded.path())
    (text,) = tokenized(embedded.path(), embedded.held_out_text())
    (ids_T,) = text.input_ids
    rows = [ids_T[: TEXT_TOKENS[0]], ids_T[TEXT_TOKENS[0] :][: TEXT_TOKENS[1]]]
    batch = padded("text", rows, source.config, side="left")
    yield from _measure(("trained", "held-out text", 0), source, [batch], FAULTS, source.config.num_hidden_layers // 2)


GROUPS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "small": _small,
    "trained": _trained,
    "deep": _deep,
    "wide": _wide,
}


def _measure(
    which: tuple[str, str, int], source: Checkpoint, batches: Sequence[Batch], faults: Sequence[Fault], layer: int
) -> Iterator[Row]:
    for dtype in DTYPES:
        started, rows = time.perf_counter(), 0
        court = Court(source, batches, dtype)
        scene = court.scene(layer)
        for control in CONTROLS:
            if control.lacks(scene) is None and not control.cached:
                rows += 1
                yield _row_of((*which, dtype, "control", control.slug), _run(court, control))
        for fault in faults:
            if dtype in fault.dtypes and fault.lacks(scene) is None and fault.place != "cache":
                last = fault.slug == "hidden-state-after-norm"
                where = source.config.num_hidden_layers - 1 if last else layer
                result = court.examine(planted(fault, where), named=False)
                rows += 1
                yield _row_of((*which, dtype, "fault", fault.slug), result)
        print(*which, dtype, f"{rows} rows in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def _run(court: Court, control: Control) -> Result:
    return court.examine(control.change, control.attention, control.experts, control.threads, named=False)


def _row_of(named: tuple[str, str, int, str, str, str], result: Result) -> Row:
    deciding, worst = [finding for finding in result.findings if finding.decides], result.worst
    flips = [flip for routing in result.routing.values() for flip in routing.flips if not flip.tie]
    guards = {guard for finding in deciding if finding.verdict == "fail" for guard in _guards(finding)}
    return Row(
        *named,
        verdict=result.verdict,
        margin=_rounded(0.0 if worst is None else worst.margin or 0.0),
        at="" if worst is None else f"{worst.mode} {'-' if worst.layer is None else worst.layer} {worst.point}",
        unequal=_rounded(max((finding.unequal or 0.0 for finding in deciding), default=0.0)),
        flip=_rounded(max((flip.margin / max(flip.logit_error, 1e-300) for flip in flips), default=0.0)),
        guards=" ".join(sorted(guards | ({"weights"} if result.differences else set()))),
    )


def _rounded(figure: float) -> float:
    return float(f"{figure:.4g}")


def _guards(finding: Finding) -> Iterator[str]:
    """Say what found a failure."""
    limited = finding.margin is not None
    if limited and not (finding.margin or 0.0) <= MARGIN_LIMIT[finding.dtype]:
        yield "margin"
    if (finding.unequal or 0.0) > UNEQUAL_LIMIT:
        yield "rounding"
    if not limited:
        yield "routing" if finding.point == "router_ids" else "equality"


def _row(text: dict[str, str]) -> Row:
    numbers = {name: float(text[name]) for name in ("margin", "unequal", "flip")}
    return Row(**{**text, **numbers, "seed": int(text["seed"])})  # type: ignore[arg-type]  # the others are str


def render(rows: Sequence[Row]) -> str:
    """Lay the tables of docs/tolerances.md out."""
    return "\n\n".join(
        f"{title}\n\n{tables.markdown(headings, (line for part in _parts(rows) for line in lines(*part)))}"
        for title, headings, lines in TABLES
    )


Part = tuple[str, Precision, list[Row], list[Row]]
"""The name of a set of models, the dtype, its controls and its faults."""


def _parts(rows: Sequence[Row]) -> Iterator[Part]:
    for name, belongs in PARTS.items():
        for dtype in DTYPES:
            own = [row for row in rows if belongs(row) and row.dtype == dtype]
            controls, faults = ([row for row in own if row.kind == kind] for kind in ("control", "fault"))
            if own:
                yield name, dtype, controls, faults


PARTS: dict[str, Callable[[Row], bool]] = {
    "small, chosen on": lambda row: row.group == "small" and row.seed in CHOOSING,
    "small, held out": lambda row: row.group == "small" and row.seed in HELD_OUT,
    "trained, held-out text": lambda row: row.group == "trained",
    "32 layers": lambda row: row.group == "deep",
    "D 4096, F 14336": lambda row: row.group == "wide",
}


def _alone(faults: Sequence[Row], guard: str) -> list[Row]:
    """Keep the faults that nothing but this guard finds, those that it misses included."""
    return [row for row in faults if not set(row.guards.split()) - {guard} and row.verdict != "unchecked"]


def _verdicts(name: str, dtype: Precision, controls: list[Row], faults: list[Row]) -> Iterator[tuple[object, ...]]:
    accused = sum(row.verdict != "pass" for row in controls)
    found = sum(row.verdict != "pass" for row in faults)
    yield name, dtype, len(controls), accused, len(faults), found


def _margins(name: str, dtype: Precision, controls: list[Row], faults: list[Row]) -> Iterator[tuple[object, ...]]:
    worst = max(controls, key=lambda row: row.margin)
    # A fault whose operations are rounded otherwise than torch's has another guard.
    weakest = min(_alone(faults, "margin"), key=lambda row: row.margin, default=None)
    found = ("-", "-") if weakest is None else (f"{weakest.margin:.3g}", f"`{weakest.slug}`")
    gap = "-" if weakest is None else f"{weakest.margin / worst.margin:.3g}"
    yield name, dtype, f"{worst.margin:.3g}", f"`{worst.slug}`", f"{MARGIN_LIMIT[dtype]:g}", *found, gap


def _roundings(name: str, dtype: Precision, controls: list[Row], faults: list[Row]) -> Iterator[tuple[object, ...]]:
    if dtype == "bfloat16":
        worst = max(controls, key=lambda row: row.unequal)
        alone = sorted(_alone(faults, "rounding"), key=lambda row: row.unequal)
        weakest = [f"{alone[0].unequal:.2%}", f"`{alone[0].slug}`"] if alone else ["-", "-"]
        yield name, f"{worst.unequal:.3%}", f"`{worst.slug}`", f"{UNEQUAL_LIMIT:.0%}", *weakest


def _flips(name: str, dtype: Precision, controls: list[Row], faults: list[Row]) -> Iterator[tuple[object, ...]]:
    worst = max(controls, key=lambda row: row.flip)
    which = f"`{worst.slug}`" if worst.flip else "no flip"
    yield name, dtype, f"{worst.flip:.3g}", which, f"{EXCUSED_ERRORS:g}"


TABLES: tuple[tuple[str, tuple[str, ...], Callable[..., Iterator[tuple[object, ...]]]], ...] = (
    ("Verdicts:", ("models", "dtype", "controls", "accused", "faults", "found"), _verdicts),
    (
        "Margins; the weakest fault is that of those which no other guard finds:",
        ("models", "dtype", "worst control", "which", "limit", "weakest fault", "which", "gap"),
        _margins,
    ),
    (
        "Elements of a single bfloat16 operation that are not torch's; the weakest fault again has no other guard:",
        ("models", "worst control", "which", "limit", "weakest fault", "which"),
        _roundings,
    ),
    (
        "Flips: the oracle's margin at a token that changed its experts, in the token's calibrated logit errors:",
        ("models", "dtype", "worst control", "which", "limit"),
        _flips,
    ),
)


if __name__ == "__main__":
    main(sys.argv[1:])
