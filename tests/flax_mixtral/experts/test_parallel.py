"""Experts spread over eight simulated devices, whichever way each applies its own, against all on one device."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mixtral.experts import Kernels, blocks, parallel
from flax_mixtral.experts.dense import dense_experts
from flax_mixtral.experts.parallel import parallel_experts
from tests.flax_mixtral.meshes import MESHES, mesh_of

M, D, E, F, A = 40, 6, 8, 24, 2
OWN = ("dense", "blocks", "ragged")
"""What `fastest` may say."""

Given = tuple[jax.Array, jax.Array, Kernels]
Apply = Callable[..., jax.Array]


@cache
def given() -> tuple[Given, jax.Array]:
    """Draw what experts are given: every token goes to the last expert, none to expert 2."""
    rng = np.random.default_rng(0)
    x_MD, *kernels = (jnp.float32(rng.normal(0, 0.6, shape)) for shape in ((M, D), (E, D, F), (E, D, F), (E, F, D)))
    others = np.array([0, 1, 3, 4, 5, 6])
    ids_MA = np.stack([np.full(M, E - 1), others[np.arange(M) * 7 % 11 % 6]], axis=1).astype(np.int32)
    return (x_MD, jnp.float32(rng.dirichlet(np.ones(A), M)), Kernels(*kernels)), jnp.asarray(ids_MA)


def run(apply: Apply, arrays: Given, ids_MA: jax.Array) -> list[np.ndarray]:
    """Give the outputs, and the gradient of a sum in which every output has a weight of its own."""
    marks_MD = jnp.cos(jnp.arange(M * D)).reshape(M, D)

    def total(x_MD: jax.Array, weights_MA: jax.Array, kernels: Kernels) -> tuple[jax.Array, jax.Array]:
        out_MD = apply(x_MD, weights_MA, ids_MA, kernels, "silu")
        return jnp.sum(out_MD * marks_MD), out_MD

    found = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


@cache
def on_one() -> list[np.ndarray]:
    return run(dense_experts, *given())


def assert_those_of_one_device(own: str, mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "fastest", lambda elements: own)
    with jax.set_mesh(mesh):
        found = run(parallel_experts, *given())
    for ours, plain in zip(found, on_one(), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)


@pytest.mark.multidevice
@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("name", MESHES)
def test_outputs_and_gradients_are_those_of_one_device(name: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_those_of_one_device(own, mesh_of(name), monkeypatch)


def first_devices_ids(ids_MA: jax.Array, rank: int | jax.Array, own: int) -> jax.Array:
    return jnp.minimum(ids_MA, own)


def clipped(ids_MA: jax.Array, rank: int | jax.Array, own: int) -> jax.Array:
    return jnp.clip(ids_MA - rank * own, 0, own - 1)


@pytest.mark.multidevice
@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("wrong", [first_devices_ids, clipped])
def test_tokens_of_other_experts_are_seen(wrong: Apply, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "own_ids", wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_those_of_one_device(own, mesh_of("4x2 fsdp"), monkeypatch)


@pytest.mark.multidevice
def test_blocks_have_the_size_of_an_average_over_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(tokens: int, average: float) -> tuple[int, ...]:
        asked.append((tokens, average))
        return (tokens,)

    monkeypatch.setattr(blocks, "block_sizes", recorded)
    assert_those_of_one_device("blocks", mesh_of("4x2 fsdp"), monkeypatch)
    assert set(asked) == {(M // 4, M // 4 * A / E)}
