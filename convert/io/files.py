"""Find the weight files of a checkpoint directory and collect their headers; nothing outside it is opened.

Imports the standard library and convert's readers.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from convert.errors import TensorMismatch, UnreadableCheckpoint
from convert.io import safetensors, torch_bin
from convert.io.json_strict import read_object
from convert.io.safetensors import Header

__all__ = ["ORBAX", "Reader", "WeightFiles", "find_weights", "inside"]

ORBAX = "flax_model.orbax"

SETS: tuple[tuple[str, ...], ...] = (
    ("flax_model.safetensors", "model.safetensors", ORBAX),
    ("pytorch_model.bin",),
    ("consolidated*.safetensors", "consolidated*.pth", "consolidated*.pt"),
)
"""Where weights may be. Repositories hold them several times: the first line that is there counts, as in transformers.

A file of the first two lines may be in shards, and has an index then; those of the third hold different keys each.
"""


class Reader(Protocol):
    """One weight file whose header has been checked."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Dtype and shape of every tensor in it."""
        ...

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Give a tensor, read-only; a view of the mapped file where there is one."""
        ...

    def will_need(self, array: NDArray[Any]) -> None:
        """Have the system read an array of this file ahead; do nothing for another's."""
        ...

    def release(self, array: NDArray[Any]) -> None:
        """Give back the memory of an array of this file; do nothing for another's."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Arrays with the face of a weight file."""

    arrays: Mapping[str, NDArray[Any]]

    @property
    def headers(self) -> Mapping[str, Header]:
        """See `Reader.headers`."""
        return {name: Header(array.dtype, array.shape, 0) for name, array in self.arrays.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def will_need(self, array: NDArray[Any]) -> None:
        """See `Reader.will_need`; it is here already."""

    def release(self, array: NDArray[Any]) -> None:
        """See `Reader.release`; it is the caller's."""


@dataclass(frozen=True)
class WeightFiles:
    """The readers of all weight files, and which of them holds each tensor."""

    readers: dict[str, Reader]
    homes: dict[str, str]
    headers: Mapping[str, Header]
    passed_over: tuple[str, ...] = ()
    """Other copies of the weights in the same directory."""

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "WeightFiles":
        """Give arrays in memory the face of one file."""
        reader = InMemory(arrays)
        return cls({"memory": reader}, dict.fromkeys(arrays, "memory"), reader.headers)

    def reader(self, tensor: str) -> Reader:
        """Give the file that holds a tensor."""
        return self.readers[self.homes[tensor]]


def find_weights(root: Path) -> WeightFiles:
    """Open the weight files in a directory: a single file, shards with their index, or Mistral's consolidated ones.

    Raises:
        UnreadableCheckpoint: there are none, or two that count alike, or a file is missing, corrupt or outside.
        TensorMismatch: index and shards disagree about who holds what.
    """
    found = [[entry for pattern in line for entry in _entries(root, pattern)] for line in SETS]
    there = [line for line in found if line]
    if not there or len(there[0]) > 1:
        names = " and ".join(entry[0] for entry in there[0]) if there else ""
        saw = f"found {names}; keep the one that counts" if there else "found none"
        wanted = ", ".join(pattern for line in SETS for pattern in line)
        raise UnreadableCheckpoint(f"{root}: expected one of {wanted}, or an index of the first ones; {saw}")
    passed_over = tuple(name for line in there[1:] for entry in line for name in entry)
    files = there[0][0]
    if not files[0].endswith(".index.json"):
        return _collect({name: _open(inside(root, name)) for name in files}, str(root), passed_over)
    return _indexed(root, root / files[0], passed_over)


def _entries(root: Path, pattern: str) -> Iterator[list[str]]:
    """Give the sets of files that go by a pattern: one of several if it has a star."""
    if "*" in pattern:
        if several := sorted(path.name for path in root.glob(pattern)):
            yield several
        return
    yield from ([name] for name in (pattern, f"{pattern}.index.json") if (root / name).exists())


def _open(path: Path) -> Reader:
    if path.suffix == ".safetensors":
        return safetensors.Reader.open(path)
    if path.suffix == ".orbax":
        from convert.io.orbax import OrbaxReader  # needs JAX, which nothing else here does

        return OrbaxReader.open(path)
    return torch_bin.TorchReader.open(path)


def _indexed(root: Path, index: Path, passed_over: tuple[str, ...]) -> WeightFiles:
    weight_map = _weight_map(inside(root, index.name))
    readers = {name: _open(inside(root, name)) for name in _shards(root, index, weight_map)}
    files = _collect(readers, str(index), passed_over)
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
    if real.exists() and not (real.is_dir() if name == ORBAX else real.is_file()):
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


def _collect(readers: dict[str, Reader], where: str, passed_over: tuple[str, ...]) -> WeightFiles:
    homes: dict[str, str] = {}
    twice = []
    for file, reader in readers.items():
        twice += [f"{tensor} in {homes[tensor]} and {file}" for tensor in reader.headers.keys() & homes.keys()]
        homes.update(dict.fromkeys(reader.headers, file))
    if twice:
        raise TensorMismatch("\n    ".join([f"{where}: tensors are present twice:", *_first(sorted(twice))]))
    headers = {tensor: readers[file].headers[tensor] for tensor, file in homes.items()}
    return WeightFiles(readers, homes, headers, passed_over)


def _first(lines: list[str]) -> list[str]:
    return lines if len(lines) <= 8 else [*lines[:8], f"... and {len(lines) - 8} more"]
