"""The matrix products of the experts and nothing else, ours as XLA runs them beside torch's: the floor of a forward."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.turns import Row, Run, take_turns
from flax_mixtral import MixtralConfig
from flax_mixtral.projection import project

__all__ = ["compare"]


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


def compare(config: MixtralConfig, dtype: str, rounds: int) -> Iterator[Row]:
    """Measure one layer's products where every expert gets the same number of rows; kernels as each framework has them.

    Prefill of 512 and of 64 tokens (128 and 16 rows for each of 8 experts), and a decode step (one row for each of 2).
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
