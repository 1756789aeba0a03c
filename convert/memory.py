"""Memory that JAX takes over as it lies.

Imports NumPy.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["CACHE_LINE_BYTES", "on_cache_line"]

CACHE_LINE_BYTES = 64
"""Where memory must begin for JAX to take it over instead of copying it."""


def on_cache_line(nbytes: int) -> NDArray[np.uint8]:
    """Give memory that begins where a cache line does, of whatever content."""
    held = np.empty(nbytes + CACHE_LINE_BYTES, np.uint8)
    start = -held.ctypes.data % CACHE_LINE_BYTES
    return held[start : start + nbytes]
