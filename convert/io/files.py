"""Find the weight files of a checkpoint directory and collect their headers; nothing outside it is opened.

Imports the standard library, NumPy and convert's reader.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from convert.errors import TensorMismatch, UnreadableCheckpoint
from convert.io.json_strict import read_object
from convert.io.safetensors import Header, Reader
from convert.layouts import LAYOUTS

__all__ = ["WeightFiles", "find_weights", "inside"]


class Tensors(Protocol):
    """What tensors are read from: a file's reader, or a mapping in memory."""

    def __getitem__(self, name: str, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class WeightFiles:
    """The readers of all weight files, and which of them holds each tensor."""

    readers: Mapping[str, Tensors]
    homes: dict[str, str]
    headers: Mapping[str, Header]

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "WeightFiles":
        """Give arrays in memory the face of one file."""
        headers = {name: Header(array.dtype, array.shape, 0) for name, array in arrays.items()}
        return cls({"memory": arrays}, dict.fromkeys(arrays, "memory"), headers)

    def reader(self, tensor: str) -> Tensors:
        """Give the file that holds a tensor."""
        return self.readers[self.homes[tensor]]


def find_weights(root: Path) -> WeightFiles:
    """Open the one set of weight files in a directory: a single file, or shards with their index.

    Raises:
        UnreadableCheckpoint: there is none or more than one, or a file is missing, corrupt or outside.
        TensorMismatch: index and shards disagree about who holds what.
    """
    stems = dict.fromkeys(layout.stem for layout in LAYOUTS.values())
    names = [f"{stem}.safetensors{end}" for stem in stems for end in ("", ".index.json")]
    there = [name for name in names if (root / name).exists()]
    if len(there) != 1:
        found = f"found {' and '.join(there)}; keep the one that counts" if there else "found none"
        raise UnreadableCheckpoint(f"{root}: expected one of {', '.join(names)}; {found}")
    if there[0].endswith(".safetensors"):
        return _collect({there[0]: Reader.open(inside(root, there[0]))}, str(root))
    index = root / there[0]
    weight_map = _weight_map(inside(root, there[0]))
    readers = {name: Reader.open(inside(root, name)) for name in _shards(root, index, weight_map)}
    files = _collect(readers, str(index))
    wrong = [
        f"{tensor}: the index says {weight_map.get(tensor, 'nothing')}, found in {files.homes.get(tensor, 'no file')}"
        for tensor in dict.fromkeys([*weight_map, *files.homes])
        if weight_map.get(tensor) != files.homes.get(tensor)
    ]
    if wrong:
        raise TensorMismatch("\n    ".join([f"{index}: the index and its shards disagree:", *_first(wrong)]))
    return files


def inside(root: Path, name: str) -> Path:
    """Give a file's path, unless it leads out of its directory; the Hub cache's links to its blobs are followed.

    Raises:
        UnreadableCheckpoint: the name is a path, or a link that points elsewhere.
    """
    plain = name.isprintable() and len(name.encode()) <= 255
    if not plain or name != Path(name).name or "\\" in name or name in ("", ".", ".."):
        raise UnreadableCheckpoint(f"{root}: {name[:200]!r} is not the name of a file in this directory")
    real_root, real = Path(os.path.realpath(root)), Path(os.path.realpath(root / name))
    is_blob = real_root.parent.name == "snapshots" and real.parent == real_root.parent.parent / "blobs"
    if real.parent != real_root and not is_blob:
        raise UnreadableCheckpoint(f"{root / name}: a link that leads out of the checkpoint")
    if real.exists() and not real.is_file():
        raise UnreadableCheckpoint(f"{root / name}: expected a regular file")
    return root / name


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UnreadableCheckpoint(f"{index}: expected a weight_map from tensor names to file names")
    return weight_map


def _shards(root: Path, index: Path, weight_map: Mapping[str, str]) -> list[str]:
    shards = {file: tensor for tensor, file in reversed(list(weight_map.items()))}
    missing = [
        f"{file}, which holds {tensor} and {sum(home == file for home in weight_map.values()) - 1} more"
        for file, tensor in sorted(shards.items())
        if not inside(root, file).is_file()
    ]
    if missing:
        raise UnreadableCheckpoint("\n    ".join([f"{index} names files that are missing:", *_first(missing)]))
    return sorted(shards)


def _collect(readers: dict[str, Reader], where: str) -> WeightFiles:
    homes: dict[str, str] = {}
    twice = []
    for file, reader in readers.items():
        twice += [f"{tensor} in {homes[tensor]} and {file}" for tensor in reader.headers.keys() & homes.keys()]
        homes.update(dict.fromkeys(reader.headers, file))
    if twice:
        raise TensorMismatch("\n    ".join([f"{where}: tensors are present twice:", *_first(sorted(twice))]))
    headers = {tensor: readers[file].headers[tensor] for tensor, file in homes.items()}
    return WeightFiles(readers, homes, headers)


def _first(lines: list[str]) -> list[str]:
    return lines if len(lines) <= 8 else [*lines[:8], f"... and {len(lines) - 8} more"]
