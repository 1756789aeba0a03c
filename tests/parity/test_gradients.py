"""Gradients of both frameworks against the oracle's: what is right passes, what is wrong is found and placed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from convert import Checkpoint
from flax_mixtral import moe
from flax_mixtral.arrays import Mould
from flax_mixtral.config import MixtralConfig
from flax_mixtral.decoder import BlockTrace, DecoderBlock
from flax_mixtral.heads import Mixtral
from flax_mixtral.moe import Routing, route
from parity.__main__ import cli
from parity.backward import compare_gradients
from parity.gradients import Gradients, Losses, training_labels
from parity.metrics import UNIT_ROUNDOFF
from parity.oracle.model import Oracle
from parity.port import Port
from parity.result import Divergence, Result
from parity.runner import run
from parity.sides import Side
from parity.sides.flax import FlaxSide
from parity.sides.timed import Timed
from parity.sides.torch_hf import TorchSide
from parity.trace import Array, Batch
from parity.verdict import Finding
from tests.checkpoints import write_checkpoint
from tests.parity.both_sides import BATCHES

LAYERS = 3


class Fake:
    """A side that gives the gradients it was made with."""

    name = "fake"

    def __init__(self, found: Gradients):
        self.found = found

    def gradients(self, batch: Batch, labels_BT: Array, routing: Sequence[Array] | None = None) -> Gradients:
        return self.found


def sides(path: Path) -> tuple[MixtralConfig, TorchSide, FlaxSide, Oracle]:
    source = Checkpoint.open(path)
    return (
        source.config,
        TorchSide(source.config, source.raw_config, source.view("hf-fused")),
        FlaxSide(source.config, source.view("flax")),
        Oracle(source.config, source.view("hf-legacy")),
    )


def compared(config: MixtralConfig, torch: Any, flax: Any, oracle: Any, batch: Batch) -> Result:
    findings = list(compare_gradients(config, Timed(torch), Timed(flax), Timed(oracle), batch, "float32"))
    return Result(findings, {}, [], 0, [], "float32", {}, {}, {})


def failures(result: Result) -> list[Finding]:
    return [finding for finding in result.findings if finding.verdict != "pass"]


# --- what is right passes -------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "window-left-padded": ("left-counted", {"sliding_window": 7}),
    "tied-right-padded-every-head": ("right", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "packed-top-one-fused": ("packed", {"num_experts_per_tok": 1, "layout": "hf-fused"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_flax_is_as_close_to_the_exact_gradients_as_torch(name: str, tmp_path: Path) -> None:
    batch, overrides = VARIANTS[name]
    write_checkpoint(tmp_path / "torch", num_hidden_layers=2, **overrides)
    config, torch, flax, oracle = sides(tmp_path / "torch")
    result = compared(config, torch, flax, oracle, BATCHES[batch])

    assert not failures(result)
    leaves = {finding.point for finding in result.findings if finding.point.startswith("grad.model")}
    assert {f"grad.{leaf}" for leaf in Checkpoint.open(tmp_path / "torch").view("flax")} - leaves <= {
        "grad.lm_head.kernel"
    }
    assert sum(finding.point == "grad.resid" for finding in result.findings) == 3


def test_the_command_compares_gradients(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "torch", num_hidden_layers=1)
    (tmp_path / "ids.json").write_text(json.dumps([[5, 6, 7, 8, 9, 10, 11], [1, 2, 3]]))
    arguments = ["run", str(tmp_path / "torch"), "--input-ids", str(tmp_path / "ids.json"), "--grad", "--json"]
    done = CliRunner().invoke(cli, arguments)

    assert done.exit_code == 0, done.output
    points = [point["point"] for point in json.loads(done.stdout)["points"] if point["mode"] == "backward"]
    assert points[:5] == ["loss", "aux_loss", "training_loss", "grad.lm_head.kernel", "grad.model.final_norm.scale"]
    assert points[-1] == "grad.model.embed_tokens.embedding"


# --- planted in the model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gradients") / "torch"
    write_checkpoint(path, num_hidden_layers=LAYERS)
    return path


def _stopped_route(*arguments: Any) -> Routing:
    routing = route(*arguments)
    return routing._replace(weights_MA=jax.lax.stop_gradient(routing.weights_MA))


class StoppedWeights(DecoderBlock):
    """No gradient through the routing weights."""

    def __call__(self, *arguments: Any, **keywords: Any) -> BlockTrace:
        with mock.patch.object(moe, "route", _stopped_route):
            return super().__call__(*arguments, **keywords)


class DetachedResidual(DecoderBlock):
    """No gradient through the residual stream past the block; the forward is the same bit for bit."""

    def __call__(self, x_BTD: jax.Array, *arguments: Any, **keywords: Any) -> BlockTrace:
        trace = super().__call__(x_BTD, *arguments, **keywords)
        return trace._replace(resid_out=trace.resid_out + (jax.lax.stop_gradient(x_BTD) - x_BTD))


class PlantedSide(FlaxSide):
    """The Flax side with another class of block in one layer."""

    def __init__(self, side: FlaxSide, layer: int, kind: type[DecoderBlock]):
        super().__init__(side._config, side._weights)
        self.layer, self.kind = layer, kind

    def whole_model(self) -> Mixtral:
        def build(rngs: Any) -> Mixtral:
            model = Mixtral(self._config, rngs=rngs)
            model.model.layers[self.layer] = self.kind(self._config, dtype=np.dtype(np.float32), rngs=rngs)
            return model

        return Mould(build).fill(self._weights)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("kind", "point"),
    [(StoppedWeights, "grad.model.layers.{}.moe.router.kernel"), (DetachedResidual, "grad.resid")],
)
def test_a_stopped_gradient_is_placed(checkpoint: Path, kind: type[DecoderBlock], point: str, layer: int) -> None:
    config, torch, flax, oracle = sides(checkpoint)
    result = compared(config, torch, PlantedSide(flax, layer, kind), oracle, BATCHES["left-counted"])

    assert result.first_divergence == Divergence(layer, point.format(layer))
    assert all(finding.layer is None or finding.layer <= layer for finding in failures(result))


def test_a_wrong_coefficient_of_the_auxiliary_loss_is_placed(checkpoint: Path) -> None:
    config, torch, flax, oracle = sides(checkpoint)
    wrong = replace(config, router_aux_loss_coef=config.router_aux_loss_coef * 1.1)
    result = compared(config, torch, FlaxSide(wrong, flax._weights), oracle, BATCHES["left-counted"])

    assert result.first_divergence == Divergence(None, "training_loss")
    assert any("router" in finding.point for finding in failures(result))


@pytest.mark.slow
def test_a_fault_of_the_backward_pass_alone_fails_a_run(checkpoint: Path) -> None:
    def stopped(port: Port) -> Port:
        return replace(port, side=lambda *port: PlantedSide(FlaxSide(*port), 1, StoppedWeights))

    result = run(checkpoint, inputs=[BATCHES["left-counted"]], change=stopped, grad=True)

    assert result.exit_code == 1
    assert result.first_divergence == Divergence(1, "grad.model.layers.1.moe.router.kernel")
    assert {finding.mode for finding in failures(result)} == {"backward"}


# --- planted in the arrays ------------------------------------------------------------------------------------------

EXPERTS = 12
GATE = "model.layers.1.moe.experts.gate"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixtralConfig, Gradients, Gradients, Gradients, Batch]:
    """More experts than a few tokens hit: torch's gradients, torch's as Flax leaves, the oracle's."""
    path = tmp_path_factory.mktemp("few") / "torch"
    write_checkpoint(path, num_hidden_layers=LAYERS, num_local_experts=EXPERTS)
    config, torch, _, oracle = sides(path)
    batch = Batch("few", np.array([[5, 6, 7, 8]]))
    torch_found = torch.gradients(batch, training_labels(batch))
    leaves = dict(Checkpoint.of_arrays(config, torch_found.parameters).view("flax"))
    exact = oracle.gradients(batch, training_labels(batch), torch_found.routing)
    return config, torch_found, replace(torch_found, parameters=leaves), exact, batch


