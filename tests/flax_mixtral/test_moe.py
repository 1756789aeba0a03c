"""Routing, on arrays alone."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_mixtral.moe import route

M, D, E, A = 11, 6, 5, 3


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
