"""The operations of the oracle's block: small functions of arrays, each computing in the dtype of its input.

Written from the Mixtral paper and Hugging Face's semantics. Imports NumPy only.
"""

import numpy as np

from parity.trace import Array, Batch

__all__ = [
    "add_residual",
    "attention_scores",
    "attention_softmax",
    "choose",
    "combine",
    "dispatch",
    "gate_times_up",
    "mix_values",
    "position_ids",
    "project",
    "repeat_heads",
    "rms_norm",
    "softmax",
    "visible_keys",
    "weigh",
]


def rms_norm(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    """Divide each token by its root mean square and scale each channel.

    Source: transformers 5.23, modeling_mixtral.py, `MixtralRMSNorm`.
    """
    mean_square_BT1 = np.mean(x_BTD * x_BTD, axis=-1, keepdims=True)
    scaled_BTD: Array = scale_D.astype(x_BTD.dtype) * (x_BTD / np.sqrt(mean_square_BT1 + eps))
    return scaled_BTD


CHUNK = 1 << 20
"""Weights that are held in float64 at a time: 8 MB."""


def project(x: Array, kernel: Array) -> Array:
    """Apply a linear layer.

    Args:
        x: [..., in].
        kernel: [out, in], any float dtype; converted to x's here, some rows at a time.

    Returns:
        [..., out].
    """
    flat, outputs = x.reshape(-1, x.shape[-1]), len(kernel)
    projected = np.empty((len(flat), outputs), x.dtype)
    step = max(1, CHUNK // max(1, kernel.shape[1]))
    wide = np.empty((min(step, outputs), kernel.shape[1]), x.dtype)  # one for all: touching new memory is slow
    for start in range(0, outputs, step):
        rows = wide[: outputs - start]
        rows[...] = kernel[start : start + step]
        projected[:, start : start + step] = flat @ rows.T
    return projected.reshape(*x.shape[:-1], outputs)


def add_residual(stream_BTD: Array, normed_BTD: Array, branch_BTD: Array) -> Array:
    """Add a branch to the stream that it was computed from (`normed_BTD` is what the branch was given)."""
    sum_BTD: Array = stream_BTD + branch_BTD
    return sum_BTD


def position_ids(batch: Batch) -> Array:
    """Give each token's position, [B, T]: 0..T-1 unless the batch says otherwise, padding or not."""
    if batch.position_ids is not None:
        return batch.position_ids
    return np.broadcast_to(np.arange(batch.input_ids.shape[1]), batch.input_ids.shape)


def visible_keys(batch: Batch, window: int | None) -> Array:
    """Say which keys each query may see.

    Args:
        batch: an attention mask hides padding; without one, positions that do not go up by one start a new packed
            sequence, which sees itself only.
        window: sliding_window; counts indices, not positions.

    Returns:
        [B, T, S] bool.

    Source: transformers 5.23, masking_utils.py, `create_causal_mask`, `create_sliding_window_causal_mask`,
        `find_packed_sequence_indices`.
    """
    B, T = batch.input_ids.shape
    query_T1, key_1S = np.arange(T)[:, None], np.arange(T)[None, :]
    seen_TS = key_1S <= query_T1
    if window is not None:
        seen_TS = seen_TS & (key_1S > query_T1 - window)
    if batch.attention_mask is not None:
        real_B1S: Array = batch.attention_mask[:, None, :] != 0
        return real_B1S & seen_TS
    if batch.position_ids is None:
        return np.broadcast_to(seen_TS, (B, T, T))
    steps_BT = np.diff(batch.position_ids, axis=1, prepend=batch.position_ids[:, :1] - 1)
    sequence_BT = np.cumsum(steps_BT != 1, axis=1)
    same_BTS: Array = sequence_BT[:, :, None] == sequence_BT[:, None, :]
    return same_BTS & seen_TS


def repeat_heads(x_BSKH: Array, heads: int) -> Array:
    """Give each key/value head to N/K neighbouring query heads: [B, S, N, H]."""
    repeated_BSNH: Array = np.repeat(x_BSKH, heads // x_BSKH.shape[2], axis=2)
    return repeated_BSNH


def attention_scores(q_BTNH: Array, k_BSNH: Array) -> Array:
    """Multiply every query with every key, over sqrt(H): [B, N, T, S]."""
    products_BNTS: Array = q_BTNH.transpose(0, 2, 1, 3) @ k_BSNH.transpose(0, 2, 3, 1)
    products_BNTS *= q_BTNH.shape[-1] ** -0.5
    return products_BNTS


def attention_softmax(scores_BNTS: Array, visible_BTS: Array) -> Array:
    """Turn scores into weights; a query that sees nothing (padding) attends to every key alike.

    Source: transformers 5.23, masking_utils.py, `eager_mask`: hidden keys get the dtype's lowest number, which
        swallows the score, so that such a row becomes uniform.
    """
    masked_BNTS = np.where(visible_BTS[:, None], scores_BNTS, -np.inf)
    blind_BT = np.logical_not(visible_BTS.any(axis=-1))
    return softmax(np.where(blind_BT[:, None, :, None], 0, masked_BNTS))


def mix_values(weights_BNTS: Array, v_BSNH: Array) -> Array:
    """Average the values under each query's weights: [B, T, N, H]."""
    mixed_BNTH: Array = weights_BNTS @ v_BSNH.transpose(0, 2, 1, 3)
    return mixed_BNTH.transpose(0, 2, 1, 3)


def softmax(x: Array) -> Array:
    """Normalise exp(x) over the last axis."""
    powers: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def choose(probs_ME: Array, count: int) -> Array:
    """Take the most probable experts of each token, [M, A], in falling order; the lowest index first among ties."""
    return np.argsort(-probs_ME, axis=-1, kind="stable")[:, :count]


def weigh(logits_ME: Array, probs_ME: Array, ids_MA: Array) -> Array:
    """Weigh the chosen experts, [M, A]: their probabilities over all experts, renormalised to sum one."""
    chosen_MA: Array = np.take_along_axis(probs_ME, ids_MA, axis=-1)
    chosen_MA /= chosen_MA.sum(axis=-1, keepdims=True)
    return chosen_MA


def dispatch(x_MD: Array, ids_MA: Array, weights_MA: Array, expert: int) -> tuple[Array, Array, Array]:
    """Gather what one expert works on.

    Returns:
        Its tokens as ascending indices into M [R], their states [R, D] and their routing weights [R].
    """
    rows_R, slots_R = np.nonzero(ids_MA == expert)
    return rows_R, x_MD[rows_R], weights_MA[rows_R, slots_R]


def gate_times_up(gate_RF: Array, up_RF: Array) -> Array:
    """Let the activated gate scale the up projection (SwiGLU's product)."""
    product_RF: Array = gate_RF * up_RF
    return product_RF


def combine(sum_MD: Array, rows_R: Array, weights_R: Array, down_RD: Array) -> Array:
    """Add one expert's weighted outputs to the sum of those before it."""
    total_MD = sum_MD.copy()
    total_MD[rows_R] += weights_R[:, None] * down_RD
    return total_MD
