"""Memory for weights: aligned so that JAX takes it over without a copy, and taken again by the next block.

Imports the standard library, NumPy and convert.memory.
"""

import math
import mmap
import weakref
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from convert.memory import on_cache_line
from parity.trace import Array

__all__ = ["Pages"]

LARGE = 4 << 20
WASTE = 4
"""A free span more than so many times as large as an array stays whole, for the matrices that it was made for."""


class Span(NamedTuple):
    """A part of a mapping that no array lies in."""

    mapping: mmap.mmap
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.stop - self.start


class Pages:
    """Gives memory for arrays and keeps what is large when they are gone, for the next ones.

    A block's weights are gigabytes that come and go with every side and layer. Memory that the system has taken back
    has to be cleared, and in a virtual machine often fetched from the host, which takes longer than filling it.
    """

    def __init__(self) -> None:
        self._free: list[Span] = []
        self._returned: deque[Span] = deque()
        """What has not been merged yet: an array may go at any moment, also in the midst of `take`."""

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Make an array that begins where a cache line does; its values are whatever is there."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux has it
            return on_cache_line(nbytes).view(dtype).reshape(shape)
        span = self._span(nbytes + -nbytes % mmap.PAGESIZE)
        array = np.ndarray(shape, dtype, span.mapping, span.start)
        weakref.finalize(array, self._returned.append, span).atexit = False
        return array

    def give_back(self) -> None:
        """Let the system have what no array lies in."""
        self._free.clear()
        self._returned.clear()

    def _span(self, nbytes: int) -> Span:
        """Cut the smallest free span that is large enough and not too large, or map new memory."""
        while self._returned:
            self._merge(self._returned.popleft())
        fits = (span for span in self._free if nbytes <= span.nbytes <= WASTE * nbytes)
        best = min(fits, key=lambda span: span.nbytes, default=None)
        if best is None:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            mapping.madvise(mmap.MADV_HUGEPAGE)  # there are fewer of them to touch for the first time
            return Span(mapping, 0, nbytes)
        self._free.remove(best)
        cut = best.start + nbytes
        if cut < best.stop:
            self._free.append(best._replace(start=cut))
        return best._replace(stop=cut)

    def _merge(self, span: Span) -> None:
        """Add a span to the free ones, joined with its neighbours."""
        for other in [other for other in self._free if other.mapping is span.mapping]:
            if other.stop == span.start or other.start == span.stop:
                self._free.remove(other)
                span = span._replace(start=min(span.start, other.start), stop=max(span.stop, other.stop))
        self._free.append(span)
