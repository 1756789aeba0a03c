"""Generation: prefill once, then one token for every row and step, until each row has ended.

The loop is Python's, around one compiled step: tokens can be streamed, and it stops when every row has. (Not called
generate.py: `flax_mixtral.generate` is the function, and Python would put the module of that name in its place.)
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from flax_mixtral.cache import KVCache, init_cache
from flax_mixtral.heads import Mixtral
from flax_mixtral.sharding import any_axis_types

__all__ = ["choose", "generate"]

Tokens = npt.NDArray[np.int32]

SLOTS = 64
"""The cache's length is a multiple of this, so that prompts of similar lengths share one compiled decode step."""


def generate(
    model: Mixtral,
    input_ids: ArrayLike,
    max_new_tokens: int,
    *,
    attention_mask: ArrayLike | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    key: jax.Array | None = None,
    stream: Callable[[Tokens], object] | None = None,
) -> Tokens:
    """Continue every row of a batch: greedily, or by sampling where a temperature is given.

    Args:
        model: the language model.
        input_ids: [B, T] int; rows of different lengths are padded on the left.
        max_new_tokens: at most this many are added.
        attention_mask: [B, T], 1 on real tokens and 0 on padding. Without one, the tokens that are pad_token_id are
            taken for padding, unless that is also an end, as in transformers.
        temperature: divides the logits before sampling; 0 takes the most probable token.
        top_k: sample among this many most probable tokens.
        top_p: sample among the fewest tokens whose probabilities reach this sum; after top_k.
        eos_token_id: a row ends after any of these; None takes the configuration's, and () ends none.
        pad_token_id: fills a row after its end; None takes the configuration's, or else the first eos_token_id.
        key: PRNG key of sampling; the same key gives the same tokens.
        stream: called after every step with the new tokens, [B].

    Returns:
        [B, T + new] int32: the rows and their new tokens; less than max_new_tokens of them if every row ended before.

    Raises:
        ValueError: an argument has no meaning; the message says which.

    Source: transformers 5.23, generation/utils.py, `generate`: positions, padding and ends; logits_process.py,
        `TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`, in this order.
    """
    ids_BT = np.asarray(input_ids, np.int32)
    _refuse(ids_BT, max_new_tokens, temperature, top_k, top_p, key)
    ends = _ends(model.config.eos_token_id if eos_token_id is None else eos_token_id)
    given_pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    pad = given_pad if given_pad is not None else ends[0] if ends else 0
    mask_BT = _mask(ids_BT, attention_mask, given_pad, ends)
    position_BT = np.maximum(np.cumsum(mask_BT, axis=1, dtype=np.int32) - 1, 0)

    B, T = ids_BT.shape
    room = -(-(T + max_new_tokens) // SLOTS) * SLOTS
    cache = init_cache(model.config, B, room, model.model.embed_tokens.embedding.dtype)
    logits_BV, cache = _prefill(model, ids_BT, mask_BT, position_BT, cache)
    position_B1 = position_BT[:, -1:]
    ended_B = np.zeros(B, bool)
    new: list[Tokens] = []
    while True:
        step_key = None if key is None else jax.random.fold_in(key, len(new))
        chosen_B = choose(logits_BV, step_key, temperature, top_k=top_k, top_p=top_p)
        token_B = np.where(ended_B, np.int32(pad), np.asarray(chosen_B, np.int32))
        new.append(token_B)
        if stream is not None:
            stream(token_B)
        ended_B |= np.isin(token_B, ends)
        if len(new) == max_new_tokens or ended_B.all():
            return np.concatenate([ids_BT, np.stack(new, axis=1)], axis=1)
        position_B1 = position_B1 + 1
        logits_BV, cache = _decode(model, token_B[:, None], position_B1, cache)


@partial(jax.jit, static_argnames=("top_k",))
def choose(
    logits_BV: jax.Array,
    key: jax.Array | None,
    temperature: float | jax.Array = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Choose each row's next token; see `generate` for the arguments.

    Args:
        logits_BV: of the last token, any float dtype.
        key: None takes the most probable token, the first among equals.

    Returns:
        [B] int32.
    """
    if key is None:
        return jnp.argmax(logits_BV, axis=-1)
    kept_BV = logits_BV.astype(jnp.float32) / temperature
    if top_k is not None:
        least_B1 = jax.lax.top_k(kept_BV, min(top_k, kept_BV.shape[-1]))[0][:, -1:]
        kept_BV = jnp.where(kept_BV < least_B1, -jnp.inf, kept_BV)
    if top_p is not None:
        # Ascending, so that what is cut is the tail whose sum stays within 1 - top_p; the last one is always kept.
        order_BV = jnp.argsort(kept_BV, axis=-1)
        sums_BV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(kept_BV, order_BV, axis=-1)), axis=-1)
        cut_BV = (sums_BV <= 1 - top_p).at[:, -1].set(False)
        cut_BV = jnp.take_along_axis(cut_BV, jnp.argsort(order_BV, axis=-1), axis=-1)
        kept_BV = jnp.where(cut_BV, -jnp.inf, kept_BV)
    return jax.random.categorical(key, kept_BV)


@partial(jax.jit, donate_argnames="cache")
@any_axis_types
def _prefill(
    model: Mixtral, ids_BT: jax.Array, mask_BT: jax.Array, position_BT: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Run the prompt; the head only sees its last token."""
    trace = model.model(ids_BT, mask_BT, position_BT, cache)
    assert trace.cache is not None, "a cache was given"
    return model.head(trace.final_norm_BTD[:, -1:], ids_BT)[:, -1], trace.cache


@partial(jax.jit, donate_argnames="cache")
@any_axis_types
def _decode(model: Mixtral, ids_B1: jax.Array, position_B1: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Run one more token of every row."""
    trace = model.model(ids_B1, None, position_B1, cache)
    assert trace.cache is not None, "a cache was given"
    return model.head(trace.final_norm_BTD, ids_B1)[:, -1], trace.cache


def _ends(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _mask(ids_BT: Tokens, mask: ArrayLike | None, pad: int | None, ends: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    if mask is not None:
        mask_BT = np.asarray(mask).astype(bool)
        if mask_BT.shape != ids_BT.shape:
            raise ValueError(f"attention_mask has shape {mask_BT.shape}, input_ids {ids_BT.shape}; they must be equal")
    else:
        guessed = pad is not None and pad not in ends
        mask_BT = ids_BT != pad if guessed else np.ones(ids_BT.shape, bool)
    if not mask_BT[:, -1].all():
        rows = np.flatnonzero(~mask_BT[:, -1]).tolist()
        raise ValueError(f"rows {rows} end in padding, and a continuation starts at the last token: pad on the left")
    return mask_BT


def _refuse(
    ids_BT: Tokens,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: jax.Array | None,
) -> None:
    problems = []
    if ids_BT.ndim != 2 or 0 in ids_BT.shape:
        problems.append(f"input_ids has shape {ids_BT.shape}: expected [rows, tokens], at least one of each")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens = {max_new_tokens}: expected at least 1")
    if not temperature >= 0:  # nor not-a-number
        problems.append(f"temperature = {temperature}: expected 0, or more to sample")
    if temperature > 0 and key is None:
        problems.append(f"temperature = {temperature} samples, which needs key=jax.random.key(seed)")
    if temperature == 0 and (top_k, top_p, key) != (None, None, None):
        problems.append("top_k, top_p and key are for sampling, which needs a temperature above 0")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k = {top_k}: expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p = {top_p}: expected more than 0 and at most 1")
    if problems:
        raise ValueError("generate:\n" + "\n".join(f"  - {problem}" for problem in problems))
