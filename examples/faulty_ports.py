"""The port of plain_jax.py before two faults were found in it, and stations on the way; see docs/own-port.md."""

from typing import Any

import jax
import jax.numpy as jnp

from examples.plain_jax import PlainJax, Weights
from parity.trace import Array, Batch, Trace


def rotate_neighbours(x_BTNH: jax.Array, angle_BTP: jax.Array) -> jax.Array:
    """Rotate lanes 0 and 1, 2 and 3, ... together, as Mistral's own weights want it and Hugging Face's do not."""
    cos, sin = jnp.cos(angle_BTP)[:, :, None], jnp.sin(angle_BTP)[:, :, None]
    even, odd = x_BTNH[..., 0::2], x_BTNH[..., 1::2]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x_BTNH.shape)


def plain_probabilities(probs_ME: jax.Array, ids_MA: jax.Array) -> jax.Array:
    """Take the chosen experts' probabilities as they are: their sum is below 1."""
    return jnp.take_along_axis(probs_ME, ids_MA, axis=-1)


class BlockOutputs:
    """The same port, of which only the blocks' outputs can be had."""

    name = "block-outputs"

    def __init__(self, port: PlainJax):
        self._port = port

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        return Trace({"resid_out": self._port.block(layer, x_BTD, batch, routing)["resid_out"]})


def two_faults(config: Any, weights: Weights) -> PlainJax:
    return PlainJax(config, weights, rotate=rotate_neighbours, weigh=plain_probabilities)


def one_fault(config: Any, weights: Weights) -> PlainJax:
    return PlainJax(config, weights, weigh=plain_probabilities)


def block_outputs(config: Any, weights: Weights) -> BlockOutputs:
    return BlockOutputs(two_faults(config, weights))
