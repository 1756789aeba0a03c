"""Orbax checkpoints of the Flax tree, read and written leaf by leaf. The one module of convert that needs JAX.

Source: orbax-checkpoint 0.12, StandardCheckpointer's format. A leaf's dotted path leads through nested
dictionaries.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray
from orbax.checkpoint.type_handlers import NumpyHandler, create_type_handler_registry

from convert.errors import UnreadableCheckpoint
from convert.io.safetensors import Header

__all__ = ["OrbaxReader", "write"]

CONCURRENT_GB = 1
"""What Orbax may have under way; a leaf that is larger goes alone."""


@dataclass(frozen=True)
class OrbaxReader:
    """An Orbax directory whose metadata has been read; one leaf is held at a time."""

    path: Path
    headers: Mapping[str, Header]
    _lock: Lock = field(default_factory=Lock)
    _held: dict[str, NDArray[Any]] = field(default_factory=dict)
    """The leaf that was read last: an expert at a time is asked for."""

    @classmethod
    def open(cls, path: Path) -> "OrbaxReader":
        """Read names, shapes and dtypes.

        Raises:
            UnreadableCheckpoint: it is no finished Orbax checkpoint, or not of arrays in nested dictionaries.
        """
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                tree = checkpointer.metadata(path.absolute()).item_metadata.tree
            headers = {name: Header(np.dtype(leaf.dtype), tuple(leaf.shape), 0) for name, leaf in _flat(tree)}
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UnreadableCheckpoint(f"{path}: no readable Orbax checkpoint: {str(error)[:200]}") from error
        return cls(path, headers)

    def __getitem__(self, name: str) -> NDArray[Any]:
        with self._lock:
            if name not in self._held:
                self._held.clear()
                self._held[name] = self._read(name)
            return self._held[name]

    def will_need(self, array: NDArray[Any]) -> None:
        """Nothing is read ahead."""

    def release(self, array: NDArray[Any]) -> None:
        """The last leaf stays until another is asked for."""

    def _read(self, name: str) -> NDArray[Any]:
        restore = ocp.args.PyTreeRestore(
            item=_nested({name: 0}),
            restore_args=_nested({name: ocp.RestoreArgs(restore_type=np.ndarray)}),
            partial_restore=True,
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                ((_, array),) = _flat(checkpointer.restore(self.path.absolute(), args=restore))
        except Exception as error:  # as above
            raise UnreadableCheckpoint(f"{self.path}: {name} cannot be read: {str(error)[:200]}") from error
        result = np.asarray(array)
        result.flags.writeable = False
        return result


def write(path: Path, leaves: Mapping[str, NDArray[Any]]) -> None:
    """Write leaves as StandardCheckpointer would, but without its copy of all of them in memory."""
    registry = create_type_handler_registry((np.ndarray, NumpyHandler(deepcopy_host_arrays=False)))
    # One directory a leaf: Orbax's single database would be gathered in memory before it is written.
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, save_concurrent_gb=CONCURRENT_GB, use_ocdbt=False
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(_nested(leaves)))


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
