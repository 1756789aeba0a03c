"""The decoder: one block, and the stack of them between embedding and final norm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mixtral.attention import Attention, AttentionTrace, visible_keys
from flax_mixtral.cache import KVCache, Past, keys_in_sight, refuse_overflow
from flax_mixtral.config import MixtralConfig
from flax_mixtral.experts import Choice
from flax_mixtral.moe import MoE
from flax_mixtral.norm import RMSNorm
from flax_mixtral.parts import apply_part
from flax_mixtral.rope import Rotary, rotary

__all__ = ["BlockTrace", "Context", "Decoder", "DecoderBlock", "DecoderTrace", "Embedding", "context_of", "look_up"]


class Context(NamedTuple):
    """What every block of one forward shares: rotations and visible keys."""

    rotation: Rotary
    visible_BTS: jax.Array


class BlockTrace(NamedTuple):
    """Every step of one block, under the comparison points' names; under jit, what nobody reads is not computed."""

    input_norm: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_rot: jax.Array
    k_rot: jax.Array
    attn_context: jax.Array
    attn_out: jax.Array
    resid_mid: jax.Array
    post_attn_norm: jax.Array
    router_logits: jax.Array
    router_probs: jax.Array
    router_ids: jax.Array
    router_weights: jax.Array
    moe_out: jax.Array
    resid_out: jax.Array


class DecoderTrace(NamedTuple):
    """The residual stream before each block, the final norm's output, router logits [M, E] per layer, and the cache."""

    stream_BTD: tuple[jax.Array, ...]
    final_norm_BTD: jax.Array
    router_logits: tuple[jax.Array, ...]
    cache: KVCache | None


def context_of(
    config: MixtralConfig,
    shape_BT: tuple[int, int],
    attention_mask: jax.Array | None,
    position_ids: jax.Array | None,
    dtype: jnp.dtype,
    cache: KVCache | None = None,
) -> Context:
    """Derive rotations and visible keys from mask and positions; positions count from 0, or on from the cache's."""
    B, T = shape_BT
    first = 0 if cache is None else cache.length
    position_BT = jnp.broadcast_to(first + jnp.arange(T), (B, T)) if position_ids is None else position_ids
    rotation = rotary(config, position_BT, dtype)
    if cache is None:
        return Context(rotation, visible_keys(config, shape_BT, attention_mask, position_ids))
    return Context(rotation, keys_in_sight(cache, real_tokens(shape_BT, attention_mask), config.sliding_window))


def real_tokens(shape_BT: tuple[int, int], attention_mask: jax.Array | None) -> jax.Array:
    """Give the mask as bool; without one, every token is real."""
    return jnp.ones(shape_BT, bool) if attention_mask is None else attention_mask.astype(bool)


def look_up(embedding_VD: jax.Array, input_ids: jax.Array) -> jax.Array:
    """Give each token its vector: [B, T] to [B, T, D]."""
    return embedding_VD[input_ids]


class Embedding(nnx.Module):
    """Holds one vector per token."""

    def __init__(self, config: MixtralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Look tokens up; see `look_up`."""
        return apply_part(look_up, self.embedding[...], input_ids)


class DecoderBlock(nnx.Module):
    """Attention and experts, each after its norm and added to the residual stream."""

    def __init__(self, config: MixtralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, experts: Choice = "auto"):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.moe = MoE(config, dtype=dtype, rngs=rngs, experts=experts)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        routing_MA: jax.Array | None = None,
        key: jax.Array | None = None,
        past: Past | None = None,
    ) -> BlockTrace:
        """Run the block; `resid_out` is its output.

        Args:
            x_BTD: the residual stream.
            context: rotations and visible keys.
            routing_MA: experts to take instead of the router's own choice.
            key: PRNG key of training: turns on attention dropout and router jitter.
            past: this layer's part of the cache; the caller writes the new keys and values to it.
        """
        attention_key, moe_key = (None, None) if key is None else jax.random.split(key)
        given = (x_BTD, context, attention_key, past)
        input_norm, attention, resid_mid = apply_part(first_half, self.input_norm, self.attention, *given)
        post_attn_norm = apply_part(RMSNorm.__call__, self.post_attention_norm, resid_mid)
        moe = self.moe(post_attn_norm, routing_MA, moe_key)
        return BlockTrace(
            input_norm=input_norm,
            q=attention.q_BTNH,
            k=attention.k_BTKH,
            v=attention.v_BTKH,
            q_rot=attention.q_rot_BTNH,
            k_rot=attention.k_rot_BTKH,
            attn_context=attention.context_BTNH,
            attn_out=attention.out_BTD,
            resid_mid=resid_mid,
            post_attn_norm=post_attn_norm,
            router_logits=moe.routing.logits_ME,
            router_probs=moe.routing.probs_ME,
            router_ids=moe.routing.ids_MA,
            router_weights=moe.routing.weights_MA,
            moe_out=moe.out_BTD,
            resid_out=resid_mid + moe.out_BTD,
        )


def first_half(
    norm: RMSNorm, attention: Attention, x_BTD: jax.Array, context: Context, key: jax.Array | None, past: Past | None
) -> tuple[jax.Array, AttentionTrace, jax.Array]:
    """Attend within a block: the normed stream, attention on it, and the stream with its output added."""
    input_norm = norm(x_BTD)
    trace = attention(input_norm, context.rotation, context.visible_BTS, key, past)
    return input_norm, trace, x_BTD + trace.out_BTD


class Decoder(nnx.Module):
    """Embedding, blocks and final norm: Mixtral without a head."""

    def __init__(
        self,
        config: MixtralConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        experts: Choice = "auto",
    ):
        self.config = config
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        depth = range(config.num_hidden_layers)
        self.layers = nnx.List([DecoderBlock(config, dtype=dtype, rngs=rngs, experts=experts) for _ in depth])
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> DecoderTrace:
        """Run every block; see `heads.Mixtral.__call__` for the arguments."""
        B, T = input_ids.shape
        x_BTD = self.embed_tokens(input_ids)
        if cache is not None:
            refuse_overflow(cache, T, self.config.sliding_window)
        shaped = (self.config, (B, T), attention_mask, position_ids, x_BTD.dtype, cache)
        context = apply_part(context_of, *shaped, static=(0, 1, 4))
        stream, router_logits, new = [], [], []
        for layer, block in enumerate(self.layers):
            layer_key = None if key is None else jax.random.fold_in(key, layer)
            past = None if cache is None else cache.past(layer)
            trace = block(x_BTD, context, key=layer_key, past=past)
            stream.append(x_BTD)
            router_logits.append(trace.router_logits)
            new.append((trace.k_rot, trace.v))
            x_BTD = trace.resid_out
        if cache is not None:
            cache = cache.written(new, real_tokens((B, T), attention_mask), self.config.sliding_window)
        # The method of the norm that is there: a probe stands in its place when gradients are compared.
        final_norm_BTD = apply_part(type(self.final_norm).__call__, self.final_norm, x_BTD)
        return DecoderTrace(tuple(stream), final_norm_BTD, tuple(router_logits), cache)
