"""PyTorch's zip files (.bin, .pt, .pth): the tensors' bytes are mapped, the pickle beside them is read as data.

Nothing is unpickled by Python: convert.io.torch_pickle runs the few opcodes that a dictionary of tensors needs.
Source: torch 2.13, serialization.py (`_save`, `_load`). Imports the standard library, NumPy and convert's own.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from convert.errors import UnreadableCheckpoint
from convert.io.mapping import MappedFile
from convert.io.safetensors import Header
from convert.io.torch_pickle import StoredTensor, read_state_dict

__all__ = ["TorchReader"]

MAX_PICKLE_BYTES, MAX_MEMBERS = 10_000_000, 200_000
LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class TorchReader:
    """A file of torch.save whose pickle has been checked; tensors are read-only views of the mapped file."""

    path: Path
    headers: Mapping[str, Header]
    strides: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path) -> "TorchReader":
        """Read the directory of the zip and the pickle; no tensor's bytes are read.

        Raises:
            UnreadableCheckpoint: the file is missing, truncated, of the format before 1.6, or holds more than tensors.
        """
        try:
            with path.open("rb") as file:
                if file.read(4) != b"PK\x03\x04":
                    raise UnreadableCheckpoint(
                        f"{path}: no zip file. If it is of torch.save before 1.6 (2020), load it in PyTorch with "
                        "weights_only=True and save it again; better, as safetensors"
                    )
                return cls._open(path, file)
        except OSError as error:
            raise UnreadableCheckpoint(f"{path}: cannot be read: {error.strerror or error}") from error
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, EOFError) as error:
            raise UnreadableCheckpoint(f"{path}: truncated or corrupt: {str(error)[:200]}") from error

    @classmethod
    def _open(cls, path: Path, file: BinaryIO) -> "TorchReader":
        with zipfile.ZipFile(file) as archive:
            members = _members(archive, path)
            root = next((name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")), None)
            if root is None or root.count("/") != 1:
                raise UnreadableCheckpoint(f"{path}: holds no data.pkl; is it a file of torch.save?")
            order = members.get(root + "byteorder")
            if order is not None and (order.file_size > 10 or archive.read(order) != b"little"):
                raise UnreadableCheckpoint(f"{path}: big-endian; save it again on a little-endian machine")
            pickled = members[root + "data.pkl"]
            if pickled.file_size > MAX_PICKLE_BYTES:
                raise UnreadableCheckpoint(f"{path}: a pickle of {pickled.file_size:,} bytes is more than names")
            tensors = read_state_dict(archive.read(pickled), str(path))
        headers, strides, places = dict[str, Header](), dict[str, tuple[int, ...]](), dict[str, int]()
        for name, tensor in tensors.items():
            member = members.get(f"{root}data/{tensor.key}")
            if member is None or member.file_size != tensor.storage_numel * tensor.dtype.itemsize:
                raise UnreadableCheckpoint(f"{path}: tensor {name[:200]!r}: its storage is missing or cut short")
            if tensor.key not in places:
                places[tensor.key] = _data_start(file, member, path)
            start = places[tensor.key] + tensor.offset * tensor.dtype.itemsize
            headers[name] = Header(tensor.dtype, tensor.shape, start)
            strides[name] = _byte_strides(tensor)
        return cls(path, headers, strides)

    @cached_property
    def _map(self) -> MappedFile:
        return MappedFile(self.path)

    def __getitem__(self, name: str) -> NDArray[Any]:
        header = self.headers[name]
        array = self._map.array(header.shape, header.dtype, header.start, self.strides[name])
        return array if array.flags.aligned else np.array(array)

    def will_need(self, array: NDArray[Any]) -> None:
        """Have the system read an array of this file ahead."""
        self._map.will_need(array)

    def release(self, array: NDArray[Any]) -> None:
        """Give back the pages of an array of this file; an array of another file is left alone."""
        self._map.release(array)


def _byte_strides(tensor: StoredTensor) -> tuple[int, ...]:
    return tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """List the members, all of them stored as they are, none twice."""
    members: dict[str, zipfile.ZipInfo] = {}
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise UnreadableCheckpoint(f"{path}: {len(infos):,} members, at most {MAX_MEMBERS:,} expected")
    for info in infos:
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if info.filename in members or not stored or info.flag_bits & 1:
            raise UnreadableCheckpoint(
                f"{path}: member {info.filename[:100]!r} is there twice, compressed or encrypted, which torch.save "
                "never does"
            )
        members[info.filename] = info
    return members


def _data_start(file: BinaryIO, member: zipfile.ZipInfo, path: Path) -> int:
    """Find where a member's bytes begin: after its local header, which has lengths of its own."""
    file.seek(member.header_offset)
    local = file.read(LOCAL_HEADER_BYTES)
    start = member.header_offset + LOCAL_HEADER_BYTES
    start += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if local[:4] != b"PK\x03\x04" or start + member.file_size > path.stat().st_size:
        raise UnreadableCheckpoint(f"{path}: member {member.filename[:100]!r} does not lie in the file")
    return start
