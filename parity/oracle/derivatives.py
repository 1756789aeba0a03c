"""The backward step of each operation of the oracle's block.

What flows in is the gradient of the loss with respect to an operation's output, what flows out that of its inputs.
Written from the mathematics of `operations`, in the same order. Imports NumPy, SciPy and parity's own only.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import erfc, expit  # type: ignore[import-untyped]  # SciPy ships no types

from parity.oracle.activations import LAPLACE_DEVIATION, LAPLACE_MEAN, SQRT_2_OVER_PI, softplus
from parity.trace import Array

__all__ = [
    "ACTIVATION_SLOPES",
    "attention_backward",
    "cross_entropy_backward",
    "load_balancing_backward",
    "project_backward",
    "rms_norm_backward",
    "rotate_half_backward",
    "softmax_backward",
    "sum_repeated_heads",
]


def rms_norm_backward(grad_BTD: Array, x_BTD: Array, scale_D: Array, eps: float) -> tuple[Array, Array]:
    """Give the gradients of the input [B, T, D] and of the scale [D]."""
    inverse_BT1 = 1 / np.sqrt(np.mean(x_BTD * x_BTD, axis=-1, keepdims=True) + eps)
    unit_BTD = x_BTD * inverse_BT1
    scaled_BTD = grad_BTD * scale_D.astype(x_BTD.dtype)
    along_BT1 = np.mean(scaled_BTD * unit_BTD, axis=-1, keepdims=True)
    return inverse_BT1 * (scaled_BTD - unit_BTD * along_BT1), (grad_BTD * unit_BTD).sum(axis=(0, 1))


def project_backward(grad: Array, x: Array, kernel: Array) -> tuple[Array, Array]:
    """Give the gradients of the input and of the kernel.

    Args:
        grad: [..., out].
        x: [..., in].
        kernel: [out, in], any float dtype.

    Returns:
        [..., in] and [out, in].
    """
    grad_x: Array = grad @ kernel.astype(grad.dtype)
    grad_kernel: Array = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return grad_x, grad_kernel


def rotate_half_backward(grad_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
    """Turn each pair of lanes back: the rotation's transpose."""
    low_BTNP, high_BTNP = np.split(grad_BTNH * sin_BTH[:, :, None], 2, axis=-1)
    back_BTNH: Array = grad_BTNH * cos_BTH[:, :, None] + np.concatenate([high_BTNP, -low_BTNP], axis=-1)
    return back_BTNH


