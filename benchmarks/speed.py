"""Forward passes and generation: ours beside every implementation of transformers, taking turns in one process."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks.turns import Row, Run, take_turns
from flax_mixtral import KVCache, Mixtral, generate, init_cache

__all__ = ["compare"]

TORCH_EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""transformers' experts; batched_mm gathers a copy of the kernels for every token, and is left out beyond decoding."""
DECODED = 16
"""Tokens per measurement of a decode step."""
GENERATED = 32


@torch.inference_mode()
def compare(path: Path, dtype: str, rounds: int) -> Iterator[Row]:
    """Measure prefill, decoding and generation.

    Args:
        path: the checkpoint.
        dtype: both load it in this.
        rounds: turns each.
    """
    ours = Mixtral.from_pretrained(path, dtype=jnp.dtype(dtype))
    theirs: Any = transformers.MixtralForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    ids_BT = np.random.default_rng(1).integers(0, ours.config.vocab_size, (1, 512)).astype(np.int32)
    ids = {T: (jnp.asarray(ids_BT[:, :T]), torch.from_numpy(ids_BT[:, :T]).long()) for T in (64, 512)}
    plan: dict[str, tuple[Run, Run, int]] = {
        "prefill 512": (partial(_forward, ours, ids[512][0]), partial(theirs, ids[512][1]), 2),
        "prefill 64": (partial(_forward, ours, ids[64][0]), partial(theirs, ids[64][1]), 2),
        f"decode {DECODED} after 64": (
            partial(_decode_ours, ours, *_prefilled(ours, ids[64][0])),
            partial(_decode_theirs, theirs, theirs(ids[64][1])),
            3,
        ),
        f"generate {GENERATED} after 64": (
            lambda: generate(ours, ids[64][0], GENERATED, eos_token_id=()),
            lambda: theirs.generate(ids[64][1], max_new_tokens=GENERATED, do_sample=False, eos_token_id=None),
            2,
        ),
    }
    for what, (run_ours, run_theirs, implementations) in plan.items():
        runs = {name: partial(_with_experts, theirs, name, run_theirs) for name in TORCH_EXPERTS[:implementations]}
        yield take_turns(what, dtype, {"flax-mixtral": run_ours, **runs}, rounds)


def _with_experts(model: Any, experts: str, run: Run) -> None:
    model.config._experts_implementation = experts
    run()


@jax.jit
def _logits(model: Mixtral, ids_BT: jax.Array) -> jax.Array | None:
    return model(ids_BT).logits


def _forward(model: Mixtral, ids_BT: jax.Array) -> None:
    jax.block_until_ready(_logits(model, ids_BT))


@jax.jit
def _step(model: Mixtral, token_B1: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    output = model(token_B1, cache=cache)
    assert output.logits is not None
    assert output.cache is not None
    return jnp.argmax(output.logits[:, -1:], axis=-1), output.cache


def _prefilled(model: Mixtral, ids_BT: jax.Array) -> tuple[jax.Array, KVCache]:
    dtype = model.model.embed_tokens.embedding[...].dtype
    token, cache = _step(model, ids_BT, init_cache(model.config, 1, 128, dtype))
    return token, cache


def _decode_ours(model: Mixtral, token_B1: jax.Array, cache: KVCache) -> None:
    for _ in range(DECODED):
        token_B1, cache = _step(model, token_B1, cache)
    token_B1.block_until_ready()


def _decode_theirs(model: Any, prefilled: Any) -> None:
    cache, token_B1 = prefilled.past_key_values, prefilled.logits[:, -1:].argmax(-1)
    cache.crop(64 - cache.get_seq_length())
    for _ in range(DECODED):
        output = model(token_B1, past_key_values=cache)
        token_B1 = output.logits[:, -1:].argmax(-1)
