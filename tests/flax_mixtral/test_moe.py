"""Routing and the combination of experts, on arrays alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mixtral import moe
from flax_mixtral.moe import expert, route

M, D, E, F, A = 11, 6, 5, 8, 3
dense_experts = jax.jit(moe.dense_experts, static_argnames="hidden_act")


def _draw(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def test_weights_sum_to_one_and_follow_their_ids() -> None:
    routing = route(_draw(M, D), _draw(D, E), A)
    np.testing.assert_allclose(routing.weights_MA.sum(axis=1), 1, rtol=1e-6)
    picked = np.take_along_axis(np.asarray(routing.probs_ME), np.asarray(routing.ids_MA), axis=1)
    np.testing.assert_allclose(routing.weights_MA, picked / picked.sum(axis=1, keepdims=True), rtol=1e-6)


def test_among_equal_experts_the_lowest_goes_first() -> None:
    routing = route(jnp.zeros((2, D)), _draw(D, E), A)
    np.testing.assert_array_equal(routing.ids_MA, [[0, 1, 2]] * 2)


def test_forced_ids_take_their_own_probabilities() -> None:
    x, kernel = _draw(M, D), _draw(D, E)
    forced = jnp.tile(jnp.array([4, 0, 2]), (M, 1))
    routing = route(x, kernel, A, forced)
    free = route(x, kernel, A)
    np.testing.assert_array_equal(routing.ids_MA, free.ids_MA)
    picked = free.probs_ME[:, jnp.array([4, 0, 2])]
    np.testing.assert_allclose(routing.weights_MA, picked / picked.sum(axis=1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("planted", [jnp.inf, jnp.nan])
def test_an_expert_nobody_uses_may_hold_anything(planted: float) -> None:
    x, weights = _draw(M, D), jnp.full((M, 2), 0.5)
    ids = jnp.tile(jnp.array([1, 3]), (M, 1))
    kernels = (_draw(E, D, F), _draw(E, D, F), _draw(E, F, D))
    clean = dense_experts(x, weights, ids, kernels, "silu")
    broken = tuple(kernel.at[2].set(planted) for kernel in kernels)
    np.testing.assert_array_equal(dense_experts(x, weights, ids, broken, "silu"), clean)
    used = tuple(kernel.at[3].set(planted) for kernel in kernels)
    assert not np.isfinite(dense_experts(x, weights, ids, used, "silu")).any()


def test_experts_are_combined_by_their_weights() -> None:
    x, kernel = _draw(M, D), _draw(D, E)
    kernels = (_draw(E, D, F), _draw(E, D, F), _draw(E, F, D))
    routing = route(x, kernel, A)
    expected = np.zeros((M, D))
    for m in range(M):
        for a in range(A):
            gate, up, down = (kernel[int(routing.ids_MA[m, a])] for kernel in kernels)
            expected[m] += (
                float(routing.weights_MA[m, a]) * np.asarray(expert(x[m : m + 1], gate, up, down, "silu").down_RD)[0]
            )
    found = dense_experts(x, routing.weights_MA, routing.ids_MA, kernels, "silu")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
