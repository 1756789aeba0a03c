"""Rotary embedding of the oracle: inverse frequencies of every rope type, tables and rotation, in float64.

Written from transformers' formulas. Imports NumPy and flax_mixtral's neutral modules only.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.trace import Array

__all__ = ["inverse_frequencies", "rope_tables", "rotate_half"]

Parameter = TypeVar("Parameter")


def inverse_frequencies(config: MixtralConfig, length: int) -> tuple[Array, float]:
    """Give the angle that each rotary pair turns per position.

    Args:
        config: its `rope` chooses the type.
        length: the largest position of the whole batch, plus one; dynamic and longrope stretch beyond a length.

    Returns:
        Frequencies [P] float64, and the factor that multiplies cos and sin.

    Source: transformers 5.23, modeling_rope_utils.py, `ROPE_INIT_FUNCTIONS` and `dynamic_rope_update` (of a fresh
        module: the one there remembers the longest batch that it saw).
    """
    return _FREQUENCIES[config.rope.rope_type](config, length)


def rope_tables(frequencies_P: Array, factor: float, positions_BT: Array) -> tuple[Array, Array]:
    """Compute cos and sin of every angle, each frequency in both halves of the head.

    Returns:
        cos and sin, [B, T, H] float64.

    Source: transformers 5.23, modeling_mixtral.py, `MixtralRotaryEmbedding.forward`.
    """
    angles_BTP = positions_BT[..., None].astype(np.float64) * frequencies_P
    angles_BTH = np.concatenate([angles_BTP, angles_BTP], axis=-1)
    return np.cos(angles_BTH) * factor, np.sin(angles_BTH) * factor


def rotate_half(x_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
    """Turn lane p of each head together with lane p + H/2.

    Args:
        x_BTNH: queries, or keys with K heads.
        cos_BTH: as `rope_tables` gives it; sin_BTH likewise.

    Source: transformers 5.23, modeling_mixtral.py, `apply_rotary_pos_emb`.
    """
    low_BTNP, high_BTNP = np.split(x_BTNH, 2, axis=-1)
    turned_BTNH = np.concatenate([-high_BTNP, low_BTNP], axis=-1)
    rotated_BTNH: Array = x_BTNH * cos_BTH[:, :, None] + turned_BTNH * sin_BTH[:, :, None]
    return rotated_BTNH


def _radian_lengths(theta: float, head_dim: int) -> Array:
    """Give theta^(2p/H): the positions that each pair needs for one radian, [P]."""
    exponents_P = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return np.float64(theta) ** exponents_P


def _default(config: MixtralConfig, length: int) -> tuple[Array, float]:
    return 1 / _radian_lengths(config.rope.rope_theta, config.head_dim), 1.0


def _linear(config: MixtralConfig, length: int) -> tuple[Array, float]:
    return 1 / _radian_lengths(config.rope.rope_theta, config.head_dim) / _needed(config.rope.factor), 1.0


def _proportional(config: MixtralConfig, length: int) -> tuple[Array, float]:
    """Turn the first share of the pairs only; exponents are still relative to the whole head."""
    share = 1.0 if config.rope.partial_rotary_factor is None else config.rope.partial_rotary_factor
    turning = int(share * config.head_dim // 2)
    frequencies_P = 1 / _radian_lengths(config.rope.rope_theta, config.head_dim)
    frequencies_P[turning:] = 0
    return frequencies_P / (config.rope.factor or 1.0), 1.0


def _dynamic(config: MixtralConfig, length: int) -> tuple[Array, float]:
    """Raise theta with the length beyond max_position_embeddings (NTK-aware scaling)."""
    factor, trained = _needed(config.rope.factor), config.max_position_embeddings
    stretch = factor * max(length, trained) / trained - (factor - 1)
    theta = config.rope.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))
    return 1 / _radian_lengths(theta, config.head_dim), 1.0


def _yarn(config: MixtralConfig, length: int) -> tuple[Array, float]:
    """Slow the slow pairs by `factor`, leave the fast ones, blend between two pair numbers."""
    rope, H = config.rope, config.head_dim
    factor, trained = _needed(rope.factor), _needed(rope.original_max_position_embeddings)

    def pair_that_turns(times: float) -> float:
        return H * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low = pair_that_turns(rope.beta_fast or 32)
    high = pair_that_turns(rope.beta_slow or 1)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    if low == high:
        high += 0.001
    slowed_P = np.clip((np.arange(H // 2) - low) / (high - low), 0, 1)
    frequencies_P = 1 / _radian_lengths(rope.rope_theta, H)
    return frequencies_P / factor * slowed_P + frequencies_P * (1 - slowed_P), _yarn_attention_factor(config)


def _yarn_attention_factor(config: MixtralConfig) -> float:
    rope = config.rope

    def mscale(weight: float) -> float:
        factor = _needed(rope.factor)
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _longrope(config: MixtralConfig, length: int) -> tuple[Array, float]:
    """Divide each frequency by its own factor, from one list up to the trained length and from another beyond."""
    rope, trained = config.rope, _needed(config.rope.original_max_position_embeddings)
    divisors = _needed(rope.long_factor if length > trained else rope.short_factor)
    frequencies_P = 1 / (np.asarray(divisors, np.float64) * _radian_lengths(rope.rope_theta, config.head_dim))
    factor = config.max_position_embeddings / trained if rope.factor is None else rope.factor
    if rope.attention_factor is not None:
        return frequencies_P, rope.attention_factor
    return frequencies_P, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


def _llama3(config: MixtralConfig, length: int) -> tuple[Array, float]:
    """Slow the pairs whose wavelength is long against the trained length, blend those between two bounds."""
    rope, trained = config.rope, _needed(config.rope.original_max_position_embeddings)
    factor, low, high = _needed(rope.factor), _needed(rope.low_freq_factor), _needed(rope.high_freq_factor)
    frequencies_P = 1 / _radian_lengths(rope.rope_theta, config.head_dim)
    turns_P = trained * frequencies_P / (2 * math.pi)
    slow_P, fast_P = turns_P < low, turns_P > high
    with np.errstate(divide="ignore", invalid="ignore"):  # with equal bounds no pair lies between them
        kept_P = (turns_P - low) / (np.float64(high) - low)
    blended_P = (1 - kept_P) * frequencies_P / factor + kept_P * frequencies_P
    return np.where(slow_P, frequencies_P / factor, np.where(fast_P, frequencies_P, blended_P)), 1.0


def _needed(value: Parameter | None) -> Parameter:
    """Narrow the type: `read_rope` refuses a rope type without its required parameters."""
    assert value is not None
    return value


_FREQUENCIES: dict[str, Callable[[MixtralConfig, int], tuple[Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
