"""A view's tensors in memory, in C order: mapped where the file has them so, else moved by several threads.

Imports the standard library, NumPy, and convert's checkpoint.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.casting import cast
from convert.checkpoint import View
from convert.transpose import blocks, contiguous

__all__ = ["CACHE_LINE_BYTES", "THREADS", "InMemory", "on_cache_line"]

CACHE_LINE_BYTES = 64
"""Where memory must begin for JAX to take it over instead of copying it."""

THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class InMemory(Mapping[str, NDArray[Any]]):
    """A mapping from tensor names to arrays, each brought into order on access.

    Beside the arrays that the caller keeps, no more than one piece of a tensor (of a stacked one, one expert) is held.
    Every array begins on a cache line. A mapped one is read-only, and shows the file as long as it lives.
    """

    view: View
    dtype: np.dtype[Any] | None
    """To cast to; None to leave every value as it is."""
    threads: Executor

    def __getitem__(self, name: str) -> NDArray[Any]:
        mapped = self.view.mapped(name)
        if mapped is not None and self._is_ready(mapped):
            return mapped
        dtype = self.view.dtype(name) if self.dtype is None else self.dtype
        shape = self.view.shape(name)
        whole = on_cache_line(int(np.prod(shape, dtype=object)) * dtype.itemsize)
        at = 0
        for piece in list(self.view.pieces(name)):  # all at once, so that the system reads ahead
            moves = []
            for block in blocks(piece):
                nbytes = block.size * dtype.itemsize
                moves.append(self.threads.submit(self._move, block, whole[at : at + nbytes]))
                at += nbytes
            for move in moves:
                move.result()
            self.view.release(name, piece)
        return whole.view(dtype).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.view)

    def __len__(self) -> int:
        return len(self.view)

    def _is_ready(self, array: NDArray[Any]) -> bool:
        aligned = array.ctypes.data % CACHE_LINE_BYTES == 0
        return aligned and array.flags.c_contiguous and self.dtype in (None, array.dtype)

    def _move(self, block: NDArray[Any], target: NDArray[np.uint8]) -> None:
        contiguous(block if self.dtype is None else cast(block, self.dtype)[0], target)


def on_cache_line(nbytes: int) -> NDArray[np.uint8]:
    """Give memory that begins where a cache line does, of whatever content."""
    held = np.empty(nbytes + CACHE_LINE_BYTES, np.uint8)
    start = -held.ctypes.data % CACHE_LINE_BYTES
    return held[start : start + nbytes]
