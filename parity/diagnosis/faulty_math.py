"""The operations as ports have had them wrong, in NumPy: what the hypotheses put in place of the oracle's.

Written without a look at any JAX code. Imports NumPy, SciPy and the oracle's operations.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from flax_mixtral.config import MixtralConfig
from parity.diagnosis.replay import to_bfloat16
from parity.oracle import operations as exact
from parity.oracle.activations import ACTIVATIONS
from parity.oracle.rope import inverse_frequencies
from parity.trace import Array, Batch

# --- norms and residuals --------------------------------------------------------------------------------------------


def norm_plus_one(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    """Scale by one plus the weight."""
    return exact.rms_norm(x_BTD, 1 + scale_D.astype(np.float64), eps)


def norm_cast_last(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    """Scale before the cast to bfloat16, which is then the only one."""
    return to_bfloat16(exact.rms_norm(x_BTD, scale_D, eps))


def norm_in_bfloat16(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    """Round every step: squares, mean, root, product."""
    mean_BT1 = to_bfloat16(np.mean(to_bfloat16(x_BTD * x_BTD), axis=-1, keepdims=True))
    inverse_BT1 = to_bfloat16(1 / np.sqrt(to_bfloat16(mean_BT1 + eps)))
    return to_bfloat16(to_bfloat16(x_BTD * inverse_BT1) * scale_D.astype(np.float64))


def norm_mean_in_bfloat16(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    """Round what the mean gives, and what follows, but not the squares."""
    inverse_BT1 = to_bfloat16(1 / np.sqrt(to_bfloat16(np.mean(x_BTD * x_BTD, axis=-1, keepdims=True)) + eps))
    return to_bfloat16(to_bfloat16(x_BTD * inverse_BT1) * scale_D.astype(np.float64))


def residual_from_normed(stream_BTD: Array, normed_BTD: Array, branch_BTD: Array) -> Array:
    """Add the branch to its own input."""
    return exact.add_residual(normed_BTD, normed_BTD, branch_BTD)


# --- rope and attention ---------------------------------------------------------------------------------------------


def rotate_neighbours(x_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
    """Pair lane 2p with lane 2p + 1."""
    pairs = x_BTNH.shape[-1] // 2
    cos_BT1P, sin_BT1P = cos_BTH[:, :, None, :pairs], sin_BTH[:, :, None, :pairs]
    rotated_BTNH = np.empty(x_BTNH.shape)
    even_BTNP, odd_BTNP = x_BTNH[..., 0::2], x_BTNH[..., 1::2]
    rotated_BTNH[..., 0::2] = even_BTNP * cos_BT1P - odd_BTNP * sin_BT1P
    rotated_BTNH[..., 1::2] = odd_BTNP * cos_BT1P + even_BTNP * sin_BT1P
    return rotated_BTNH


def rounded_frequencies(dtype: npt.DTypeLike) -> Callable[[MixtralConfig, int], tuple[Array, float]]:
    """Round the inverse frequencies."""

    def frequencies(config: MixtralConfig, length: int) -> tuple[Array, float]:
        frequencies_P, factor = inverse_frequencies(config, length)
        return frequencies_P.astype(dtype).astype(np.float64), factor

    return frequencies


def frequencies_of(head_dim: int) -> Callable[[MixtralConfig, int], tuple[Array, float]]:
    """Take the exponents of a head of another size."""

    def frequencies(config: MixtralConfig, length: int) -> tuple[Array, float]:
        powers_P = np.arange(0, config.head_dim, 2) / head_dim
        return np.asarray(np.float64(config.rope.rope_theta) ** -powers_P), 1.0

    return frequencies


def rounded_angles(frequencies_P: Array, factor: float, positions_BT: Array) -> tuple[Array, Array]:
    """Round the angles, position times frequency."""
    angles_BTP = to_bfloat16(positions_BT[..., None] * to_bfloat16(frequencies_P))
    angles_BTH = np.concatenate([angles_BTP, angles_BTP], axis=-1)
    return np.cos(angles_BTH) * factor, np.sin(angles_BTH) * factor


def indices(batch: Batch) -> Array:
    """Count from the left end of the row, padding or not."""
    return np.broadcast_to(np.arange(batch.input_ids.shape[1]), batch.input_ids.shape)


def shifted_positions(by: int) -> Callable[[Batch], Array]:
    """Count from another number."""
    return lambda batch: np.maximum(exact.position_ids(batch) + by, 0)


def every_key(batch: Batch, window: int | None) -> Array:
    """Show the future as well, but no padding."""
    B, T = batch.input_ids.shape
    return np.broadcast_to(batch.real_BT[:, None, :], (B, T, T))


def every_key_and_padding(batch: Batch, window: int | None) -> Array:
    """Hide nothing at all."""
    B, T = batch.input_ids.shape
    return np.ones((B, T, T), bool)


def windowed(window: int | None) -> Callable[[Batch, int | None], Array]:
    """Take another window than the configuration's."""
    return lambda batch, configured: exact.visible_keys(batch, window)


