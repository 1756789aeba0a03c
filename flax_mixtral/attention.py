"""Grouped-query attention: the mask, the mixing of values, and the module that holds the four kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mixtral.config import MixtralConfig
from flax_mixtral.projection import Projection, project
from flax_mixtral.rope import Rotary, rotate

__all__ = ["Attention", "AttentionTrace", "attend", "visible_keys"]


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
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    dtype = q_BTNH.dtype
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = project("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * jnp.asarray(H**-0.5, dtype)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(dtype).min)
    wide = jnp.promote_types(dtype, jnp.float32)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS.astype(wide), axis=-1).astype(dtype)
    if key is not None and dropout > 0:
        kept = jax.random.bernoulli(key, 1 - dropout, probs_BKGTS.shape)
        probs_BKGTS = jnp.where(kept, probs_BKGTS / (1 - dropout), 0).astype(dtype)
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

    def __call__(
        self, x_BTD: jax.Array, rotation: Rotary, visible_BTS: jax.Array, key: jax.Array | None = None
    ) -> AttentionTrace:
        """Attend within x; `out_BTD` is the result, the rest is how it came about."""
        q_BTNH = project("BTD,DNH->BTNH", x_BTD, self.q.kernel[...])
        k_BTKH = project("BTD,DKH->BTKH", x_BTD, self.k.kernel[...])
        v_BTKH = project("BTD,DKH->BTKH", x_BTD, self.v.kernel[...])
        q_rot_BTNH, k_rot_BTKH = rotate(q_BTNH, rotation), rotate(k_BTKH, rotation)
        context_BTNH = attend(q_rot_BTNH, k_rot_BTKH, v_BTKH, visible_BTS, dropout=self.dropout, key=key)
        out_BTD = project("BTNH,NHD->BTD", context_BTNH, self.o.kernel[...])
        return AttentionTrace(q_BTNH, k_BTKH, v_BTKH, q_rot_BTNH, k_rot_BTKH, context_BTNH, out_BTD)
