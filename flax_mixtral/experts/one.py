"""One expert, the kernels of all, and the order of tokens by expert: what the backends share."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from flax_mixtral.activations import activate
from flax_mixtral.projection import project

__all__ = ["ExpertTrace", "Kernels", "expert", "fastest", "places", "sum_chosen", "weighted"]

SMALL = 1 << 16
"""Elements of a kernel up to which masking is faster on a CPU than skipping, and many times faster to compile."""


class Kernels(NamedTuple):
    """The kernels of all experts of one block: arrays stacked along E, or sequences of E arrays.

    Args:
        gate: [E, D, F], called w1 in the paper's code.
        up: [E, D, F], w3.
        down: [E, F, D], w2.
    """

    gate: jax.Array | Sequence[jax.Array]
    up: jax.Array | Sequence[jax.Array]
    down: jax.Array | Sequence[jax.Array]


class ExpertTrace(NamedTuple):
    """One expert's arrays, for the tokens it was given."""

    gate_RF: jax.Array
    up_RF: jax.Array
    act_RF: jax.Array
    down_RD: jax.Array


def expert(x_RD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array, hidden_act: str) -> ExpertTrace:
    """Apply one expert: down(activation(gate(x)) * up(x)), unweighted.

    Args:
        x_RD: the expert's tokens.
        gate_DF: called w1 in the paper's code.
        up_DF: w3.
        down_FD: w2.
        hidden_act: a name of `ACTIVATIONS`.

    Returns:
        Every step in x's dtype, each product accumulated in float32.
    """
    gate_RF = project("RD,DF->RF", x_RD, gate_DF)
    up_RF = project("RD,DF->RF", x_RD, up_DF)
    act_RF = activate(hidden_act, gate_RF) * up_RF
    return ExpertTrace(gate_RF, up_RF, act_RF, project("RF,FD->RD", act_RF, down_FD))


def weighted(down_RD: jax.Array, weights_R: jax.Array) -> jax.Array:
    """Scale an expert's outputs by their routing weights: in float32, to be summed over experts and then cast once."""
    return down_RD * weights_R[:, None]


def places(ids_MA: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """Number each expert's tokens in their order.

    Args:
        ids_MA: the chosen experts; E stands for all that are elsewhere.
        experts: E.

    Returns:
        [M, A], the token's place among those of its expert, from 0; and [E], how many each expert has.
    """
    hit_RX = jax.nn.one_hot(ids_MA.reshape(-1), experts + 1, dtype=jnp.int32)  # X: E and elsewhere
    place_RX = jnp.cumsum(hit_RX, axis=0) - 1
    place_MA = jnp.take_along_axis(place_RX, ids_MA.reshape(-1, 1), axis=1).reshape(ids_MA.shape)
    return place_MA, jnp.sum(hit_RX, axis=0)[:experts]


def sum_chosen(down_MAD: jax.Array, weights_MA: jax.Array) -> jax.Array:
    """Sum each token's experts by their weights: [M, D] in float32, to be cast once."""
    M, A, D = down_MAD.shape
    weighted_RD = weighted(down_MAD.reshape(M * A, D), weights_MA.reshape(-1))
    return jnp.sum(weighted_RD.reshape(M, A, D), axis=1)


def fastest(elements: int) -> Literal["dense", "blocks", "ragged"]:
    """Say which backend is the fastest on one device of the platform that JAX runs on.

    Args:
        elements: of one kernel of one expert.
    """
    if jax.default_backend() != "cpu":
        return "ragged"
    return "dense" if elements <= SMALL else "blocks"
