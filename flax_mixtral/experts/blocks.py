"""Tokens sorted by expert and processed in blocks of rows: only experts that are hit cost anything. For CPUs.

Every expert has an array of its own and is multiplied where it lies. Shapes are static: an expert's blocks are a scan
over as many as it could have, with a switch by how many rows are left, none or one of a few sizes. There is only
scan and switch here, so every transform of JAX goes through.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flax_mixtral.experts.one import Kernels, expert, places, sum_chosen
from flax_mixtral.parts import apply_part

__all__ = ["block_experts", "block_sizes", "block_sum", "one_expert"]

SHARES = (1 / 4, 1 / 2, 3 / 4, 7 / 8, 1, 9 / 8, 5 / 4, 3 / 2, 2)
"""Rows of a block, as shares of what an expert gets on average: dense around it, where most experts are."""
LARGEST_AVERAGE = 128
"""Products with more than twice as many rows are no faster per row."""


def block_experts(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
) -> jax.Array:
    """Apply the experts; see `apply_experts`. The kernels are one array per expert."""
    average = ids_MA.size / len(kernels.gate)
    return block_sum(x_MD, weights_MA, ids_MA, kernels, hidden_act, average).astype(x_MD.dtype)


def block_sum(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str, average: float
) -> jax.Array:
    """Sum the weighted outputs in the weights' dtype; the id E is of an expert elsewhere, which has no part in it.

    Args:
        x_MD: see `apply_experts`.
        weights_MA: see there.
        ids_MA: see there, for the E experts that are here.
        kernels: of those; where they are stacked, one at a time is copied out.
        hidden_act: see there.
        average: rows of an expert if all, here and elsewhere, were equally busy.
    """
    M, E = len(ids_MA), len(kernels.gate)
    sizes = block_sizes(M, average)
    C = -(-M // sizes[-1]) * sizes[-1]  # rows of an expert that every token chose
    tokens = apply_part(tokens_of, ids_MA, E, C, static=(1, 2))
    if isinstance(kernels.gate, jax.Array):
        rows = (jnp.arange(E), tuple(kernels))
        down_ECD = jax.lax.map(lambda row: one_expert(x_MD, tokens, *row, sizes, hidden_act), rows)
        return combine(down_ECD, tokens.place_MA, ids_MA, weights_MA)
    down_ECD = tuple(
        one_expert(x_MD, tokens, e, kernels_of_one, sizes, hidden_act)
        for e, kernels_of_one in enumerate(zip(*kernels, strict=True))
    )
    return apply_part(combine, down_ECD, tokens.place_MA, ids_MA, weights_MA)


class Tokens(NamedTuple):
    """The tokens of each expert, how many they are, and the place of each token among its expert's."""

    token_EC: jax.Array
    count_E: jax.Array
    place_MA: jax.Array


def tokens_of(ids_MA: jax.Array, experts: int, rows: int) -> Tokens:
    """Sort the tokens by expert; `rows` is C."""
    M, A = ids_MA.shape
    place_MA, count_E = places(ids_MA, experts)
    token_MA = jnp.broadcast_to(jnp.arange(M)[:, None], (M, A))
    token_EC = jnp.zeros((experts, rows), jnp.int32).at[ids_MA, place_MA].set(token_MA)
    return Tokens(token_EC, count_E, place_MA)


def combine(
    down_ECD: jax.Array | tuple[jax.Array, ...], place_MA: jax.Array, ids_MA: jax.Array, weights_MA: jax.Array
) -> jax.Array:
    """Bring the experts' rows back to their tokens, zeros from elsewhere, and sum each token's."""
    row_MA = ids_MA * len(down_ECD[0]) + place_MA
    down_MAD = jnp.concatenate(down_ECD).at[row_MA].get(mode="fill", fill_value=0)
    return sum_chosen(down_MAD, weights_MA)


def block_sizes(tokens: int, average: float) -> tuple[int, ...]:
    """Say how many rows a block may have, ascending.

    Args:
        tokens: M, which no expert exceeds.
        average: rows of an expert if all were equally busy.
    """
    wanted = (share * min(average, LARGEST_AVERAGE) for share in SHARES)
    # A product with one row or two is another, faster routine; from there on XLA works in panels of eight.
    return tuple(sorted({min(math.ceil(rows) if rows <= 2 else math.ceil(rows / 8) * 8, tokens) for rows in wanted}))


# Compiled once for every expert of one shape, also where the caller is not: else each call of a model outside jit would
# compile all experts of all layers anew.
@partial(jax.jit, static_argnames=("sizes", "hidden_act"))
def one_expert(
    x_MD: jax.Array,
    tokens: Tokens,
    e: int | jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
    sizes: tuple[int, ...],
    hidden_act: str,
) -> jax.Array:
    """Give the outputs [C, D] of expert e for its tokens, and zeros after them."""
    token_C, count = tokens.token_EC[e], tokens.count_E[e]
    largest, D = sizes[-1], x_MD.shape[1]

    def of_size(size: int) -> Callable[[jax.Array], jax.Array]:
        def run(start: jax.Array) -> jax.Array:
            token_R = jax.lax.dynamic_slice_in_dim(token_C, start, size)
            # Zeros where no token is left: another expert's token could overflow here, and spoil a gradient.
            real_R1 = (start + jnp.arange(size) < count)[:, None]
            down_RD = expert(jnp.where(real_R1, x_MD[token_R], 0), *kernels, hidden_act).down_RD
            return jnp.pad(down_RD, ((0, largest - size), (0, 0)))

        return run

    # Zeros like x, so that under shard_map every branch varies as x does.
    branches = [lambda start: jnp.zeros_like(x_MD, shape=(largest, D)), *map(of_size, sizes)]

    # Recomputed in a backward pass: what a switch would keep is a copy for every size.
    @jax.checkpoint
    def block(start: jax.Array) -> jax.Array:
        smaller = jnp.array((0, *sizes[:-1]))
        down_RD: jax.Array = jax.lax.switch(jnp.sum(count - start > smaller), branches, start)
        return down_RD

    starts = jnp.arange(0, len(token_C), largest)
    down_SRD: jax.Array = jax.lax.map(block, starts)
    return down_SRD.reshape(len(token_C), D)
