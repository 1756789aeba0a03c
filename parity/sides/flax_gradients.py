"""Gradients of the Flax side: `jax.grad` through the model that users train, its blocks jitted.

Blocks of one shape share one compilation each way, so that depth costs no compile time; under one jit around the whole
model, XLA would compile every layer anew.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_mixtral.arrays import arrays_of
from flax_mixtral.decoder import BlockTrace, Context, DecoderBlock
from flax_mixtral.heads import Mixtral
from flax_mixtral.losses import causal_lm_loss
from flax_mixtral.norm import RMSNorm
from parity.gradients import Gradients, Losses
from parity.trace import Array, Batch

__all__ = ["differentiate"]


_causal_lm_loss = jax.jit(causal_lm_loss)


@jax.jit
def _run_block(block: DecoderBlock, *inputs: Any) -> BlockTrace:
    trace: BlockTrace = block(*inputs)
    return trace


@jax.jit
def _run_norm(norm: RMSNorm, x_BTD: jax.Array) -> jax.Array:
    normed_BTD: jax.Array = norm(x_BTD)
    return normed_BTD


class _Probed(nnx.Module):
    """A block to whose input a zero is added, since the loss's gradient by that zero is the one by the input."""

    def __init__(self, block: DecoderBlock, zero_BTD: jax.Array, routing_MA: jax.Array | None):
        self.block = block
        self.zero_BTD = nnx.data(zero_BTD)
        self.routing_MA = nnx.data(routing_MA)
        self.ids_MA: Any = nnx.data(None)

    def __call__(
        self, x_BTD: jax.Array, context: Context, key: jax.Array | None = None, past: None = None
    ) -> BlockTrace:
        trace: BlockTrace = _run_block(self.block, x_BTD + self.zero_BTD, context, self.routing_MA, key)
        self.ids_MA = nnx.data(trace.router_ids)
        return trace


class _ProbedNorm(nnx.Module):
    """The final norm, with the same zero added."""

    def __init__(self, norm: RMSNorm, zero_BTD: jax.Array):
        self.norm = norm
        self.zero_BTD = nnx.data(zero_BTD)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        normed_BTD: jax.Array = _run_norm(self.norm, x_BTD + self.zero_BTD)
        return normed_BTD


def differentiate(model: Mixtral, batch: Batch, labels_BT: Array, routing: Sequence[Array] | None) -> Gradients:
    """Differentiate the training loss with respect to every parameter and to the input of every block.

    Args:
        model: whose own `__call__` is differentiated.
        batch: what it is run on.
        labels_BT: the token itself, or -100 where none is predicted.
        routing: L arrays [M, A] of expert ids; None for the routers' own choice.

    Returns:
        Gradients by leaf, in the leaf's dtype.
    """
    config = model.config
    graphdef, parameters = nnx.split(model)
    width = (*batch.input_ids.shape, config.hidden_size)
    dtype = model.model.embed_tokens.embedding[...].dtype
    zeros = [jnp.zeros(width, dtype) for _ in range(config.num_hidden_layers + 1)]

    def training_loss(parameters: Any, zeros: list[jax.Array]) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, parameters)
        decoder: Any = model.model
        probes = [
            _Probed(block, zero_BTD, None if routing is None else jnp.asarray(routing[layer]))
            for layer, (block, zero_BTD) in enumerate(zip(decoder.layers, zeros[:-1], strict=True))
        ]
        decoder.layers, decoder.final_norm = nnx.List(probes), _ProbedNorm(decoder.final_norm, zeros[-1])
        output = model(batch.input_ids, batch.attention_mask, batch.position_ids)
        loss = _causal_lm_loss(output.logits, jnp.asarray(labels_BT))
        total = loss + config.router_aux_loss_coef * output.aux_loss
        return total, ((loss, output.aux_loss, total), [probe.ids_MA for probe in probes])

    (by_leaf, by_zero), (losses, ids) = jax.grad(training_loss, argnums=(0, 1), has_aux=True)(parameters, zeros)
    leaves = arrays_of(nnx.merge(graphdef, by_leaf))
    return Gradients(
        Losses(*map(np.asarray, losses)),
        {path: np.asarray(gradient) for path, gradient in leaves.items()},
        [np.asarray(gradient_BTD) for gradient_BTD in by_zero],
        [np.asarray(ids_MA) for ids_MA in ids],
    )
