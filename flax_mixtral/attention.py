"""Grouped-query attention: the mask, the mixing of values, and the module that holds the four kernels."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mixtral.cache import Past, join
from flax_mixtral.config import MixtralConfig
from flax_mixtral.projection import Projection, project
from flax_mixtral.rope import Rotary, rotate

__all__ = [
    "Attention",
    "AttentionTrace",
    "attend",
    "attention_probs",
    "attention_scores",
    "mix_values",
    "visible_keys",
]

QUERIES = 128
"""Queries at a time on a CPU: the scores of more do not stay in its cache, and take memory that the system has to clear
at every call."""


class AttentionTrace(NamedTuple):
    """What attention computed on its way."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    q_rot_BTNH: jax.Array
    k_rot_BTKH: jax.Array
    context_BTNH: jax.Array
    out_BTD: jax.Array


def visible_keys(
    config: MixtralConfig, shape_BT: tuple[int, int], mask_BT: jax.Array | None, position_BT: jax.Array | None
) -> jax.Array:
    """Say which keys each query may see.

    Args:
        config: gives the sliding window.
        shape_BT: batch and length.
        mask_BT: 1 on real tokens, 0 on padding; None where there is none.
        position_BT: positions; without a mask, one that is not its predecessor plus one starts a new packed sequence.

    Returns:
        [B, T, S] bool: keys up to the query, in its window, not padding, in its own packed sequence.

    Source: transformers 5.23, masking_utils.py, `create_causal_mask`, `create_sliding_window_causal_mask` and
        `find_packed_sequence_indices`.
    """
    B, T = shape_BT
    query_T1, key_1S = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    visible_TS = key_1S <= query_T1
    if config.sliding_window is not None:
        visible_TS &= key_1S > query_T1 - config.sliding_window
    visible_BTS = jnp.broadcast_to(visible_TS, (B, T, T))
    if mask_BT is not None:
        return visible_BTS & mask_BT.astype(bool)[:, None, :]
    if position_BT is not None:
        starts_BT = jnp.diff(position_BT, axis=1, prepend=position_BT[:, :1] - 1) != 1
        sequence_BT = jnp.cumsum(starts_BT, axis=1)
        return visible_BTS & (sequence_BT[:, :, None] == sequence_BT[:, None, :])
    return visible_BTS


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visible_BTS: jax.Array,
    *,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Mix the values by softmax of scaled scores; N/K neighbouring query heads share a key/value head.

    Args:
        q_BTNH: rotated queries.
        k_BSKH: rotated keys.
        v_BSKH: values.
        visible_BTS: bool; a query that sees no key takes the mean of all values, as in Hugging Face's eager attention.
        dropout: share of the probabilities set to 0 where key is given.
        key: PRNG key of training, None in inference.

    Returns:
        [B, T, N, H] in q's dtype. Softmax is in float32; scores and probabilities are rounded to q's dtype.

    Source: transformers 5.23, `eager_attention_forward`.
    """
    if key is not None and dropout > 0:
        probs_BNTS = attention_probs(attention_scores(q_BTNH, k_BSKH), visible_BTS)
        kept_BNTS = jax.random.bernoulli(key, 1 - dropout, probs_BNTS.shape)
        probs_BNTS = jnp.where(kept_BNTS, probs_BNTS / (1 - dropout), 0).astype(probs_BNTS.dtype)
        return mix_values(probs_BNTS, v_BSKH)

    def of_some(queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BRNH, visible_BRS = queries
        return mix_values(attention_probs(attention_scores(q_BRNH, k_BSKH), visible_BRS), v_BSKH)

    rows = (q_BTNH, visible_BTS)
    end = q_BTNH.shape[1] // QUERIES * QUERIES
    if end <= QUERIES or jax.default_backend() != "cpu":
        return of_some(rows)
    context_XBRNH: jax.Array = jax.lax.map(of_some, tuple(_in_blocks(x[:, :end]) for x in rows))
    context_BTNH = context_XBRNH.swapaxes(0, 1).reshape(-1, end, *q_BTNH.shape[2:])
    if end == q_BTNH.shape[1]:
        return context_BTNH
    return jnp.concatenate([context_BTNH, of_some((q_BTNH[:, end:], visible_BTS[:, end:]))], axis=1)


def _in_blocks(x_BTX: jax.Array) -> jax.Array:
    B, T = x_BTX.shape[:2]
    return x_BTX.reshape(B, T // QUERIES, QUERIES, *x_BTX.shape[2:]).swapaxes(0, 1)


def attention_scores(q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """Multiply every query with every key over sqrt(H): [B, N, T, S] in q's dtype."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BSKH.shape[2], k_BSKH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BNTS = project("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).reshape(B, N, T, S)
    wide = jnp.promote_types(scores_BNTS.dtype, jnp.float32)
    # Torch multiplies a bfloat16 array by a Python number in float32; 1/sqrt(H) itself is never rounded to bfloat16.
    return (scores_BNTS.astype(wide) * math.pow(H, -0.5)).astype(q_BTNH.dtype)


