"""How a model holds its experts is its own affair: the same results, the same names, the same file."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from flax_mixtral import Mixtral
from flax_mixtral.arrays import Mould, arrays_of
from flax_mixtral.tree import slots
from tests.flax_mixtral.models import IDS, TINY, drawn, forward
from tests.rerun import rerun


@pytest.fixture(scope="module")
def pair() -> tuple[Mixtral, Mixtral]:
    """Give a model with stacked experts, and the same with one array per expert."""
    stacked = drawn(TINY)
    return stacked, Mould(lambda rngs: Mixtral(TINY, rngs=rngs, experts="blocks")).fill(arrays_of(stacked))


def test_experts_held_one_by_one_are_listed_stacked(pair: tuple[Mixtral, Mixtral]) -> None:
    stacked, split = pair
    assert len(jax.tree.leaves(split)) == len(jax.tree.leaves(stacked)) + 2 * 3 * (5 - 1)
    for one, other in zip(arrays_of(stacked).items(), arrays_of(split).items(), strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])
    assert list(arrays_of(split)) == [path for path, _ in nnx_paths(stacked)]


def nnx_paths(model: Mixtral) -> list[tuple[str, object]]:
    return [(".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))]


def test_both_write_the_same_file_and_read_it(pair: tuple[Mixtral, Mixtral], tmp_path: Path) -> None:
    for name, model in zip(("stacked", "split"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "flax_model.safetensors").read_bytes() for name in ("stacked", "split")]
    assert files[0] == files[1]
    for choice in ("dense", "blocks", "ragged"):
        model = Mixtral.from_pretrained(tmp_path / "split", experts=choice)
        np.testing.assert_allclose(forward(model, IDS).logits, forward(pair[0], IDS).logits, rtol=0, atol=2e-5)


def test_a_part_of_another_shape_is_refused() -> None:
    arrays = {slot.path: np.zeros(slot.shape, np.float32) for slot in slots(TINY)}
    arrays["model.layers.1.moe.experts.up"] = np.zeros((4, 12, 20), np.float32)
    with pytest.raises(
        ValueError, match=r"layers\.1\.moe\.experts\.up: expected shape \(5, 12, 20\), got \(4, 12, 20\)"
    ):
        Mould(lambda rngs: Mixtral(TINY, rngs=rngs, experts="blocks")).fill(arrays)


def test_tree_mode_passes_the_same_tests() -> None:
    tests = [f"{__file__}::{name}" for name in TREE_MODE]
    rerun(*tests, expected=len(TREE_MODE), NNX_GRAPH_MODE="false", NNX_GRAPH_UPDATES="false")


TREE_MODE = ("test_experts_held_one_by_one_are_listed_stacked", "test_both_write_the_same_file_and_read_it")
