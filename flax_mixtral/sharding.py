"""Parameters on a device mesh: which axis is cut along which mesh axis, and reading each device's part alone."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, auto_axes

from flax_mixtral.axes import MESH_AXES, TOKEN_AXES
from flax_mixtral.config import ConfigError, MixtralConfig
from flax_mixtral.tree import slots

__all__ = ["any_axis_types", "batch_spec", "partition_specs", "placed"]

Call = TypeVar("Call", bound=Callable[..., Any])
Index = tuple[slice, ...]
Read = AbstractContextManager[npt.NDArray[Any]]


def partition_specs(config: MixtralConfig, mesh: Mesh | jax.sharding.AbstractMesh) -> dict[str, PartitionSpec]:
    """Say how every parameter is cut, from its axis letters and `MESH_AXES`.

    Args:
        config: the model.
        mesh: any of the axes "data", "fsdp", "expert" and "tensor".

    Returns:
        One spec for each leaf of `tree`. Leaves of a single axis stay whole: they are small.

    Raises:
        ConfigError: the mesh has an unknown axis, or one that does not divide an axis it is to cut.
    """
    known = {*TOKEN_AXES, *(name for names in MESH_AXES.values() for name in names)}
    problems = [f'mesh axis "{name}": expected one of {", ".join(sorted(known))}' for name in {*mesh.shape} - known]
    specs = {}
    for slot in slots(config):
        cuts = _cuts(slot.leaf.axes.split(), mesh)
        specs[slot.path] = PartitionSpec(*(names or None for names in cuts.values()))
        for size, (axis, names) in zip(slot.shape, cuts.items(), strict=True):
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                problems.append(f"{slot.path}: axis {axis} of size {size} does not divide into {parts} parts")
    if problems:
        raise ConfigError("\n".join(["the model does not fit the mesh:", *(f"  - {problem}" for problem in problems)]))
    return specs


def _cuts(axes: list[str], mesh: Mesh | jax.sharding.AbstractMesh) -> dict[str, tuple[str, ...]]:
    """Give the mesh axes that each axis of one parameter is cut along."""
    if len(axes) == 1:
        return {axes[0]: ()}
    free, cuts = set(mesh.shape), dict[str, tuple[str, ...]]()
    for axis in sorted(axes, key=lambda axis: len(MESH_AXES.get(axis, ()))):  # E takes "expert" before D does
        cuts[axis] = tuple(name for name in MESH_AXES.get(axis, ()) if name in free)
        free -= set(cuts[axis])
    return {axis: cuts[axis] for axis in axes}


def batch_spec(mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """Say how a batch's rows are cut: along "data" and "fsdp"."""
    return PartitionSpec(tuple(name for name in TOKEN_AXES if name in mesh.shape))


def any_axis_types(call: Call) -> Call:
    """Let a function that leaves the placing of its arrays to XLA be called on a mesh of explicit axis types, too.

    Its results are then typed as cut along their first axis, as rows of a batch are, where that can be cut, and whole
    otherwise. On a mesh of auto axis types nothing changes.
    """

    @wraps(call)
    def on_mesh(*inputs: Any, **named: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if AxisType.Explicit not in mesh.axis_types:
            return call(*inputs, **named)
        rows = batch_spec(mesh)
        parts = math.prod(mesh.shape[name] for name in TOKEN_AXES if name in mesh.shape)

        def run(inputs: Any, named: Any) -> Any:
            return call(*inputs, **named)

        shapes = jax.eval_shape(auto_axes(run, out_sharding=PartitionSpec()), inputs, named)
        specs = jax.tree.map(lambda leaf: rows if leaf.ndim and leaf.shape[0] % parts == 0 else PartitionSpec(), shapes)
        return auto_axes(run, out_sharding=specs)(inputs, named)

    return cast(Call, on_mesh)


def placed(
    shape: tuple[int, ...], dtype: npt.DTypeLike, mesh: Mesh, spec: PartitionSpec, read: Callable[[Index], Read]
) -> jax.Array:
    """Make an array on a mesh of which this process reads what its own devices hold.

    Args:
        shape: of the whole array.
        dtype: of the parts.
        mesh: the devices, of this process and of others.
        spec: how the array is cut.
        read: gives a part for as long as its context lasts; called once for each, however many devices hold it. A CPU
            takes over what begins on a cache line.
    """
    sharding = NamedSharding(mesh, spec)
    holders: dict[str, tuple[Index, list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, "only an array of no dimensions has no index"
        holders.setdefault(str(index), (index, []))[1].append(device)
    held = []
    for index, devices in holders.values():
        with read(index) as part:
            held += [jax.device_put(part, device, may_alias=True).block_until_ready() for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, held, dtype=np.dtype(dtype))
