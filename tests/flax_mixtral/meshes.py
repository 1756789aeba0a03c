"""Meshes of eight simulated devices, for the tests that are marked multidevice, and how much is read onto one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
from jax.sharding import AxisType
from numpy.typing import NDArray

from convert.checkpoint import View

__all__ = ["MESHES", "bytes_read", "mesh_of"]

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


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """Note how many bytes each part has that is read of a checkpoint in the context."""
    noted: list[int] = []
    part = View.part

    @contextmanager
    def counted(view: View, *which: Any) -> Iterator[NDArray[Any]]:
        with part(view, *which) as array:
            noted.append(array.nbytes)
            yield array

    with mock.patch.object(View, "part", counted):
        yield noted
