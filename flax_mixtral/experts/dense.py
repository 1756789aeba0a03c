"""Every token through every expert, and what was not routed selected away: E/A times the work, no control flow."""

import jax
import jax.numpy as jnp

from flax_mixtral.experts.one import Kernels, expert, weighted

__all__ = ["dense_experts", "masked_sum"]


def dense_experts(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
) -> jax.Array:
    """Apply the experts; see `apply_experts`. The kernels are stacked."""
    return masked_sum(x_MD, weights_MA, ids_MA, kernels, hidden_act).astype(x_MD.dtype)


def masked_sum(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
) -> jax.Array:
    """Sum the weighted outputs in the weights' dtype; the id E is of an expert elsewhere, which has no part in it."""

    def add_expert(sum_MD: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        number, *kernel = row
        hit_MA = ids_MA == number
        # Of an expert that nobody uses, zeros: selected away below, its Inf would still make NaN of the gradient.
        gate_DF, up_DF, down_FD = (jnp.where(hit_MA.any(), array, 0) for array in kernel)
        weight_M = jnp.sum(jnp.where(hit_MA, weights_MA, 0), axis=-1)
        weighted_MD = weighted(expert(x_MD, gate_DF, up_DF, down_FD, hidden_act).down_RD, weight_M)
        return sum_MD + jnp.where(hit_MA.any(axis=-1, keepdims=True), weighted_MD, 0), None

    numbers_E = jnp.arange(len(kernels.gate))
    start_MD = jnp.zeros_like(x_MD, weights_MA.dtype)  # like x, so that under shard_map it varies as x does
    sum_MD, _ = jax.lax.scan(add_expert, start_MD, (numbers_E, *map(jnp.asarray, kernels)))
    return sum_MD
