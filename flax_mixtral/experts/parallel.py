"""Experts spread over the devices of a mesh: each applies its own to the tokens it sees, and the sums are added up.

Tokens stay where they are, so none is ever dropped, however uneven the routing: every device of a row of the mesh's
"expert" and "tensor" axes sees the same tokens, multiplies those that were routed to its own experts, and one psum of
[M, D] per block is all that is sent. (Why not all_to_all: docs/decisions/0091.)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flax_mixtral.axes import TOKEN_AXES
from flax_mixtral.experts.blocks import block_sum
from flax_mixtral.experts.dense import masked_sum
from flax_mixtral.experts.one import Kernels, fastest
from flax_mixtral.experts.ragged import ragged_sum

__all__ = ["own_ids", "own_sum", "parallel_experts"]


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
    token_axes = _token_axes(mesh, len(x_MD))
    tokens = PartitionSpec(token_axes)
    into_F, out_of_F = PartitionSpec(expert, None, tensor), PartitionSpec(expert, tensor, None)
    E = len(kernels.gate)

    def own_experts(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels) -> jax.Array:
        rank = jax.lax.axis_index(expert) if expert else 0
        ids_MA = own_ids(ids_MA, rank, len(kernels.gate))
        # Every device has its own sum, which a loop's carry must say from the start, and its own part of a gradient.
        # Left to JAX, the parts would be added up where an expert is used: devices that skip it would never arrive.
        x_MD = jax.lax.pcast(x_MD, shared, to="varying")
        kernels = jax.tree.map(lambda kernel: jax.lax.pcast(kernel, token_axes, to="varying"), kernels)
        sum_MD = own_sum(x_MD, weights_MA, ids_MA, kernels, hidden_act, ids_MA.size / E)
        out_MD: jax.Array = jax.lax.psum(sum_MD, shared).astype(x_MD.dtype)
        return out_MD

    specs: Any = Kernels(into_F, into_F, out_of_F)  # type: ignore[arg-type]  # specs in the shape of what they are for
    mapped = jax.shard_map(own_experts, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens)
    out_MD: jax.Array = mapped(x_MD, weights_MA, ids_MA, Kernels(*map(jnp.asarray, kernels)))
    return out_MD


def own_ids(ids_MA: jax.Array, rank: int | jax.Array, own: int) -> jax.Array:
    """Number a device's own experts from 0; `own`, how many they are, stands for every other one."""
    ids_MA = ids_MA - rank * own
    return jnp.where((ids_MA >= 0) & (ids_MA < own), ids_MA, own)


def own_sum(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, hidden_act: str, average: float
) -> jax.Array:
    """Sum the outputs of a device's own experts, in the way that is fastest on one device; see `block_sum`."""
    backend = fastest(kernels.gate[0].size)
    if backend == "blocks":
        return block_sum(x_MD, weights_MA, ids_MA, kernels, hidden_act, average)
    apply = ragged_sum if backend == "ragged" else masked_sum
    return apply(x_MD, weights_MA, ids_MA, kernels, hidden_act)


def _token_axes(mesh: jax.sharding.AbstractMesh, tokens: int) -> tuple[str, ...]:
    """Give the mesh axes that divide the tokens; too few of them, as in a decode step, stay whole."""
    axes: tuple[str, ...] = ()
    for name in TOKEN_AXES:
        if name in mesh.shape and tokens % mesh.shape[name] == 0:
            axes, tokens = (*axes, name), tokens // mesh.shape[name]
    return axes
