"""Meshes of eight simulated devices, for the tests that are marked multidevice."""

import jax
from jax.sharding import AxisType

__all__ = ["MESHES", "mesh_of"]

MESHES: dict[str, dict[str, int]] = {
    "8x1 data": {"data": 8, "tensor": 1},
    "8x1 expert": {"expert": 8, "tensor": 1},
    "1x8 tensor": {"expert": 1, "tensor": 8},
    "2x4": {"expert": 2, "tensor": 4},
    "4x2 fsdp": {"fsdp": 4, "expert": 2},
    "2x2x2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "2x2x2 data": {"data": 2, "expert": 2, "tensor": 2},
}


def mesh_of(name: str, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    sizes = MESHES[name]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
