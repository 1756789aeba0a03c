"""Rotary position embedding: inverse frequencies of every rope type, and the rotation.

Frequencies that depend on the configuration alone are computed in float64 and rounded once; only `dynamic` and
`longrope` look at the positions, and do so with traced arithmetic, so that one compiled model serves all lengths.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from flax_mixtral.config import MixtralConfig
from flax_mixtral.rope_config import RopeConfig

__all__ = ["Rotary", "rotary", "rotate"]

Frequencies = npt.NDArray[np.float64]


class Rotary(NamedTuple):
    """Cosine and sine of every token's angles, both halves of a head alike."""

    cos_BTH: jax.Array
    sin_BTH: jax.Array


def rotary(config: MixtralConfig, position_BT: jax.Array, dtype: jnp.dtype) -> Rotary:
    """Turn positions into rotations.

    Args:
        config: gives head_dim and the rope parameters.
        position_BT: int positions; their largest decides what `dynamic` and `longrope` do.
        dtype: the model's.

    Returns:
        Cosine and sine, computed in float32, times the attention factor, cast to dtype.

    With a cache each call's own positions decide, and keys in the cache keep the rotation they were written with: past
    the length where `dynamic` or `longrope` stretches, prefill and decode differ from one forward of all tokens, here
    as in transformers.

    Source: transformers 5.23, `MixtralRotaryEmbedding.forward` with a fresh module: there, `dynamic` keeps the
        frequencies of the longest input seen since; here each call stands alone.
    """
    inv_freq_P, attention_factor = inverse_frequencies(config, jnp.max(position_BT) + 1)
    angle_BTP = position_BT[..., None].astype(jnp.float32) * inv_freq_P
    angle_BTH = jnp.concatenate([angle_BTP, angle_BTP], axis=-1)
    cos_BTH = jnp.cos(angle_BTH) * attention_factor
    sin_BTH = jnp.sin(angle_BTH) * attention_factor
    return Rotary(cos_BTH.astype(dtype), sin_BTH.astype(dtype))


def rotate(x_BTNH: jax.Array, rotation: Rotary) -> jax.Array:
    """Rotate each head's pairs; a pair is lanes p and p + H/2.

    Args:
        x_BTNH: queries or keys.
        rotation: from `rotary`.

    Returns:
        The rotated heads in x's dtype.

    Source: transformers 5.23, `apply_rotary_pos_emb`.
    """
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    turned_BTNH = jnp.concatenate([-second, first], axis=-1)
    return x_BTNH * rotation.cos_BTH[:, :, None, :] + turned_BTNH * rotation.sin_BTH[:, :, None, :]


def inverse_frequencies(config: MixtralConfig, length: jax.Array) -> tuple[jax.Array, float]:
    """Compute the angle per position of each rotary pair.

    Args:
        config: gives head_dim and the rope parameters.
        length: scalar, the largest position plus one; used by `dynamic` and `longrope` only.

    Returns:
        [P] float32, and the factor on cos and sin.

    Source: transformers 5.23, modeling_rope_utils.py, `ROPE_INIT_FUNCTIONS` and `dynamic_rope_update`.
    """
    rope, head_dim = config.rope, config.head_dim
    plain_P = _plain(rope.rope_theta, head_dim)
    match rope.rope_type:
        case "default":
            return _rounded(plain_P), 1.0
        case "linear":
            return _rounded(plain_P / _given(rope.factor)), 1.0
        case "proportional":
            return _rounded(_proportional(rope, plain_P)), 1.0
        case "llama3":
            return _rounded(_llama3(rope, plain_P)), 1.0
        case "yarn":
            return _rounded(_yarn(rope, plain_P, head_dim)), _yarn_attention_factor(rope)
        case "dynamic":
            return _dynamic(config, plain_P, length), 1.0
        case "longrope":
            short_P = _rounded(plain_P / np.asarray(rope.short_factor))
            long_P = _rounded(plain_P / np.asarray(rope.long_factor))
            beyond = length > _given(rope.original_max_position_embeddings)
            return jnp.where(beyond, long_P, short_P), _longrope_attention_factor(config)
    raise AssertionError(f"rope_type {rope.rope_type!r} is in ROPE_TYPES but has no formula")


def _plain(theta: float, head_dim: int) -> Frequencies:
    frequencies_P: Frequencies = np.float64(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return frequencies_P


def _proportional(rope: RopeConfig, plain_P: Frequencies) -> Frequencies:
    """Turn only the first pairs; the rest stand still."""
    turning = int((rope.partial_rotary_factor or 1.0) * 2 * len(plain_P) // 2)
    kept_P: Frequencies = np.where(np.arange(len(plain_P)) < turning, plain_P, 0.0)
    return kept_P / np.float64(rope.factor or 1.0)


def _llama3(rope: RopeConfig, plain_P: Frequencies) -> Frequencies:
    """Slow the long waves by `factor`, leave the short ones, and blend between."""
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    turns_P = _given(rope.original_max_position_embeddings) * plain_P / (2 * math.pi)
    keep_P = np.clip((turns_P - low) / (high - low), 0.0, 1.0)
    return (1 - keep_P) * plain_P / _given(rope.factor) + keep_P * plain_P


def _yarn(rope: RopeConfig, plain_P: Frequencies, head_dim: int) -> Frequencies:
    """Slow the pairs that turn less than beta_slow times over the original length, keep those above beta_fast."""

    def pair_that_turns(times: float) -> float:
        wavelengths = _given(rope.original_max_position_embeddings) / (times * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.rope_theta))

    first, last = pair_that_turns(rope.beta_fast or 32), pair_that_turns(rope.beta_slow or 1)
    if rope.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    slowed_P: Frequencies = np.clip((np.arange(len(plain_P)) - first) / (last - first), 0.0, 1.0)
    return slowed_P * plain_P / _given(rope.factor) + (1 - slowed_P) * plain_P


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def grown(by: float) -> float:
        factor = _given(rope.factor)
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)


def _longrope_attention_factor(config: MixtralConfig) -> float:
    rope = config.rope
    original = _given(rope.original_max_position_embeddings)
    factor = rope.factor or config.max_position_embeddings / original
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _dynamic(config: MixtralConfig, plain_P: Frequencies, length: jax.Array) -> jax.Array:
    """Raise the base as the input outgrows max_position_embeddings.

    theta**-x * stretch**-x rather than (theta * stretch)**-x: the first factor is exact to float32, and the second has
    a small logarithm, so that little is lost.
    """
    factor, dim = _given(config.rope.factor), config.head_dim
    ratio = jnp.maximum(length, config.max_position_embeddings) / config.max_position_embeddings
    log_stretch = jnp.log(factor * ratio - (factor - 1)) * (dim / (dim - 2))
    return _rounded(plain_P) * jnp.exp(-log_stretch * _rounded(np.arange(0, dim, 2) / dim))


def _rounded(frequencies_P: Frequencies) -> jax.Array:
    return jnp.asarray(frequencies_P, jnp.float32)


def _given(value: float | None) -> float:
    assert value is not None, "read_rope has checked that the rope type's parameters are there"
    return value
