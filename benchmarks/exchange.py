"""One block's experts on a mesh as the model applies them, by all_to_all, with every token masked, and sliced."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flax_mixtral.experts import Kernels, parallel
from flax_mixtral.experts.dense import masked_sum
from flax_mixtral.experts.parallel import own_ids, own_sum

__all__ = ["WAYS", "Way", "inputs"]

E, A, D, F = 8, 2, 512, 1024

Given = tuple[jax.Array, jax.Array, jax.Array, Kernels]
Way = Callable[[jax.Array, jax.Array, jax.Array, Kernels], jax.Array]


def inputs(tokens: int, dtype: str, *, overloaded: bool = False) -> Given:
    """Draw what experts are given on the mesh that is set: evenly routed, or every token to the first two experts."""
    rng = np.random.default_rng(0)
    mesh = jax.sharding.get_mesh()

    def put(array: Any, *axes: str) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, PartitionSpec(*axes)), array.__getitem__)

    ids_MA = rng.random((tokens, E)).argsort(axis=1)[:, :A].astype(np.int32)
    ids_MA = np.broadcast_to(np.arange(A, dtype=np.int32), ids_MA.shape) if overloaded else ids_MA
    kernels = [(rng.standard_normal(s) / 30).astype(jnp.dtype(dtype)) for s in ((E, D, F), (E, D, F), (E, F, D))]
    x_MD, weights_MA = rng.standard_normal((tokens, D)).astype(jnp.dtype(dtype)), rng.dirichlet(np.ones(A), tokens)
    return (
        put(x_MD),
        put(weights_MA.astype(np.float32)),
        put(ids_MA),
        Kernels(*(put(kernel, "expert") for kernel in kernels)),
    )


def by_psum(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels) -> jax.Array:
    return parallel.parallel_experts(x_MD, weights_MA, ids_MA, kernels, "silu")


def by_masking(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels) -> jax.Array:
    """Do as `by_psum`, but with every token through every expert of a device."""
    return _with_sum(lambda *given: masked_sum(*given[:-1]), x_MD, weights_MA, ids_MA, kernels)


def by_slicing(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels) -> jax.Array:
    """Do as `by_psum`, but with the stack taken apart before the experts are applied."""

    def own(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, *rest: Any) -> jax.Array:
        split = Kernels(*(tuple(kernel[e] for e in range(len(kernel))) for kernel in kernels))
        return own_sum(x_MD, weights_MA, ids_MA, split, *rest)

    return _with_sum(own, x_MD, weights_MA, ids_MA, kernels)


def _with_sum(own: Callable[..., jax.Array], *given: Any) -> jax.Array:
    parallel.own_sum = own
    try:
        return by_psum(*given)
    finally:
        parallel.own_sum = own_sum


def by_all_to_all(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels) -> jax.Array:
    """Send each device the tokens that its experts were given, and the weighted sums back.

    Buffers have room for half as much again as even routing fills. Where one of them overflows, on any device, all do
    as `by_psum`, so that no token is dropped. What comes in is on every device, and so must what goes out be: each
    device sends its part of the tokens, and the results are gathered.
    Q: a device's part of the tokens; W: devices; C: slots for one of them.
    """
    W = jax.sharding.get_abstract_mesh().shape["expert"]
    Q, own = len(x_MD) // W, E // W
    C = min(Q, -(-3 * Q * A // (2 * W)))
    average = ids_MA.size / E

    def exchange(x_QD: jax.Array, weights_QA: jax.Array, ids_QA: jax.Array, kernels: Kernels) -> jax.Array:
        hit_QW, place_QW = _sent(ids_QA, W, own)
        slot_QW = jnp.where(hit_QW, place_QW, C)  # C is out of bounds: not sent
        receiver_QW = jnp.broadcast_to(jnp.arange(W), slot_QW.shape)

        def send(rows_QX: jax.Array, empty: float) -> jax.Array:
            buffer_WCX = jnp.full_like(rows_QX, empty, shape=(W, C, rows_QX.shape[1]))
            buffer_WCX = buffer_WCX.at[receiver_QW, slot_QW].set(rows_QX[:, None], mode="drop")
            sent_RX: jax.Array = jax.lax.all_to_all(buffer_WCX, "expert", 0, 0).reshape(W * C, -1)
            return sent_RX

        ids_RA = own_ids(send(ids_QA, E), jax.lax.axis_index("expert"), own)
        sum_RD = own_sum(send(x_QD, 0), send(weights_QA, 0), ids_RA, kernels, "silu", average).astype(x_QD.dtype)
        back_WCD = jax.lax.all_to_all(sum_RD.reshape(W, C, -1), "expert", 0, 0)
        each_QWD = back_WCD.at[receiver_QW, slot_QW].get(mode="fill", fill_value=0)
        sum_QD = jnp.sum(each_QWD.astype(weights_QA.dtype), axis=1).astype(x_QD.dtype)
        gathered_MD: jax.Array = jax.lax.all_gather(sum_QD, "expert", tiled=True)
        return gathered_MD

    def on_device(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels) -> jax.Array:
        rank = jax.lax.axis_index("expert")
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=rank * Q, slice_size=Q)
        own_QA = part(ids_MA)
        fullest = jnp.max(jnp.sum(_sent(own_QA, W, own)[0], axis=0))

        def stay() -> jax.Array:
            sum_MD = own_sum(x_MD, weights_MA, own_ids(ids_MA, rank, own), kernels, "silu", average)
            total_MD: jax.Array = jax.lax.psum(sum_MD, "expert").astype(x_MD.dtype)
            return total_MD

        def go() -> jax.Array:
            return exchange(part(x_MD), part(weights_MA), own_QA, kernels)

        found_MD: jax.Array = jax.lax.cond(jax.lax.pmax(fullest, "expert") > C, stay, go)
        return found_MD

    whole, cut = PartitionSpec(), PartitionSpec("expert")
    specs: Any = (whole, whole, whole, Kernels(cut, cut, cut))  # type: ignore[arg-type]  # specs in the kernels' shape
    # Unchecked: that gathered results are the same everywhere is not in their type.
    mapped = jax.shard_map(on_device, in_specs=specs, out_specs=whole, check_vma=False)
    out_MD: jax.Array = mapped(x_MD, weights_MA, ids_MA, kernels)
    return out_MD


def _sent(ids_QA: jax.Array, devices: int, own: int) -> tuple[jax.Array, jax.Array]:
    """Say which tokens go to which device, once each, and to which of its slots: both [Q, W]."""
    hit_QW = jax.nn.one_hot(ids_QA // own, devices, dtype=jnp.int32).any(axis=1)
    return hit_QW, jnp.cumsum(hit_QW, axis=0) - 1


WAYS: dict[str, Way] = {"psum": by_psum, "all_to_all": by_all_to_all, "every token": by_masking, "sliced": by_slicing}