def _leaf(leaf: str, change: Callable[[Array], Any]) -> Callable[[Gradients], Gradients]:
    def changed(found: Gradients) -> Gradients:
        array = change(found.parameters[leaf].copy())
        kept = {path: own for path, own in found.parameters.items() if path != leaf}
        return replace(found, parameters=kept if array is None else {**kept, leaf: array})

    return changed


def _set(array: Array, where: Any, value: float) -> Array:
    array[where] = value
    return array


def _expert(found: Gradients, *, hit: bool) -> int:
    hits = found.parameters[GATE].any(axis=(1, 2))
    return int(np.flatnonzero(hits == hit)[0])


def test_equal_gradients_pass_also_of_experts_that_no_token_hit(few: Any) -> None:
    config, torch, leaves, exact, batch = few
    result = compared(config, Fake(torch), Fake(leaves), Fake(exact), batch)

    assert not leaves.parameters[GATE].any(axis=(1, 2)).all(), "some expert is not hit"
    assert result.verdict == "pass", failures(result)


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        (lambda array: None, "unchecked", "missing from flax"),
        (lambda array: array[:-1], "fail", "shapes differ"),
        (lambda array: array.astype(np.float64), "fail", "dtypes differ"),
        (lambda array: _set(array, (0, 0, 0), np.nan), "fail", "not finite"),
        (lambda array: _set(array, ..., 0), "fail", "has no gradient although tokens went there"),
        (lambda array: np.roll(array, 1, axis=0), "fail", "x as far"),
        (lambda array: np.where(array == 0, 1e-30, array).astype(array.dtype), "fail", "has a gradient although no"),
        (lambda array: array * np.float32(1.0001), "fail", "x as far"),
    ],
)
def test_a_wrong_leaf_never_passes(few: Any, change: Callable[[Array], Any], verdict: str, reason: str) -> None:
    config, torch, leaves, exact, batch = few
    result = compared(config, Fake(torch), Fake(_leaf(GATE, change)(leaves)), Fake(exact), batch)
    (finding,) = failures(result)

    assert (finding.layer, finding.point, finding.verdict) == (1, f"grad.{GATE}", verdict)
    assert finding.reason is not None
    assert reason in finding.reason


