"""The key/value cache: a fixed number of slots per layer, so that a decode step has one shape and is compiled once.

Token i lies in slot i mod S. With as many slots as tokens that is a plain list; with a sliding window S is the window,
and a new token takes the place of the one that has just left it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flax_mixtral.config import MixtralConfig

__all__ = ["KVCache", "Past", "init_cache", "join", "keys_in_sight", "refuse_overflow", "write"]


class Past(NamedTuple):
    """One layer's slots, and how many tokens have been written."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    length: jax.Array


class KVCache(NamedTuple):
    """What a model keeps of the tokens it has seen.

    Args:
        k_BSKH: one array per layer, rotated.
        v_BSKH: one array per layer.
        real_BS: False where a slot holds padding.
        length: scalar int, the tokens written so far, padding included.
    """

    k_BSKH: tuple[jax.Array, ...]
    v_BSKH: tuple[jax.Array, ...]
    real_BS: jax.Array
    length: jax.Array

    def written(self, new: list[tuple[jax.Array, jax.Array]], mask_BT: jax.Array, window: int | None) -> "KVCache":
        """Give the cache after new tokens; see `join`. Under jit, one write serves attention and the next step.

        Args:
            new: rotated keys and values of each layer.
            mask_BT: which new tokens are real.
            window: the sliding window.
        """
        k_BSKH = (write(old, k, self.length, window) for old, (k, _) in zip(self.k_BSKH, new, strict=True))
        v_BSKH = (write(old, v, self.length, window) for old, (_, v) in zip(self.v_BSKH, new, strict=True))
        real_BS = write(self.real_BS, mask_BT, self.length, window)
        return KVCache(tuple(k_BSKH), tuple(v_BSKH), real_BS, self.length + mask_BT.shape[1])

    def past(self, layer: int) -> Past:
        """Give one layer's part."""
        return Past(self.k_BSKH[layer], self.v_BSKH[layer], self.length)


def init_cache(config: MixtralConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """Make an empty cache.

    Args:
        config: gives the layers, heads and the sliding window; never more slots are made than the window has.
        batch: B.
        length: the most tokens, prompt and new ones together, that will be written.
        dtype: the model's.
    """
    S = length if config.sliding_window is None else min(length, config.sliding_window)
    shape_BSKH = (batch, S, config.num_key_value_heads, config.head_dim)
    # Each layer has its own zeros: arrays that share a buffer cannot be donated.
    k_BSKH, v_BSKH = (tuple(jnp.zeros(shape_BSKH, dtype) for _ in range(config.num_hidden_layers)) for _ in "kv")
    return KVCache(k_BSKH, v_BSKH, jnp.zeros((batch, S), bool), jnp.zeros((), jnp.int32))


def refuse_overflow(cache: KVCache, tokens: int, window: int | None) -> None:
    """Refuse new tokens that the cache cannot hold; under jit nobody knows.

    Raises:
        ValueError: the new tokens do not fit, and the length has a value.
    """
    S = cache.real_BS.shape[1]
    if not _wraps(S, window) and not isinstance(cache.length, jax.core.Tracer) and cache.length + tokens > S:
        raise ValueError(
            f"the cache has {S} slots, {cache.length} of them taken, and cannot hold {tokens} more tokens; "
            "give init_cache a length for prompt and new tokens together"
        )


def keys_in_sight(cache: KVCache, mask_BT: jax.Array, window: int | None) -> jax.Array:
    """Say which of the keys that `join` gives each new query may see.

    Args:
        cache: before the new tokens are written.
        mask_BT: which new tokens are real.
        window: the sliding window.

    Returns:
        [B, T, S or S + T] bool, as `attention.visible_keys`.

    Source: transformers 5.23, masking_utils.py: the window counts tokens, padding among them, not positions.
    """
    S, T = cache.real_BS.shape[1], mask_BT.shape[1]
    query_1T = cache.length + jnp.arange(T)[None]
    key_1S = join(_token_in_slot(cache.length, S)[None], query_1T, cache.length, window)
    query_T1 = query_1T.T
    visible_TS = (key_1S >= 0) & (key_1S <= query_T1)
    if window is not None:
        visible_TS &= key_1S > query_T1 - window
    return visible_TS & join(cache.real_BS, mask_BT, cache.length, window)[:, None, :]


def join(old_BS: jax.Array, new_BT: jax.Array, length: jax.Array, window: int | None) -> jax.Array:
    """Put old and new tokens into one array for the new queries to look at.

    Args:
        old_BS: [B, S, ...], one entry per slot.
        new_BT: [B, T, ...], one entry per new token.
        length: tokens written before.
        window: the sliding window.

    Returns:
        [B, S, ...] with the new tokens in their slots; [B, S + T, ...] for several tokens in a full window, where the
        first of them still look at what the last ones overwrite.
    """
    if new_BT.shape[1] > 1 and _wraps(old_BS.shape[1], window):
        return jnp.concatenate([old_BS, new_BT], axis=1)
    return write(old_BS, new_BT, length, window)


def write(old_BS: jax.Array, new_BT: jax.Array, length: jax.Array, window: int | None) -> jax.Array:
    """Put new tokens into their slots; see `join` for the arguments."""
    S, T = old_BS.shape[1], new_BT.shape[1]
    if T == 1 or not _wraps(S, window):
        return jax.lax.dynamic_update_slice_in_dim(old_BS, new_BT, length % S, axis=1)
    token_S = _token_in_slot(length + T, S)
    rest = (None,) * (old_BS.ndim - 2)
    taken_BS = jnp.take(new_BT, jnp.maximum(token_S - length, 0), axis=1)
    return jnp.where((token_S >= length)[None, :, *rest], taken_BS, old_BS)


def _wraps(slots: int, window: int | None) -> bool:
    """Say whether slots are used again; a window that is larger than the cache never fills."""
    return window is not None and slots == window


def _token_in_slot(length: jax.Array, slots: int) -> jax.Array:
    """Give the newest token of each slot after `length` tokens, negative where there is none."""
    last = length - 1
    return last - (last - jnp.arange(slots)) % slots
