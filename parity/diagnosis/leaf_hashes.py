"""Hashes of weights that survive a permutation: of each row, and of all values whatever their order. NumPy only."""

import numpy as np

from parity.trace import Array

__all__ = ["bits", "multiset_hash", "row_hashes"]

CHUNK = 1 << 22
"""Values widened at a time: 32 MB."""

SEED = 20_231_211


def bits(array: Array) -> Array:
    """View an array's values as unsigned integers of the same width."""
    unsigned: Array = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    return unsigned


def row_hashes(kernel: Array) -> Array:
    """Hash each output's weights.

    Args:
        kernel: [in, out].

    Returns:
        [out] uint64, a random linear form of the mixed bits along `in`: equal rows have equal hashes.
    """
    rows = bits(kernel.T)
    factors = np.random.default_rng(SEED).integers(1, 2**64, rows.shape[1], dtype=np.uint64, endpoint=False)
    step = max(CHUNK // rows.shape[1], 1)
    parts = [_mixed(rows[start : start + step]) @ factors for start in range(0, len(rows), step)]
    return np.concatenate(parts)


def multiset_hash(array: Array) -> int:
    """Hash all values without regard to their order or shape."""
    flat = bits(array).reshape(-1)
    parts = (_mixed(flat[start : start + CHUNK]).sum(dtype=np.uint64) for start in range(0, flat.size, CHUNK))
    return sum(int(part) for part in parts) % 2**64


def _mixed(unsigned: Array) -> Array:
    """Spread each value over 64 bits (the finaliser of splitmix64)."""
    x = unsigned.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ (x >> np.uint64(31))
    return mixed