def attention_probs(scores_BNTS: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Normalise the visible scores in float32; the result has their dtype."""
    masked_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS, jnp.finfo(scores_BNTS.dtype).min)
    wide = jnp.promote_types(scores_BNTS.dtype, jnp.float32)
    return jax.nn.softmax(masked_BNTS.astype(wide), axis=-1).astype(scores_BNTS.dtype)


def mix_values(probs_BNTS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Average the values under each query's probabilities: [B, T, N, H] in their dtype."""
    B, N, T, S = probs_BNTS.shape
    K, H = v_BSKH.shape[2:]
    probs_BKGTS = probs_BNTS.reshape(B, K, N // K, T, S)
    return project("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH).reshape(B, T, N, H)


class Attention(nnx.Module):
    """Holds the query, key, value and output kernels of one block."""

    def __init__(self, config: MixtralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        std = config.initializer_range
        self.q = Projection((D, N, H), std=std, dtype=dtype, rngs=rngs)
        self.k = Projection((D, K, H), std=std, dtype=dtype, rngs=rngs)
        self.v = Projection((D, K, H), std=std, dtype=dtype, rngs=rngs)
        self.o = Projection((N, H, D), std=std, dtype=dtype, rngs=rngs)
        self.dropout = config.attention_dropout
        self.window = config.sliding_window

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: Rotary,
        visible_BTS: jax.Array,
        key: jax.Array | None = None,
        past: Past | None = None,
    ) -> AttentionTrace:
        """Attend within x, and to a cache's tokens; `out_BTD` is the result, the rest is how it came about."""
        q_BTNH = project("BTD,DNH->BTNH", x_BTD, self.q.kernel[...])
        k_BTKH = project("BTD,DKH->BTKH", x_BTD, self.k.kernel[...])
        v_BTKH = project("BTD,DKH->BTKH", x_BTD, self.v.kernel[...])
        q_rot_BTNH, k_rot_BTKH = rotate(q_BTNH, rotation), rotate(k_BTKH, rotation)
        k_BSKH, v_BSKH = k_rot_BTKH, v_BTKH
        if past is not None:
            k_BSKH = join(past.k_BSKH, k_rot_BTKH, past.length, self.window)
            v_BSKH = join(past.v_BSKH, v_BTKH, past.length, self.window)
        context_BTNH = attend(q_rot_BTNH, k_BSKH, v_BSKH, visible_BTS, dropout=self.dropout, key=key)
        out_BTD = project("BTNH,NHD->BTD", context_BTNH, self.o.kernel[...])
        return AttentionTrace(q_BTNH, k_BTKH, v_BTKH, q_rot_BTNH, k_rot_BTKH, context_BTNH, out_BTD)
