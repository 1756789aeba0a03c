"""A file mapped for reading, whose pages are given back when they have been used: RSS does not grow with the file.

Imports the standard library and NumPy.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

__all__ = ["MappedFile"]


class MappedFile:
    """Read-only arrays over one file. It stays mapped as long as an array over it lives."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._low, self._high = byte_bounds(np.frombuffer(self._map, np.uint8))

    def array(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], start: int, strides: tuple[int, ...] | None = None
    ) -> NDArray[Any]:
        """Give an array over the bytes from `start`; nothing is copied."""
        # frombuffer cannot make bfloat16 or empty arrays from a map; ndarray over the buffer can.
        return np.ndarray(shape, dtype, self._map, start, strides)

    def will_need(self, array: NDArray[Any]) -> None:
        """Have the system read an array's bytes ahead."""
        self._advise(array, mmap.MADV_WILLNEED)

    def release(self, array: NDArray[Any]) -> None:
        """Give an array's pages back; they are read again if somebody looks at them. Other files' arrays are left."""
        self._advise(array, mmap.MADV_DONTNEED)

    def _advise(self, array: NDArray[Any], advice: int) -> None:
        low, high = byte_bounds(array)
        if array.size and self._low <= low and high <= self._high:
            start = (low - self._low) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(advice, start, high - self._low - start)
