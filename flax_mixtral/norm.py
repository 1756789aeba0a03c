"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Scale each vector to unit root mean square, then channel by channel.

    Args:
        x_D: [..., D], any float dtype.
        scale_D: the learned gain.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype. The mean is taken in float32, and the result cast down before the gain is applied.

    Source: transformers 5.23, `MixtralRMSNorm`.
    """
    wide_D = x_D.astype(jnp.promote_types(x_D.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide_D), axis=-1, keepdims=True)
    return scale_D * (wide_D * jax.lax.rsqrt(mean_square + eps)).astype(x_D.dtype)


class RMSNorm(nnx.Module):
    """Holds the gain of one normalisation."""

    def __init__(self, width: int, eps: float, *, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x_D: jax.Array) -> jax.Array:
        """Normalise; see `rms_norm`."""
        return rms_norm(x_D, self.scale[...], self.eps)
