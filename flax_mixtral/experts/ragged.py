"""Tokens sorted by expert, and one grouped product for all of them: for accelerators."""

import jax
import jax.numpy as jnp

from flax_mixtral.activations import activate
from flax_mixtral.experts.one import Kernels, places, sum_chosen

__all__ = ["ragged_experts", "ragged_sum"]


def ragged_experts(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
) -> jax.Array:
    """Apply the experts; see `apply_experts`. The kernels are stacked."""
    return ragged_sum(x_MD, weights_MA, ids_MA, kernels, hidden_act).astype(x_MD.dtype)


def ragged_sum(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
) -> jax.Array:
    """Sum the weighted outputs in the weights' dtype; the id E is of an expert elsewhere, which has no part in it."""
    M, A = ids_MA.shape
    place_MA, count_E = places(ids_MA, len(kernels.gate))
    start_X = jnp.append(0, jnp.cumsum(count_E))  # what is elsewhere comes last
    row_MA = start_X[ids_MA] + place_MA
    token_R = jnp.zeros(M * A, jnp.int32).at[row_MA.reshape(-1)].set(jnp.arange(M * A, dtype=jnp.int32) // A)

    here_R1 = (jnp.arange(M * A) < start_X[-1])[:, None]

    def product(x_RX: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x_RX.dtype, jnp.float32)
        out_RX = jax.lax.ragged_dot(x_RX, kernel, count_E, preferred_element_type=wide).astype(x_RX.dtype)
        return jnp.where(here_R1, out_RX, 0)  # after the last group is what the platform leaves there

    gate, up, down = (_used(jnp.asarray(kernel), count_E) for kernel in kernels)
    x_RD = x_MD[token_R]
    act_RF = activate(hidden_act, product(x_RD, gate)) * product(x_RD, up)
    return sum_chosen(product(act_RF, down)[row_MA], weights_MA)


def _used(kernel: jax.Array, count_E: jax.Array) -> jax.Array:
    """Blank the kernels of unused experts where XLA multiplies with them all the same, so that Inf cannot spread."""
    used: jax.Array = jax.lax.platform_dependent(
        kernel,
        count_E,
        cpu=lambda kernel, count_E: jnp.where(count_E[:, None, None] > 0, kernel, 0),
        default=lambda kernel, count_E: kernel,
    )
    return used
