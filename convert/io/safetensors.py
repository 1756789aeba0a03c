"""The safetensors format: a strict reader over a memory map, and a writer that streams.

A file is the header's length (8 bytes, little-endian), the header (JSON) and the tensors' bytes, without a gap.
Imports the standard library, NumPy, ml_dtypes and convert's own errors and JSON.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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
from convert.io.mapping import MappedFile

__all__ = ["DTYPES", "PAGE_BYTES", "Header", "Reader", "Writer", "as_bits"]

PAGE_BYTES = 4096
"""What the address, place and length of a direct write must be a multiple of; no disk in use asks for more."""

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
    def _map(self) -> MappedFile:
        return MappedFile(self.path)

    def __getitem__(self, name: str) -> NDArray[Any]:
        header = self.headers[name]
        return self._map.array(header.shape, header.dtype, self.data_offset + header.start)

    def will_need(self, array: NDArray[Any]) -> None:
        """Have the system read an array of this file ahead."""
        self._map.will_need(array)

    def release(self, array: NDArray[Any]) -> None:
        """Give back the pages of an array of this file; an array of another file is left alone."""
        self._map.release(array)


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
    """Writes one file in place, at any offset and again where it was written before; fsynced when it is left.

    Whole pages are written past the system's page cache where it allows that: no copy, nothing left to do at the end.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]], format: str) -> None:
        """Lay the file out; equal arguments give equal bytes.

        Args:
            path: the file to make, or one of the same layout that was begun; what it holds is kept.
            tensors: name, dtype and shape of each tensor.
            format: the value of "format" in the metadata; transformers insists on one.
        """
        self.headers, start = dict[str, Header](), 0
        # Whole pages first: the header is padded to a page, so each of these begins one. Of the others wide elements
        # first, as the safetensors library does: then every tensor is aligned.
        for name, dtype, shape in sorted(tensors, key=lambda tensor: (not _is_paged(*tensor), -tensor[1].itemsize)):
            self.headers[name] = Header(dtype, shape, start)
            start += self.headers[name].nbytes
        raw = json.dumps({"__metadata__": {"format": format}, **{n: _raw(h) for n, h in self.headers.items()}})
        header = raw.encode() + b" " * (-(8 + len(raw.encode())) % PAGE_BYTES)
        self._data_offset = 8 + len(header)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        self._direct = _open_direct(path)
        try:
            self._lay_out(len(header).to_bytes(8, "little") + header, self._data_offset + start)
        except BaseException:
            self._close()
            raise

    def _lay_out(self, header: bytes, size: int) -> None:
        """Take the disk now rather than run out of it later, where that does not make writing slow."""
        os.truncate(self._file, size)
        if self._direct is not None:  # through the page cache, some file systems are slow to fill what was so taken
            try:
                os.posix_fallocate(self._file, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        _write_all(self._file, header, 0)

    def write(self, name: str, at: int, data: NDArray[np.uint8]) -> None:
        """Write bytes from byte `at` of a tensor on; fastest if they begin and end, there and in memory, with pages."""
        header = self.headers[name]
        assert at + data.nbytes <= header.nbytes, f"{name}: {at + data.nbytes} bytes for {header.nbytes}"
        offset = self._data_offset + header.start + at
        aligned = (offset | data.nbytes | data.ctypes.data) % PAGE_BYTES == 0
        if aligned and self._direct is not None:
            try:
                _write_all(self._direct, data.data, offset)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # not on this file system, after all
                    raise
        _write_all(self._file, data.data, offset)

    def read(self, name: str, chunk_bytes: int = 1 << 24) -> Iterator[bytes]:
        """Read back what is in the place of a tensor."""
        header = self.headers[name]
        offset = self._data_offset + header.start
        for start in range(0, header.nbytes, chunk_bytes):
            yield os.pread(self._file, min(chunk_bytes, header.nbytes - start), offset + start)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Bring the file to disk, unless something failed."""
        try:
            if kind is None:
                os.fsync(self._file)
                if hasattr(os, "posix_fadvise"):  # the cache must not answer for what was written past it
                    os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            self._close()

    def _close(self) -> None:
        os.close(self._file)
        if self._direct is not None:
            os.close(self._direct)


def _is_paged(_name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    return math.prod(shape) * dtype.itemsize % PAGE_BYTES == 0


def _open_direct(path: Path) -> int | None:
    """Open a file a second time, past the page cache; None where the system or the file system has no such thing."""
    with suppress(AttributeError, OSError):
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    return None


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _raw(header: Header) -> dict[str, Any]:
    offsets = [header.start, header.start + header.nbytes]
    return {"dtype": _CODES[header.dtype], "shape": list(header.shape), "data_offsets": offsets}