def softmax_of_minus_infinity(scores_BNTS: Array, visible_BTS: Array) -> Array:
    """Give a query that sees nothing zero over zero."""
    return exact.softmax(np.where(visible_BTS[:, None], scores_BNTS, -np.inf))


def softmax_in_bfloat16(scores_BNTS: Array, visible_BTS: Array) -> Array:
    """Round scores, differences, powers, their sum and the quotient."""
    powers_BNTS = to_bfloat16(_powers(scores_BNTS, visible_BTS))
    return to_bfloat16(powers_BNTS / to_bfloat16(powers_BNTS.sum(axis=-1, keepdims=True)))


def softmax_with_wide_sum(scores_BNTS: Array, visible_BTS: Array) -> Array:
    """Round all but the powers that are summed, as a compiler that accumulates wide does."""
    powers_BNTS = _powers(scores_BNTS, visible_BTS)
    return to_bfloat16(to_bfloat16(powers_BNTS) / to_bfloat16(powers_BNTS.sum(axis=-1, keepdims=True)))


def softmax_from_bfloat16(scores_BNTS: Array, visible_BTS: Array) -> Array:
    """Round the scores and the weights, with a wide softmax between them."""
    return to_bfloat16(exact.attention_softmax(to_bfloat16(scores_BNTS), visible_BTS))


def _masked(scores_BNTS: Array, visible_BTS: Array) -> Array:
    blind_BT = np.logical_not(visible_BTS.any(axis=-1))
    return np.where(blind_BT[:, None, :, None], 0, np.where(visible_BTS[:, None], scores_BNTS, -np.inf))


def _powers(scores_BNTS: Array, visible_BTS: Array) -> Array:
    masked_BNTS = _masked(to_bfloat16(scores_BNTS), visible_BTS)
    powers_BNTS: Array = np.exp(to_bfloat16(masked_BNTS - masked_BNTS.max(axis=-1, keepdims=True)))
    return powers_BNTS


