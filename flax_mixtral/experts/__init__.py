"""Backends that apply the routed experts, behind one function; no token is ever dropped.

Each is a pure function of arrays, in a module of its own. `blocks` wants the kernels as one array per expert,
since XLA on a CPU copies an expert out of a stack before it multiplies with it; the others want them stacked along E.
"""

from typing import Literal, Protocol, get_args

import jax

from flax_mixtral.config import MixtralConfig
from flax_mixtral.experts.blocks import block_experts
from flax_mixtral.experts.dense import dense_experts
from flax_mixtral.experts.one import ExpertTrace, Kernels, expert, fastest, weighted
from flax_mixtral.experts.parallel import parallel_experts
from flax_mixtral.experts.ragged import ragged_experts
from flax_mixtral.parts import apply_part

__all__ = [
    "BACKENDS",
    "Backend",
    "Choice",
    "ExpertTrace",
    "Kernels",
    "apply_experts",
    "choose_backend",
    "expert",
    "weighted",
]

Backend = Literal["dense", "blocks", "ragged", "parallel"]
Choice = Literal["auto", "dense", "blocks", "ragged", "parallel"]


class Apply(Protocol):
    """What every backend is."""

    def __call__(
        self, x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
    ) -> jax.Array:
        """See `apply_experts`."""


BACKENDS: dict[Backend, Apply] = {
    "dense": dense_experts,
    "blocks": block_experts,
    "ragged": ragged_experts,
    "parallel": parallel_experts,
}

COMPILES_ITSELF: frozenset[Backend] = frozenset({"blocks", "parallel"})
"""Backends that are several parts, or want to see the mesh."""


def choose_backend(choice: Choice, config: MixtralConfig) -> Backend:
    """Say which backend a model is built for.

    Args:
        choice: a backend, or "auto": by the platform that JAX runs on, and by the size of an expert.
            `from_pretrained` on a mesh takes "parallel".
        config: gives that size.

    Raises:
        ValueError: there is no such backend.
    """
    if choice not in get_args(Choice):
        raise ValueError(f"experts = {choice!r}: expected one of {', '.join(get_args(Choice))}")
    if choice != "auto":
        return choice
    return fastest(config.hidden_size * config.intermediate_size)


def apply_experts(
    x_MD: jax.Array,
    weights_MA: jax.Array,
    ids_MA: jax.Array,
    kernels: Kernels,
    hidden_act: str,
    backend: Backend,
) -> jax.Array:
    """Give every token to its experts and sum their outputs by the routing weights.

    Args:
        x_MD: the normalised residual stream.
        weights_MA: float32 weight of each chosen expert.
        ids_MA: the chosen experts, all different within a token.
        kernels: as the backend wants them.
        hidden_act: a name of `ACTIVATIONS`.
        backend: a name of `BACKENDS`.

    Returns:
        [M, D] in x's dtype: each expert's output is rounded to it, the sum is in float32 with one cast. An expert that
        no token was routed to has no part in the result or a gradient, whatever its kernels hold.

    Source: transformers 5.23, `grouped_mm_experts_forward`.
    """
    given = (x_MD, weights_MA, ids_MA, kernels, hidden_act)
    if backend in COMPILES_ITSELF:
        return BACKENDS[backend](*given)
    return apply_part(BACKENDS[backend], *given, static=(4,))
