"""Experts spread over the devices of a mesh: each applies its own to the tokens it sees, and the sums are added up.

Tokens stay where they are, so none is ever dropped, however uneven the routing: every device of a row of the mesh's
"expert" and "tensor" axes sees the same tokens, and one psum of [M, D] per block is all that is sent. (Why not
all_to_all: docs/decisions/0091.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_mixtral.axes import TOKEN_AXES
from flax_mixtral.experts.dense import masked_sum
from flax_mixtral.experts.one import Kernels

__all__ = ["parallel_experts"]


def parallel_experts(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str
) -> jax.Array:
    """Apply the experts; see `apply_experts`. The kernels are stacked, E along "expert" and F along "tensor".

    Each device's share of an expert's output is rounded to x's dtype; the sum over experts and shares is in float32.

    Raises:
        ValueError: no mesh is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("parallel experts run on a mesh: call the model within `with jax.set_mesh(mesh):`")
    expert, tensor = (name if name in mesh.shape else None for name in ("expert", "tensor"))
    shared = tuple(name for name in (expert, tensor) if name)
    tokens = PartitionSpec(_token_axes(mesh, len(x_MD)))
    into_F, out_of_F = PartitionSpec(expert, None, tensor), PartitionSpec(expert, tensor, None)

    def own_experts(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels) -> jax.Array:
        first = jax.lax.axis_index(expert) * len(kernels.gate) if expert else 0
        # Every device's sum is another one, which a loop's carry must say from the start.
        x_MD = jax.lax.pcast(x_MD, shared, to="varying")
        sum_MD = masked_sum(x_MD, weights_MA, ids_MA - first, kernels, hidden_act)
        out_MD: jax.Array = jax.lax.psum(sum_MD, shared).astype(x_MD.dtype)
        return out_MD

    specs: Any = Kernels(into_F, into_F, out_of_F)  # type: ignore[arg-type]  # specs in the shape of what they are for
    mapped = jax.shard_map(own_experts, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens)
    out_MD: jax.Array = mapped(x_MD, weights_MA, ids_MA, Kernels(*map(jnp.asarray, kernels)))
    return out_MD


def _token_axes(mesh: jax.sharding.AbstractMesh, tokens: int) -> tuple[str, ...]:
    """Give the mesh axes that divide the tokens; too few of them, as in a decode step, stay whole."""
    axes: tuple[str, ...] = ()
    for name in TOKEN_AXES:
        if name in mesh.shape and tokens % mesh.shape[name] == 0:
            axes, tokens = (*axes, name), tokens // mesh.shape[name]
    return axes
