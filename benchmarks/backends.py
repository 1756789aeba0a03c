"""The experts of one block: `blocks` beside the other backends, taking turns."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import Row, Run, take_turns
from flax_mixtral import MixtralConfig
from flax_mixtral.experts import Backend, Kernels, apply_experts

__all__ = ["compare"]


@partial(jax.jit, static_argnames="backend")
def _apply(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, backend: Backend) -> jax.Array:
    return apply_experts(x_MD, weights_MA, ids_MA, kernels, "silu", backend)


def compare(config: MixtralConfig, tokens: int, rounds: int) -> Iterator[Row]:
    """Measure blocks against ragged and against dense, in float32, on tokens that go to random experts."""
    D, F, E, A = config.hidden_size, config.intermediate_size, config.num_local_experts, config.num_experts_per_tok
    rng = np.random.default_rng(0)
    stacked = Kernels(
        *(jnp.asarray(rng.standard_normal(s, np.float32)) * 0.02 for s in ((E, D, F), (E, D, F), (E, F, D)))
    )
    split = Kernels(*(tuple(kernel) for kernel in stacked))
    x_MD = jnp.asarray(rng.standard_normal((tokens, D), np.float32))
    ids_MA = jnp.asarray(rng.random((tokens, E)).argsort(axis=1)[:, :A].astype(np.int32))
    weights_MA = jnp.full((tokens, A), 1 / A, jnp.float32)

    def run(backend: Backend) -> None:
        kernels = split if backend == "blocks" else stacked
        _apply(x_MD, weights_MA, ids_MA, kernels, backend).block_until_ready()

    others: tuple[Backend, ...] = ("ragged", "dense")
    for other in others:
        runs: dict[str, Run] = {"blocks": partial(run, "blocks"), other: partial(run, other)}
        yield take_turns(f"blocks against {other}, {tokens} tokens, one block", "float32", runs, rounds)
