"""Copies that change the order of axes, as fast as NumPy alone can make them.

Imports the standard library, NumPy and the reader's view of arrays as bits.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.io.safetensors import as_bits

__all__ = ["BLOCK_BYTES", "blocks", "contiguous"]

BLOCK_BYTES = 2 << 20
"""Small enough to be still in the cache when it is hashed and written."""

STRIP_BYTES, STRIP_ROWS = 32, 1024
"""What a strip has of each target row (half a cache line), and how many rows (as the second-level cache holds)."""


def blocks(array: NDArray[Any], block_bytes: int = BLOCK_BYTES) -> Iterator[NDArray[Any]]:
    """Cut an array along its first axis into views of about block_bytes that follow each other in C order."""
    if array.nbytes <= block_bytes or array.ndim == 0:
        yield array
        return
    row_bytes = array.nbytes // len(array)
    rows = max(1, block_bytes // row_bytes)
    rows = rows // 32 * 32 or rows  # whole cache lines of a transposed source
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """Give an array's elements as unsigned integers in C order: the same memory if it is in that order already."""
    bits = as_bits(array)
    if bits.flags.c_contiguous:
        return bits
    source = _as_matrix(bits)
    if source is None or source.strides[0] > source.strides[1]:
        return np.ascontiguousarray(bits)
    target = np.empty(source.shape, bits.dtype)
    rows, columns = source.shape
    width = STRIP_BYTES // bits.itemsize
    for top in range(0, rows, STRIP_ROWS):
        for left in range(0, columns, width):
            strip = np.s_[top : top + STRIP_ROWS, left : left + width]
            target[strip] = source[strip]
    return target.reshape(bits.shape)


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
