"""The oracle's gradients against central finite differences of its own forward."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity.gradients import training_labels
from parity.oracle.activations import ACTIVATIONS
from parity.oracle.backward import forward
from parity.oracle.derivatives import ACTIVATION_SLOPES
from parity.oracle.model import Oracle
from parity.trace import Array, Batch
from tests.parity.both_sides import BATCHES, ROPE, both_sides

AGREEMENT = 1e-6
"""Of a leaf's gradient along a random direction; the worst measured is 5e-8, the differences' own truncation."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "window-left-padded": ("left-counted", {"sliding_window": 7}),
    "tied-right-padded": ("right", {"tie_word_embeddings": True}),
    "one-key-head": ("left", {"num_key_value_heads": 1}),
    "heads-not-grouped": ("plain", {"num_key_value_heads": 6}),
    "top-one": ("plain", {"num_experts_per_tok": 1}),
    "every-expert-gelu": ("plain", {"num_experts_per_tok": 5, "hidden_act": "gelu"}),
    "packed": ("packed", {}),
    "pad-token": ("left", {"pad_token_id": 0, "tie_word_embeddings": True}),
    **{f"rope-{rope}": ("late", {"rope": rope}) for rope in sorted(set(ROPE) - {"default"})},
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_leaf_agrees_with_finite_differences(case: str, tmp_path: Path) -> None:
    name, overrides = CASES[case]
    both = both_sides(tmp_path / "checkpoint", num_hidden_layers=2, router_aux_loss_coef=0.3, **overrides)
    batch = BATCHES[name]
    labels_BT = training_labels(batch)
    weights = {leaf: array.astype(np.float64) for leaf, array in both.legacy.items()}
    found = Oracle(both.config, weights).gradients(batch, labels_BT)
    rng = np.random.default_rng(0)

    def loss_at(shifts: dict[str, Array]) -> float:
        moved = {leaf: weights[leaf] + shifts.get(leaf, 0) for leaf in weights}
        return float(forward(Oracle(both.config, moved), batch, labels_BT, found.routing).losses.training_loss)

    assert set(found.parameters) == set(weights)
    for leaves in _kinds(weights):
        direction = {leaf: rng.standard_normal(weights[leaf].shape) for leaf in leaves}
        exact = sum(float((direction[leaf] * found.parameters[leaf]).sum()) for leaf in leaves)
        size = np.sqrt(sum(float((found.parameters[leaf] ** 2).sum()) for leaf in leaves))
        ahead, behind = (loss_at({leaf: step * direction[leaf] for leaf in leaves}) for step in (1e-5, -1e-5))
        assert size > 0, leaves
        assert abs((ahead - behind) / 2e-5 - exact) < AGREEMENT * size, leaves


def _kinds(weights: dict[str, Array]) -> list[list[str]]:
    """Group the experts of a layer by their part; every other tensor stands alone."""
    groups: dict[str, list[str]] = {}
    for leaf in weights:
        stem, _, rest = leaf.partition(".experts.")
        groups.setdefault(f"{stem}.{rest.partition('.')[2]}" if rest else leaf, []).append(leaf)
    return list(groups.values())


def test_the_gradient_of_the_stream_is_that_of_a_shift_of_it(tmp_path: Path) -> None:
    both = both_sides(tmp_path / "checkpoint", num_hidden_layers=2)
    batch = BATCHES["plain"]
    labels_BT = training_labels(batch)
    found = both.oracle().gradients(batch, labels_BT)
    direction_BTD = np.random.default_rng(0).standard_normal(found.stream[0].shape)

    class Shifted(Oracle):
        """An oracle whose stream is moved before block 1."""

        step = 0.0

        def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Any:
            shift_BTD = self.step * direction_BTD if layer == 1 else 0
            return super().block(layer, x_BTD + shift_BTD, batch, routing)

    oracle, losses = Shifted(both.config, both.legacy), []
    for oracle.step in (1e-5, -1e-5):
        losses.append(float(forward(oracle, batch, labels_BT, found.routing).losses.training_loss))
    exact = float((direction_BTD * found.stream[1]).sum())

    assert abs((losses[0] - losses[1]) / 2e-5 - exact) < AGREEMENT * float(np.sqrt((found.stream[1] ** 2).sum()))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_slope_of_each_activation_agrees_with_finite_differences(name: str) -> None:
    x = np.random.default_rng(0).normal(0, 3, 2000)
    differences = (ACTIVATIONS[name](x + 1e-6) - ACTIVATIONS[name](x - 1e-6)) / 2e-6

    np.testing.assert_allclose(ACTIVATION_SLOPES[name](x), differences, atol=1e-7)


def test_padding_is_no_label_nor_is_what_follows_it() -> None:
    ids_BT = np.array([[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]])
    labels_BT = training_labels(Batch("b", ids_BT, np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])))

    np.testing.assert_array_equal(labels_BT, [[-100, -100, -100, 6, 7], [-100, 6, 7, -100, -100]])


def test_padding_has_no_gradient(tmp_path: Path) -> None:
    both = both_sides(tmp_path / "checkpoint", num_hidden_layers=2)
    batch = BATCHES["left"]
    found = both.oracle().gradients(batch, training_labels(batch))

    for gradient_BTD in found.stream:
        assert (gradient_BTD[~batch.real_BT] == 0).all()
