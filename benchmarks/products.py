"""What a forward is made of, alone: the experts' products, the head's and attention, XLA's beside torch's."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.turns import Row, Run, take_turns
from flax_mixtral import MixtralConfig
from flax_mixtral.attention import attend, visible_keys
from flax_mixtral.projection import project

__all__ = ["compare"]

PREFILL = 512


@jax.jit
def _ours(x_RD: jax.Array, experts: list[list[jax.Array]]) -> list[jax.Array]:
    downs = []
    for gate_DF, up_DF, down_FD in experts:
        gate_RF, up_RF = project("RD,DF->RF", x_RD, gate_DF), project("RD,DF->RF", x_RD, up_DF)
        downs.append(project("RF,FD->RD", gate_RF + up_RF, down_FD))
    return downs


def _run(x_RD: jax.Array, experts: list[list[jax.Array]]) -> None:
    jax.block_until_ready(_ours(x_RD, experts))


@torch.inference_mode()
def _theirs(x_RD: torch.Tensor, experts: list[list[torch.Tensor]]) -> None:
    for gate_FD, up_FD, down_DF in experts:
        gate_RF, up_RF = torch.nn.functional.linear(x_RD, gate_FD), torch.nn.functional.linear(x_RD, up_FD)
        torch.nn.functional.linear(gate_RF + up_RF, down_DF)


_product = jax.jit(project, static_argnums=0)
_attend = jax.jit(attend)


def compare(config: MixtralConfig, dtype: str, rounds: int) -> Iterator[Row]:
    """Measure one layer's experts where each gets the same number of rows, one head, and one layer's attention.

    The experts in a prefill of 512 and of 64 tokens (128 and 16 rows for each of 8), and in a decode step (one row for
    each of 2); kernels as each framework has them.
    """
    D, F, E, A = config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok
    rng = np.random.default_rng(0)
    drawn = [[rng.standard_normal(s, np.float32) * 0.02 for s in ((D, F), (D, F), (F, D))] for _ in range(E)]
    ours = [[jnp.asarray(k, dtype) for k in kernels] for kernels in drawn]
    theirs = [[torch.from_numpy(k.T.copy()).to(getattr(torch, dtype)) for k in kernels] for kernels in drawn]
    for what, rows, experts in (("prefill 512", 512 * A // E, E), ("prefill 64", 64 * A // E, E), ("decode", 1, A)):
        x_RD = rng.standard_normal((rows, D), np.float32)
        x_ours, x_theirs = jnp.asarray(x_RD, dtype), torch.from_numpy(x_RD).to(getattr(torch, dtype))
        runs: dict[str, Run] = {
            "XLA": partial(_run, x_ours, ours[:experts]),
            "torch": partial(_theirs, x_theirs, theirs[:experts]),
        }
        yield take_turns(f"{what}: {experts} x {rows} rows", dtype, runs, rounds)
    yield _head(config, dtype, rounds)
    yield _attention(config, dtype, rounds)


@torch.inference_mode()
def _head(config: MixtralConfig, dtype: str, rounds: int) -> Row:
    """Measure the head on a prefill."""
    x, kernel = _pair((PREFILL, config.hidden_size), dtype), _pair((config.hidden_size, config.vocab_size), dtype)
    kernel_VD = kernel[1].T.contiguous()
    runs: dict[str, Run] = {
        "XLA": lambda: jax.block_until_ready(_product("MD,DV->MV", x[0], kernel[0])),
        "torch": lambda: torch.nn.functional.linear(x[1], kernel_VD),
    }
    return take_turns(f"head: {PREFILL} rows", dtype, runs, rounds)


@torch.inference_mode()
def _attention(config: MixtralConfig, dtype: str, rounds: int) -> Row:
    """Measure one layer's scores, softmax and mixing of a prefill: ours and torch's sdpa."""
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (_pair((1, PREFILL, heads, H), dtype) for heads in (N, K, K))
    visible_BTS = visible_keys(config, (1, PREFILL), None, None)
    q_BNTH, k_BKTH, v_BKTH = (pair[1].transpose(1, 2).contiguous() for pair in (q, k, v))
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    runs: dict[str, Run] = {
        "XLA": lambda: jax.block_until_ready(_attend(q[0], k[0], v[0], visible_BTS)),
        "torch": lambda: sdpa(q_BNTH, k_BKTH, v_BKTH),
    }
    return take_turns(f"attention: {PREFILL} tokens", dtype, runs, rounds)


def _pair(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, torch.Tensor]:
    """Draw an array for each framework."""
    drawn = np.random.default_rng(0).standard_normal(shape, np.float32) * 0.02
    return jnp.asarray(drawn, dtype), torch.from_numpy(drawn).to(getattr(torch, dtype))