def sum_repeated_heads(grad_BSNH: Array, heads: int) -> Array:
    """Add what the neighbouring query heads give to their one key/value head: [B, S, K, H] with K = heads."""
    B, S, N, H = grad_BSNH.shape
    summed_BSKH: Array = grad_BSNH.reshape(B, S, heads, N // heads, H).sum(axis=3)
    return summed_BSKH


def softmax_backward(grad: Array, weights: Array) -> Array:
    """Give the gradient of the logits; `weights` is the softmax over the last axis."""
    pulled: Array = weights * (grad - (grad * weights).sum(axis=-1, keepdims=True))
    return pulled


def attention_backward(
    grad_BTNH: Array, weights_BNTS: Array, q_BTNH: Array, k_BSNH: Array, v_BSNH: Array, visible_BTS: Array
) -> tuple[Array, Array, Array]:
    """Give the gradients of rotated queries, rotated keys and values, all with N heads; hidden keys have none."""
    grad_BNTH = grad_BTNH.transpose(0, 2, 1, 3)
    grad_weights_BNTS = grad_BNTH @ v_BSNH.transpose(0, 2, 3, 1)
    scores_BNTS = softmax_backward(grad_weights_BNTS, weights_BNTS) * q_BTNH.shape[-1] ** -0.5
    scores_BNTS = np.where(visible_BTS[:, None], scores_BNTS, 0)
    grad_q_BNTH = scores_BNTS @ k_BSNH.transpose(0, 2, 1, 3)
    grad_k_BNSH = scores_BNTS.swapaxes(2, 3) @ q_BTNH.transpose(0, 2, 1, 3)
    grad_v_BNSH = weights_BNTS.swapaxes(2, 3) @ grad_BNTH
    return grad_q_BNTH.transpose(0, 2, 1, 3), grad_k_BNSH.transpose(0, 2, 1, 3), grad_v_BNSH.transpose(0, 2, 1, 3)


def cross_entropy_backward(probs_XV: Array, targets_X: Array) -> Array:
    """Give the gradient of the mean cross entropy with respect to the logits [X, V]."""
    grad_XV = probs_XV.copy()
    grad_XV[np.arange(len(targets_X)), targets_X] -= 1
    grad_XV /= len(targets_X)
    return grad_XV


def load_balancing_backward(probs_ME: Array, share_E: Array, real_M: Array, tokens: int) -> Array:
    """Give the gradient of the load-balancing loss with respect to one layer's router logits [M, E].

    The loss is E * sum over experts of share * mean probability; the share is a count and has no gradient.

    Args:
        probs_ME: the layer's router probabilities.
        share_E: the share of tokens routed to each expert, over all layers.
        real_M: bool; padding is not counted.
        tokens: real tokens times layers, which the mean is taken over.
    """
    slope_ME = np.broadcast_to(len(share_E) * share_E / tokens, probs_ME.shape)
    return np.where(real_M[:, None], softmax_backward(slope_ME, probs_ME), 0)


# --- activations ----------------------------------------------------------------------------------------------------


def _normal_density(x: Array, mean: float = 0.0, deviation: float = 1.0) -> Array:
    density: Array = np.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi))
    return density


def _gelu(x: Array) -> Array:
    grown: Array = 0.5 * erfc(-x / 2**0.5) + x * _normal_density(x)
    return grown


def _gelu_tanh(x: Array, slope: float = float(SQRT_2_OVER_PI)) -> Array:
    gate = expit(2 * slope * (x + 0.044715 * x**3))
    grown: Array = gate + x * gate * (1 - gate) * 2 * slope * (1 + 3 * 0.044715 * x**2)
    return grown


def _silu(x: Array, slope: float = 1.0) -> Array:
    gate = expit(slope * x)
    grown: Array = gate * (1 + slope * x * (1 - gate))
    return grown


def _mish(x: Array) -> Array:
    gate = np.tanh(softplus(x))
    grown: Array = gate + x * (1 - gate**2) * expit(x)
    return grown


def _gelu_10(x: Array) -> Array:
    return np.where(x < 10, _gelu(x), 0)  # gelu is within 2e-22 of x there, and never below -10


ACTIVATION_SLOPES: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": lambda x: _gelu_tanh(x, 0.7978845608),
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: np.where(x < -3, 0, np.where(x > 3, 1, (2 * x + 3) / 6)),
    "laplace": lambda x: _normal_density(x, LAPLACE_MEAN, LAPLACE_DEVIATION),
    "leaky_relu": lambda x: np.where(x > 0, 1, 0.01),
    "linear": np.ones_like,
    "mish": _mish,
    "quick_gelu": lambda x: _silu(x, 1.702),
    "relu": lambda x: np.where(x > 0, 1.0, 0.0),
    "relu2": lambda x: 2 * np.maximum(x, 0),
    "relu6": lambda x: np.where((x > 0) & (x < 6), 1.0, 0.0),
    "sigmoid": lambda x: expit(x) * expit(-x),
    "silu": _silu,
    "sqrtsoftplus": lambda x: expit(x) / (2 * np.sqrt(softplus(x))),
    "swish": _silu,
    "tanh": lambda x: 1 - np.tanh(x) ** 2,
}
"""The slope of each row of `activations.ACTIVATIONS`; at a kink, which no random input hits, one side's."""
