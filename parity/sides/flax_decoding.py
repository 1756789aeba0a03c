"""Continuations of the Flax side: `flax_mixtral.generate`, and given tokens fed one by one through the cache.

As for gradients, blocks are jitted one by one: those of one shape share one compilation, whatever the depth.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_mixtral import generate, init_cache
from flax_mixtral.cache import Past
from flax_mixtral.decoder import BlockTrace, Context, DecoderBlock
from flax_mixtral.heads import Mixtral
from parity.decoding import Decoded, continued, in_steps, joined
from parity.trace import Array, Batch

__all__ = ["decode", "greedy"]


class _Observed(nnx.Module):
    """A block that is given its experts, and keeps what its router chose."""

    def __init__(self, block: DecoderBlock, run: Callable[..., BlockTrace]):
        self.block = block
        self.run = run
        self.routing_MA: Any = nnx.data(None)
        self.trace: Any = nnx.data(None)

    def __call__(
        self, x_BTD: jax.Array, context: Context, key: jax.Array | None = None, past: Past | None = None
    ) -> BlockTrace:
        trace = self.run(self.block, x_BTD, context, self.routing_MA, key, past)
        self.trace = nnx.data({name: getattr(trace, name) for name in ("router_logits", "router_ids")})
        return trace


def greedy(model: Mixtral, batch: Batch, new: int) -> Array:
    """Continue every row as users do, whatever token would end it: [B, new]."""
    tokens_BT = generate(model, batch.input_ids, new, attention_mask=batch.real_BT, eos_token_id=())
    return tokens_BT[:, batch.input_ids.shape[1] :].astype(np.int64)


def decode(model: Mixtral, batch: Batch, ids_BX: Array, routing: Sequence[Array] | None) -> Decoded:
    """Run the prompt, then given tokens one by one, through the model's own call; see `Generates.decode`.

    Args:
        model: whose `__call__` and cache are run; its blocks are wrapped.
        batch: the prompt.
        ids_BX: the tokens after it.
        routing: experts to use, per layer.
    """
    whole = continued(batch, ids_BX)
    B, end = whole.input_ids.shape
    cache = init_cache(model.config, B, end, model.model.embed_tokens.embedding[...].dtype)
    run: Callable[..., BlockTrace] = jax.jit(lambda block, *given: block(*given))
    blocks = [_Observed(block, run) for block in model.model.layers]
    decoder: Any = model.model
    decoder.layers = nnx.List(blocks)
    logits, routes = [], []
    for step in in_steps(batch, ids_BX):
        for layer, block in enumerate(blocks):
            own = None if routing is None else routing[layer].reshape(B, end, -1)[:, step]
            block.routing_MA = nnx.data(None if own is None else jnp.asarray(own.reshape(-1, own.shape[-1])))
        mask_BT = None if batch.attention_mask is None else jnp.asarray(whole.real_BT[:, step])
        position_BT = None if whole.position_ids is None else jnp.asarray(whole.position_ids[:, step])
        trace = model.model(jnp.asarray(whole.input_ids[:, step]), mask_BT, position_BT, cache)
        assert trace.cache is not None, "a cache was given"
        cache = trace.cache
        logits.append(np.asarray(model.head(trace.final_norm_BTD[:, -1:], jnp.asarray(whole.input_ids[:, step]))))
        routes.append([{name: np.asarray(array) for name, array in block.trace.items()} for block in blocks])
    return Decoded(np.concatenate(logits, axis=1), joined(routes, B))
