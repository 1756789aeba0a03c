"""Every `hidden_act` of Mixtral as a NumPy function, exact to the rounding of its input's dtype.

Forms are chosen so that nothing cancels: `erfc` for `1 + erf`, the logistic function for `1 + tanh`.
Imports NumPy and SciPy only.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import erfc, expit  # type: ignore[import-untyped]  # SciPy ships no types

from parity.trace import Array

__all__ = ["ACTIVATIONS"]

SQRT_2_OVER_PI = (2 / np.pi) ** 0.5
LAPLACE_MEAN, LAPLACE_DEVIATION = 0.707107, 0.282095


def gelu(x: Array) -> Array:
    """Weight by the normal distribution: x * Phi(x)."""
    gated: Array = 0.5 * x * erfc(-x / 2**0.5)
    return gated


def gelu_tanh(x: Array, slope: float = float(SQRT_2_OVER_PI)) -> Array:
    """Approximate gelu: x/2 * (1 + tanh(u)) is x * logistic(2u)."""
    gated: Array = x * expit(2 * slope * (x + 0.044715 * x**3))
    return gated


def laplace(x: Array) -> Array:
    """Apply the normal distribution function of MEGA's mean and deviation."""
    probability: Array = 0.5 * erfc(-(x - LAPLACE_MEAN) / (LAPLACE_DEVIATION * 2**0.5))
    return probability


def silu(x: Array) -> Array:
    """Weight by the logistic function: x * logistic(x)."""
    gated: Array = x * expit(x)
    return gated


def softplus(x: Array) -> Array:
    """Compute log(1 + exp(x)) without overflow."""
    smooth: Array = np.logaddexp(0, x)
    return smooth


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_10": lambda x: np.clip(gelu(x), -10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": lambda x: gelu_tanh(x, 0.7978845608),
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "laplace": laplace,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(softplus(x)),
    "quick_gelu": lambda x: x * expit(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": expit,
    "silu": silu,
    "sqrtsoftplus": lambda x: np.sqrt(softplus(x)),
    "swish": silu,
    "tanh": np.tanh,
}
"""One row per activation. Source: transformers 5.23, activations.py, `ACT2CLS`; torch.nn for those that it takes."""
