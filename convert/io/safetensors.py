"""The safetensors format: a strict reader over a memory map, and a writer that streams.

A file is the header's length (8 bytes, little-endian), the header (JSON) and the tensors' bytes, without a gap.
Imports the standard library, NumPy, ml_dtypes and convert's own errors and JSON.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from convert.errors import UnreadableCheckpoint
from convert.io.json_strict import MAX_JSON_BYTES, parse_object

__all__ = ["DTYPES", "Header", "Reader", "Writer", "as_bits"]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Header(NamedTuple):
    """One tensor's entry: dtype, shape, and where its bytes begin after the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Give the tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def as_bits(array: NDArray[Any]) -> NDArray[Any]:
    """View an array as unsigned integers: NumPy moves those several times faster than bfloat16."""
    return array.view(f"u{array.dtype.itemsize}")


@dataclass(frozen=True)
class Reader:
    """A safetensors file whose header has been checked; tensors are read-only views of the mapped file."""

    path: Path
    headers: Mapping[str, Header]
    data_offset: int

    @classmethod
    def open(cls, path: Path) -> "Reader":
        """Read and check the header; no tensor's bytes are read.

        Raises:
            UnreadableCheckpoint: the file is missing, truncated, or its header is not what it must be.
        """
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                    limit = f"the file has {size:,} bytes and a header may have {MAX_JSON_BYTES:,}"
                    raise UnreadableCheckpoint(
                        f"{path}: truncated or no safetensors: header of {length:,} bytes, {limit}"
                    )
                raw = parse_object(file.read(length), f"{path}: header")
        except OSError as error:
            raise UnreadableCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
        raw.pop("__metadata__", None)
        headers = {name: _entry(entry, f"{path}: tensor {name[:200]!r}") for name, entry in raw.items()}
        _check_cover(headers, size - 8 - length, path)
        return cls(path, headers, 8 + length)

    @cached_property
    def _map(self) -> NDArray[np.uint8]:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def __getitem__(self, name: str) -> NDArray[Any]:
        header = self.headers[name]
        # frombuffer cannot make bfloat16 or empty arrays from a map; ndarray over the buffer can, and copies nothing.
        return np.ndarray(header.shape, header.dtype, self._map.data, self.data_offset + header.start)


def _entry(entry: Any, where: str) -> Header:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnreadableCheckpoint(f"{where}: expected dtype, shape and data_offsets, got {str(entry)[:100]}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise UnreadableCheckpoint(f"{where}: dtype {str(entry['dtype'])[:40]!r}, expected one of {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise UnreadableCheckpoint(f"{where}: {key} {str(numbers)[:100]} is not a list of counts")
    if len(shape) > 32 or len(offsets) != 2:
        raise UnreadableCheckpoint(f"{where}: {len(shape)} dimensions and {len(offsets)} offsets, expected few and 2")
    header = Header(DTYPES[entry["dtype"]], tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != header.nbytes:
        raise UnreadableCheckpoint(
            f"{where}: {entry['dtype']} {shape} takes {header.nbytes} bytes, data_offsets span {offsets}"
        )
    return header


def _check_cover(headers: Mapping[str, Header], data_bytes: int, path: Path) -> None:
    """Check that the tensors tile the data: an overlap, a gap or a byte too many or too few is refused."""
    end = 0
    for name, header in sorted(headers.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if header.start != end:
            fault = "overlaps the one before" if header.start < end else "leaves a gap before it"
            raise UnreadableCheckpoint(
                f"{path}: tensor {name[:200]!r} starts at {header.start}, expected {end}: it {fault}"
            )
        end += header.nbytes
        if end > data_bytes:
            raise UnreadableCheckpoint(
                f"{path}: truncated inside tensor {name[:200]!r}: its bytes end at {end:,} and the file's at "
                f"{data_bytes:,}; fetch this file again"
            )
    if end < data_bytes:
        raise UnreadableCheckpoint(f"{path}: {data_bytes - end:,} bytes follow the last tensor that the header lists")


class Writer:
    """Writes one file tensor by tensor under a temporary name beside `path`, and renames it when all is on disk."""

    def __init__(self, path: Path, tensors: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]], format: str) -> None:
        """Lay the file out; equal arguments give equal bytes.

        Args:
            path: the file to make.
            tensors: name, dtype and shape of each tensor.
            format: the value of "format" in the metadata; transformers insists on one.
        """
        self.path, self.headers, start = path, dict[str, Header](), 0
        # Wide elements first, as the safetensors library does: then every tensor is aligned.
        for name, dtype, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
            self.headers[name] = Header(dtype, shape, start)
            start += self.headers[name].nbytes
        raw = json.dumps({"__metadata__": {"format": format}, **{n: _raw(h) for n, h in self.headers.items()}})
        header = raw.encode() + b" " * (-len(raw.encode()) % 8)
        self._data_offset = 8 + len(header)
        self._partial = path.with_name(f".{path.name}.partial")
        self._file = self._partial.open("wb")
        self._file.write(len(header).to_bytes(8, "little") + header)

    def write(self, name: str, pieces: Iterable[NDArray[Any]]) -> None:
        """Write one tensor, given as the pieces that follow each other in it."""
        header = self.headers[name]
        self._file.seek(self._data_offset + header.start)
        written = sum(self._file.write(np.ascontiguousarray(as_bits(piece)).data) for piece in pieces)
        assert written == header.nbytes, f"{name}: {written} bytes for {header.nbytes}"

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Bring the file under its name, or remove it if something failed."""
        if kind is not None:
            self._file.close()
            self._partial.unlink()
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)


def _raw(header: Header) -> dict[str, Any]:
    offsets = [header.start, header.start + header.nbytes]
    return {"dtype": _CODES[header.dtype], "shape": list(header.shape), "data_offsets": offsets}