def tile_heads(x_BSKH: Array, heads: int) -> Array:
    """Give query head n the key/value head n mod K."""
    return np.concatenate([x_BSKH] * (heads // x_BSKH.shape[2]), axis=2)


def scaled_by(scale: float) -> Callable[[Array, Array], Array]:
    """Multiply the scores by another constant."""
    return lambda q_BTNH, k_BSNH: np.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, optimize=True) * scale


# --- mixture of experts ---------------------------------------------------------------------------------------------


def weigh_not_renormalised(logits_ME: Array, probs_ME: Array, ids_MA: Array) -> Array:
    """Take the probabilities as they are."""
    return np.take_along_axis(probs_ME, ids_MA, axis=-1)


def weigh_raw_logits(logits_ME: Array, probs_ME: Array, ids_MA: Array) -> Array:
    """Take the logits."""
    return np.take_along_axis(logits_ME, ids_MA, axis=-1)


def weigh_logit_share(logits_ME: Array, probs_ME: Array, ids_MA: Array) -> Array:
    """Take each logit's share in their sum."""
    chosen_MA = np.take_along_axis(logits_ME, ids_MA, axis=-1)
    return np.asarray(chosen_MA / chosen_MA.sum(axis=-1, keepdims=True))


def weigh_rounded(logits_ME: Array, probs_ME: Array, ids_MA: Array) -> Array:
    """Renormalise probabilities that were rounded to bfloat16."""
    return exact.weigh(logits_ME, to_bfloat16(probs_ME), ids_MA)


def weigh_reversed(logits_ME: Array, probs_ME: Array, ids_MA: Array) -> Array:
    """Attach the weights in the opposite order."""
    return exact.weigh(logits_ME, probs_ME, ids_MA)[:, ::-1]


def weigh_rolled(logits_ME: Array, probs_ME: Array, ids_MA: Array) -> Array:
    """Attach each weight to the next expert."""
    return np.roll(exact.weigh(logits_ME, probs_ME, ids_MA), 1, axis=-1)


def weigh_falling(logits_ME: Array, probs_ME: Array, ids_MA: Array) -> Array:
    """Leave the weights in falling order while the ids are sorted."""
    rising_MA: Array = np.sort(exact.weigh(logits_ME, probs_ME, ids_MA), axis=-1)
    falling_MA: Array = rising_MA[:, ::-1]
    return falling_MA


def choose_highest(probs_ME: Array, count: int) -> Array:
    """Let the highest index win among ties."""
    experts = probs_ME.shape[-1]
    ids_MA: Array = experts - 1 - exact.choose(probs_ME[:, ::-1], count)
    return ids_MA


def choose_rounded(probs_ME: Array, count: int) -> Array:
    """Choose by probabilities that were rounded to bfloat16."""
    return exact.choose(to_bfloat16(probs_ME), count)


Dispatch = Callable[[Array, Array, Array, int], tuple[Array, Array, Array]]


def dispatch_weighted_input(x_MD: Array, ids_MA: Array, weights_MA: Array, expert: int) -> tuple[Array, Array, Array]:
    """Scale the expert's input, and its output no more."""
    rows_R, x_RD, weights_R = exact.dispatch(x_MD, ids_MA, weights_MA, expert)
    return rows_R, x_RD * weights_R[:, None], np.ones_like(weights_R)


def dispatch_weighted_twice(x_MD: Array, ids_MA: Array, weights_MA: Array, expert: int) -> tuple[Array, Array, Array]:
    """Scale the expert's input, and its output again."""
    rows_R, x_RD, weights_R = exact.dispatch(x_MD, ids_MA, weights_MA, expert)
    return rows_R, x_RD * weights_R[:, None], weights_R


def dispatch_other_weight(turn: Callable[[Array], Array]) -> Dispatch:
    """Give an expert the weight of another one of the token."""
    return lambda x_MD, ids_MA, weights_MA, expert: exact.dispatch(x_MD, ids_MA, turn(weights_MA), expert)


def dispatch_without(dropped_ME: Array) -> Dispatch:
    """Leave out some tokens of some experts."""

    def dispatch(x_MD: Array, ids_MA: Array, weights_MA: Array, expert: int) -> tuple[Array, Array, Array]:
        rows_R, x_RD, weights_R = exact.dispatch(x_MD, ids_MA, weights_MA, expert)
        kept_R = np.logical_not(dropped_ME[rows_R, expert])
        return rows_R[kept_R], x_RD[kept_R], weights_R[kept_R]

    return dispatch


def combine_in_bfloat16(sum_MD: Array, rows_R: Array, weights_R: Array, down_RD: Array) -> Array:
    """Round weights, weighted outputs and the running sum."""
    return to_bfloat16(exact.combine(sum_MD, rows_R, np.ones(len(rows_R)), _weighted(weights_R, down_RD)))


def _weighted(weights_R: Array, down_RD: Array) -> Array:
    return to_bfloat16(to_bfloat16(weights_R)[:, None] * to_bfloat16(down_RD))


def combine_rounded_products(sum_MD: Array, rows_R: Array, weights_R: Array, down_RD: Array) -> Array:
    """Round weighted outputs and the running sum; the weights are wide."""
    product_RD = to_bfloat16(weights_R[:, None] * down_RD)
    return to_bfloat16(exact.combine(sum_MD, rows_R, np.ones(len(rows_R)), product_RD))


def combine_rounded_sum(sum_MD: Array, rows_R: Array, weights_R: Array, down_RD: Array) -> Array:
    """Round the running sum only."""
    return to_bfloat16(exact.combine(sum_MD, rows_R, weights_R, down_RD))


def combine_rounded_weights(sum_MD: Array, rows_R: Array, weights_R: Array, down_RD: Array) -> Array:
    """Round the weights only."""
    return exact.combine(sum_MD, rows_R, to_bfloat16(weights_R), down_RD)


def activated_by(name: str) -> Callable[[str, Array], Array]:
    """Apply another activation than the configured one."""
    return lambda configured, gate_RF: ACTIVATIONS[name](gate_RF)


# --- matrix products ------------------------------------------------------------------------------------------------

Rounding = Callable[[Array], Array]


def to_tf32(x: Array) -> Array:
    """Keep ten bits of the mantissa, as the matrix units of some accelerators do."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def project_rounded(cast: Rounding) -> Callable[[Array, Array], Array]:
    """Round both factors, accumulate wide."""
    return lambda x, kernel: exact.project(cast(x), cast(kernel.astype(np.float64)))


def project_in_bfloat16(x: Array, kernel: Array) -> Array:
    """Round both factors and the product."""
    return to_bfloat16(project_rounded(to_bfloat16)(x, kernel))


def scores_rounded(cast: Rounding) -> Callable[[Array, Array], Array]:
    """Round queries and keys."""
    return lambda q_BTNH, k_BSNH: exact.attention_scores(cast(q_BTNH), cast(k_BSNH))


def mix_rounded(cast: Rounding) -> Callable[[Array, Array], Array]:
    """Round attention weights and values."""
    return lambda weights_BNTS, v_BSNH: exact.mix_values(cast(weights_BNTS), cast(v_BSNH))


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
