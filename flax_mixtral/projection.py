"""Matrix products with Hugging Face's rounding: float32 accumulation, one cast to the input's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["Projection", "project"]


def project(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Contract x with a kernel.

    Args:
        equation: an einsum equation in the letters of flax_mixtral.axes.
        x: activations, any float dtype.
        kernel: [in, out] weights of the same dtype.

    Returns:
        The product in x's dtype, accumulated in float32 (or wider).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Asking for a wide result is also what makes bfloat16 fast on a CPU: XLA then calls its blocked float32 kernels.
    if (axes := _contracted(equation)) is not None:
        return jnp.tensordot(x, kernel, axes, preferred_element_type=wide).astype(x.dtype)
    return jnp.einsum(equation, x, kernel, preferred_element_type=wide).astype(x.dtype)


def _contracted(equation: str) -> int | None:
    """Count the axes of an ordinary product, of x's last with the kernel's first ones; None if it is another.

    `einsum` contracts several axes in the order of their letters, and where that is not the kernel's, XLA on a CPU
    copies the kernel into that order at every call.
    """
    operands, result = equation.split("->")
    x, kernel = operands.split(",")
    axes = len(set(x) & set(kernel))
    return axes if x[-axes:] + result == kernel[:axes] + x[:-axes] + kernel[axes:] else None


class Projection(nnx.Module):
    """Holds one kernel, and a bias where the layer has one."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        std: float,
        bias: tuple[int, ...] | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(nnx.initializers.normal(std)(rngs.params(), shape, dtype))
        self.bias = None if bias is None else nnx.Param(jnp.zeros(bias, dtype))
