"""Copies that bring axes into order, as fast as NumPy alone can make them.

Imports the standard library, NumPy and convert's readers and writers.
"""

from collections.abc import Iterator
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.io.safetensors import PAGE_BYTES, as_bits

__all__ = ["BLOCK_BYTES", "TILE", "blocks", "contiguous"]

BLOCK_BYTES = 2 << 20
"""Small enough to be still in the cache when it is hashed."""

LINE = 32
"""Rows that fill a cache line of a transposed source, at two bytes each."""

TILE, TILE_GAP_BYTES = 256, 64
"""Rows and columns of a tile, which the second cache holds, and what keeps its rows from falling on the same lines."""


def blocks(array: NDArray[Any], block_bytes: int = BLOCK_BYTES) -> Iterator[NDArray[Any]]:
    """Cut an array along its first axis into views of about block_bytes that follow each other in C order."""
    if array.nbytes <= block_bytes or array.ndim == 0:
        yield array
        return
    row_bytes = array.nbytes // len(array)
    rows = max(1, block_bytes // row_bytes)
    paged = PAGE_BYTES // gcd(PAGE_BYTES, row_bytes)  # so many rows fill whole pages of the target
    for unit in (max(TILE, paged), max(LINE, paged), LINE):
        if rows >= unit:
            rows -= rows % unit
            break
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def contiguous(array: NDArray[Any], buffer: NDArray[np.uint8] | None = None) -> NDArray[Any]:
    """Give an array's elements as unsigned integers in C order.

    Args:
        array: any shape, any order of axes.
        buffer: at least as many bytes, to hold the result; None for the same memory where that is in order already,
            and a new array where not.
    """
    bits = as_bits(array)
    if buffer is None and bits.flags.c_contiguous:
        return bits
    held = np.empty(bits.nbytes, np.uint8) if buffer is None else buffer[: bits.nbytes]
    target = held.view(bits.dtype).reshape(bits.shape)
    source = _as_matrix(bits)
    if source is None or source.strides[0] >= source.strides[1]:
        np.copyto(target, bits)
    else:
        _transpose(source, target.reshape(source.shape))
    return target


def _transpose(source: NDArray[Any], target: NDArray[Any]) -> None:
    """Copy a matrix whose columns lie in memory one after the other, tile by tile.

    A tile is first copied as it lies: a source's columns may be a power of two apart, and few lines of a cache serve
    such addresses.
    """
    tile = np.empty((TILE, TILE + TILE_GAP_BYTES // source.itemsize), source.dtype)
    rows, columns = source.shape
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            part = source[top : top + TILE, left : left + TILE].T
            held = tile[: part.shape[0], : part.shape[1]]
            held[...] = part
            target[top : top + TILE, left : left + TILE] = held.T


def _as_matrix(bits: NDArray[Any]) -> NDArray[Any] | None:
    """Merge all axes but the last, or all but the first, where that copies nothing."""
    if bits.ndim < 2:
        return None
    for shape in ((-1, bits.shape[-1]), (bits.shape[0], -1)):
        try:
            return bits.reshape(shape, copy=False)
        except ValueError:
            continue
    return None
