"""Tokens sorted by expert, and one grouped product for all of them: for accelerators."""

import jax
import jax.numpy as jnp

from flax_mixtral.activations import activate
from flax_mixtral.experts.one import Kernels, places, sum_chosen

__all__ = ["ragged_experts"]


def ragged_experts(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
) -> jax.Array:
    """Apply the experts; see `apply_experts`. The kernels are stacked."""
    M, A = ids_MA.shape
    place_MA, count_E = places(ids_MA, len(kernels.gate))
    row_MA = (jnp.cumsum(count_E) - count_E)[ids_MA] + place_MA
    token_R = jnp.zeros(M * A, jnp.int32).at[row_MA.reshape(-1)].set(jnp.arange(M * A, dtype=jnp.int32) // A)

    def product(x_RX: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x_RX.dtype, jnp.float32)
        return jax.lax.ragged_dot(x_RX, kernel, count_E, preferred_element_type=wide).astype(x_RX.dtype)

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
