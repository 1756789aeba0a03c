"""Caches as wrong ports have them: each takes the place of the function of flax_mixtral that it is given."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mixtral import cache, decoder
from flax_mixtral.cache import KVCache
from flax_mixtral.config import MixtralConfig
from flax_mixtral.decoder import Context

__all__ = ["counted_from_padding", "one_further", "sight_without_itself"]


def one_further(
    config: MixtralConfig,
    shape_BT: tuple[int, int],
    mask: jax.Array | None,
    position_BT: jax.Array | None,
    dtype: jnp.dtype,
    cache: KVCache | None = None,
    exact: Any = decoder.context_of,
) -> Context:
    """Put tokens that continue a cache one position too far."""
    if cache is not None and shape_BT[1] == 1:
        position_BT = (cache.length + jnp.zeros(shape_BT, jnp.int32) if position_BT is None else position_BT) + 1
    context: Context = exact(config, shape_BT, mask, position_BT, dtype, cache)
    return context


def counted_from_padding(
    config: MixtralConfig,
    shape_BT: tuple[int, int],
    mask: jax.Array | None,
    position_BT: jax.Array | None,
    dtype: jnp.dtype,
    cache: KVCache | None = None,
    exact: Any = decoder.context_of,
) -> Context:
    """Put tokens that continue a cache where its length says, padding included."""
    new = cache is not None and shape_BT[1] == 1
    context: Context = exact(config, shape_BT, mask, None if new else position_BT, dtype, cache)
    return context


def sight_without_itself(
    slots: KVCache, mask_BT: jax.Array, window: int | None, exact: Any = cache.keys_in_sight
) -> jax.Array:
    """Let a token that continues a cache see what was there before it and not itself."""
    visible_BTS: jax.Array = exact(slots, mask_BT, window)
    if mask_BT.shape[1] > 1:
        return visible_BTS
    own_S = jnp.arange(visible_BTS.shape[2]) == slots.length % slots.real_BS.shape[1]
    return visible_BTS & ~own_S