def test_a_reference_without_a_gradient_is_no_pass(few: Any) -> None:
    config, torch, leaves, exact, batch = few
    expert = _expert(leaves, hit=True)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    without = _leaf(name, lambda array: _set(array, expert, 0))(torch)
    same = _leaf(GATE, lambda array: _set(array, expert, 0))(leaves)
    verdicts = {f.point: f.verdict for f in compared(config, Fake(without), Fake(same), Fake(exact), batch).findings}

    assert verdicts[f"grad.{GATE}"] == "unchecked"


def test_everything_upstream_of_a_fault_is_not_blamed(few: Any) -> None:
    config, torch, leaves, exact, batch = few
    stream = [x_BTD * np.float32(1.001) if layer < 2 else x_BTD for layer, x_BTD in enumerate(leaves.stream)]
    result = compared(config, Fake(torch), Fake(replace(leaves, stream=stream)), Fake(exact), batch)

    assert result.first_divergence == Divergence(1, "grad.resid")
    assert [finding.layer for finding in failures(result)] == [1, 0]


def _single(config: MixtralConfig, found: Gradients) -> Gradients:
    """Round gradients to float32, as Flax leaves."""
    leaves = Checkpoint.of_arrays(config, found.parameters).view("flax")
    return replace(
        found,
        losses=Losses(*(scalar.astype(np.float32) for scalar in found.losses)),
        parameters={leaf: array.astype(np.float32) for leaf, array in leaves.items()},
        stream=[x_BTD.astype(np.float32) for x_BTD in found.stream],
    )


def test_what_one_rounding_of_the_weights_does_is_no_fault(checkpoint: Path) -> None:
    config, _, _, oracle = sides(checkpoint)
    batch, labels_BT = BATCHES["plain"], training_labels(BATCHES["plain"])
    exact = oracle.gradients(batch, labels_BT)
    moved = oracle.shaken(UNIT_ROUNDOFF["float32"], 7).gradients(batch, labels_BT, exact.routing)
    lucky, flax = Fake(_single(config, exact)), Fake(_single(config, moved))

    assert compared(config, lucky, flax, Fake(exact), batch).verdict == "fail"
    assert compared(config, lucky, flax, oracle, batch).verdict == "pass"


def test_in_bfloat16_gradients_inform(few: Any) -> None:
    config, torch, leaves, exact, batch = few
    wrong = Fake(_leaf(GATE, lambda array: -array)(leaves))
    torch_side, flax_side, oracle = (Timed(cast(Side, side)) for side in (Fake(torch), wrong, Fake(exact)))
    findings = list(compare_gradients(config, torch_side, flax_side, oracle, batch, "bfloat16"))

    assert any(finding.verdict == "fail" for finding in findings)
    assert not any(finding.decides for finding in findings)


def test_a_side_without_gradients_is_unchecked(few: Any) -> None:
    config, torch, _, exact, batch = few

    class Bare:
        name = "bare"

    assert compared(config, Fake(torch), Bare(), Fake(exact), batch).verdict == "unchecked"


def test_what_has_no_training_loss_is_unchecked(few: Any) -> None:
    config, torch, leaves, exact, batch = few
    bare = replace(config, architecture="MixtralForSequenceClassification")
    single = Batch("single", np.array([[5]]))

    assert compared(bare, Fake(torch), Fake(leaves), Fake(exact), batch).verdict == "unchecked"
    assert compared(config, Fake(torch), Fake(leaves), Fake(exact), single).verdict == "unchecked"
