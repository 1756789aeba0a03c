"""The experts' activations under transformers' names: one table, one line each.

Source: transformers 5.23, activations.py, `ACT2CLS`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["ACTIVATIONS", "activate"]

Activation = Callable[[jax.Array], jax.Array]


def _silu(x: jax.Array) -> jax.Array:
    # Closer to torch than jax.nn.silu, which goes through tanh: 0.4 % of float32 results differ instead of 25 %.
    return x / (1 + jnp.exp(-x))


def _gelu(x: jax.Array) -> jax.Array:
    # jax.nn.gelu(approximate=False) uses erfc, which rounds differently from torch's erf for large x.
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: jax.Array, root_two_over_pi: float = math.sqrt(2 / math.pi)) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh(root_two_over_pi * (x + 0.044715 * x**3)))


def _gelu_fast(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


def _laplace(x: jax.Array, mean: float = 0.707107, std: float = 0.282095) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf((x - mean) / (std * math.sqrt(2))))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
    "laplace": _laplace,
    "leaky_relu": lambda x: jnp.where(x >= 0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": lambda x: jnp.clip(x, 0, 6),
    "sigmoid": jax.nn.sigmoid,
    "silu": _silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": _silu,
    "tanh": jnp.tanh,
}


def activate(name: str, x: jax.Array) -> jax.Array:
    """Apply an activation in float32 and cast back to x's dtype, as torch's kernels do for bfloat16."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return ACTIVATIONS[name](wide).astype(x.dtype)
