"""The proof of power: each planted fault is found, at its layer and at its point; no fault, no alarm."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import courts
from convert import Checkpoint, convert
from flax_mixtral import experts
from flax_mixtral.experts import Kernels, one, parallel
from flax_mixtral.experts.dense import masked_sum
from parity.drawn import DEFAULT, draw
from parity.inputs import suite
from parity.metrics import Precision
from parity.port import Port
from parity.result import Divergence
from parity.runner import run
from parity.selftest.controls import CONTROLS
from parity.selftest.faults import FAULTS, planted
from parity.selftest.planting import Scene
from parity.selftest.trials import Absent, Alarm, Trial, passed, selftest
from parity.trace import routed
from tests.checkpoints import write_checkpoint

LAYERS = 4
TIES = replace(DEFAULT, num_hidden_layers=2, num_experts_per_tok=3)
"""Experts tie in pairs: only an odd number of them makes a tie at the last place."""
SIX = (
    "w1-w3-swapped",
    "rope-interleaved",
    "norm-eps",
    "experts-permuted",
    "router-not-renormalised",
    "kv-heads-tiled",
)
BY_SLUG = {fault.slug: fault for fault in FAULTS}
BY_CONTROL = {control.slug: control for control in CONTROLS}
QUICK = {
    "float32": ("residual-from-normed", "causal-mask-missing", "capacity-drop", "points-missing", "lm-head-wrong"),
    "bfloat16": ("norm-cast-order", "norm-not-upcast", "combine-low-precision", "jitter-on", "traces-do-not-overlap"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "torch"
    write_checkpoint(path, num_hidden_layers=LAYERS, sliding_window=37)
    return path


def test_without_a_fault_there_is_no_alarm(checkpoint: Path) -> None:
    result = run(checkpoint, inputs="quick")
    assert result.verdict == "pass", [finding for finding in result.findings if finding.verdict != "pass"]
    assert result.first_divergence is None
    assert result.exit_code == 0


@pytest.mark.parametrize(("slug", "layer"), [(slug, 1 + number % 2) for number, slug in enumerate(SIX)])
def test_each_fault_is_found_where_it_was_planted(checkpoint: Path, slug: str, layer: int) -> None:
    result = run(checkpoint, inputs="quick", change=planted(BY_SLUG[slug], layer))
    assert result.exit_code == 1
    first = result.first_divergence
    assert first is not None
    assert first.layer == layer
    assert first.point.replace("expert.0", "expert") in BY_SLUG[slug].shows
    local = {finding.layer for finding in result.findings if finding.mode == "local" and finding.verdict == "fail"}
    assert local == {layer}, "a local comparison blames the block at fault and no other"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quick_part_of_the_selftest(checkpoint: Path, dtype: Precision) -> None:
    faults = [BY_SLUG[slug] for slug in QUICK[dtype]]
    rows = list(
        selftest(Checkpoint.open(checkpoint), dtypes=[dtype], inputs="quick", faults=faults, controls=CONTROLS[:1])
    )
    assert [row.slug for row in rows] == [CONTROLS[0].slug, *QUICK[dtype]]
    assert passed(rows), [row for row in rows if not passed([row])]


@pytest.mark.slow
@pytest.mark.parametrize("seed", courts.SEEDS)
@pytest.mark.parametrize("name", courts.COURTS)
def test_the_whole_selftest(name: str, seed: int) -> None:
    rows = courts.hold(name, seed)
    assert passed(rows), [row for row in rows if not passed([row])]


def test_a_fault_that_a_model_cannot_have_is_not_planted(checkpoint: Path) -> None:
    faults = [BY_SLUG[slug] for slug in ("layers-sorted-as-strings", "router-tie-break")]
    rows = list(selftest(Checkpoint.open(checkpoint), dtypes=["float32"], inputs="quick", faults=faults, controls=()))
    assert rows == [
        Absent("layers-sorted-as-strings", "float32", "more than 10 layers"),
        Absent("router-tie-break", "float32", "router probabilities that tie exactly"),
    ]


@pytest.mark.parametrize(("window", "shows_from"), [(37, 38), (None, 17)])
def test_a_window_shows_on_inputs_that_are_longer_alone(window: int | None, shows_from: int) -> None:
    fault, config = BY_SLUG["window-off-by-one"], replace(DEFAULT, sliding_window=window)
    scene = Scene(config, ties=0, tokens=99, longest=shows_from, quietest=1.0)
    assert fault.lacks(scene._replace(longest=shows_from - 1)) == "inputs longer than the window"
    assert fault.lacks(scene) is None


def test_an_epsilon_shows_on_quiet_streams_alone() -> None:
    """A tenth of 1e-5 moves a norm by 4.5e-6 / mean square; a margin leaves ten times two roundings of 2**-24."""
    fault, scene = BY_SLUG["norm-eps"], Scene(DEFAULT, ties=0, tokens=9, longest=9, quietest=3.7)
    assert DEFAULT.rms_norm_eps == 1e-5
    assert fault.lacks(scene) is None
    assert fault.lacks(scene._replace(quietest=3.8)) == "a token quiet enough for rms_norm_eps to show above rounding"


def test_kernels_are_not_copied_for_every_token_where_memory_has_no_room() -> None:
    wide = replace(DEFAULT, hidden_size=4096, intermediate_size=14336)
    scene = Scene(DEFAULT, ties=0, tokens=42, longest=37, quietest=1.0)
    assert BY_CONTROL["experts-batched"].lacks(scene) is None
    needs = BY_CONTROL["experts-batched"].lacks(scene._replace(config=wide, tokens=10**6))
    assert needs == "memory for the kernels that batched_mm copies for every token"


def test_ties_are_found_where_routers_tie_and_their_order_is_judged(tmp_path: Path) -> None:
    source = Checkpoint.open(draw(tmp_path / "drawn", TIES, tied_routers=True))
    faults = [BY_SLUG["router-tie-break"]]
    rows = list(selftest(source, dtypes=["float32"], inputs="quick", faults=faults, controls=CONTROLS[:1]))
    assert [type(row) for row in rows] == [Alarm, Trial]
    assert passed(rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_cache_is_found_and_a_right_one_is_silent(checkpoint: Path, dtype: Precision) -> None:
    faults, controls = [BY_SLUG["cache-position"]], [BY_CONTROL["with-a-cache"]]
    source = Checkpoint.open(checkpoint)
    rows = list(selftest(source, dtypes=[dtype], inputs="quick", faults=faults, controls=controls))
    assert [type(row) for row in rows] == [Alarm, Trial]
    assert passed(rows), rows


def test_controls_run_the_backend_that_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(
        x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
    ) -> jax.Array:
        return jnp.zeros_like(x_MD)

    monkeypatch.setattr(experts, "BACKENDS", {**experts.BACKENDS, "blocks": nothing, "ragged": nothing})
    source = Checkpoint.open(draw(tmp_path / "drawn", replace(DEFAULT, num_hidden_layers=1)))
    slugs = ("experts-dense", "experts-in-blocks", "experts-ragged", "experts-over-devices")
    controls = [BY_CONTROL[slug] for slug in slugs[: 3 if len(jax.devices()) > 1 else 4]]
    rows = list(selftest(source, dtypes=["float32"], inputs="quick", faults=(), controls=controls))
    assert [row.at for row in rows if isinstance(row, Alarm)] == ["0 moe_out"] * 2
    absent = [row.needs for row in rows if isinstance(row, Absent)]
    assert absent[0] == "a model built for another backend"
    assert all(needs.startswith("8 devices") for needs in absent[1:])


@pytest.mark.multidevice
def test_experts_shared_among_eight_devices_are_not_accused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint.open(draw(tmp_path / "drawn", replace(DEFAULT, num_hidden_layers=1)))
    controls = [BY_CONTROL["experts-over-devices"]]
    rows = list(selftest(source, inputs="quick", faults=(), controls=controls))
    assert [type(row) for row in rows] == [Alarm, Alarm]
    assert passed(rows), rows
    monkeypatch.setattr(parallel, "masked_sum", lambda x, weights, ids, *rest: masked_sum(x, weights, ids + 1, *rest))
    (row,) = selftest(source, dtypes=["float32"], inputs="quick", faults=(), controls=controls)
    assert isinstance(row, Alarm)
    assert row.at == "0 moe_out", "each expert has another one's tokens"


def test_a_fault_reaches_experts_that_are_compiled_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one, "SMALL", 0)  # one array per expert, as on a CPU for a large model
    source = Checkpoint.open(draw(tmp_path / "drawn", replace(DEFAULT, num_hidden_layers=1)))
    (batch,) = suite("quick", source.config, 0)
    port = Port(source.config, source.view("flax"))
    sound = port.side(port.config, port.weights)
    x_BTD = sound.embed(batch)
    sound.block(0, x_BTD, batch)  # compiles the sound experts
    faulty = planted(BY_SLUG["matmul-low-precision"], 0)(port)
    trace = faulty.side(faulty.config, faulty.weights).block(0, x_BTD, batch)
    sum_MD = np.zeros((batch.real_M.size, source.config.hidden_size))
    for expert, rows in trace.rows.items():
        hit, weights = routed(trace, expert)
        sum_MD[rows] += np.where(hit, weights, 0)[:, None] * trace[f"expert.{expert}.down"]
    found_MD = trace["moe_out"].reshape(sum_MD.shape)
    np.testing.assert_allclose(found_MD[batch.real_M], sum_MD[batch.real_M], rtol=0, atol=1e-5)


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len(BY_SLUG) == len(FAULTS)


def test_a_fault_in_the_converted_file_ends_with_exit_1(checkpoint: Path, tmp_path: Path) -> None:
    flax = tmp_path / "flax"
    convert(checkpoint, flax)
    weights = load_file(flax / "flax_model.safetensors")
    stem = "model.layers.2.moe.experts."
    weights[stem + "gate"], weights[stem + "up"] = weights[stem + "up"], weights[stem + "gate"]
    save_file(weights, flax / "flax_model.safetensors")
    command = [sys.executable, "-m", "parity", "run", str(checkpoint), str(flax), "--suite", "quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "first divergence: layer 2, expert.0.gate" in done.stdout
    assert "model.layers.2.moe.experts.gate" in done.stdout, "the weights that differ are listed"


def test_one_flipped_bit_fails_although_no_output_shows_it(checkpoint: Path, tmp_path: Path) -> None:
    flax = tmp_path / "flax"
    convert(checkpoint, flax)
    weights = load_file(flax / "flax_model.safetensors")
    kernel = weights["model.layers.1.attention.o.kernel"]
    kernel.reshape(-1)[5] = np.nextafter(kernel.reshape(-1)[5], np.float32(9))
    save_file(weights, flax / "flax_model.safetensors")
    result = run(checkpoint, flax, inputs="quick")
    assert result.exit_code == 1
    assert [difference.name for difference in result.differences] == ["model.layers.1.attention.o.kernel"]
    assert result.first_divergence == Divergence(1, "model.layers.1.attention.o.kernel")
