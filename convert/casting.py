"""Casts that were asked for, what they lose, and values that are no numbers.

Imports the standard library, NumPy and ml_dtypes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

__all__ = ["CASTS", "Loss", "cast", "count_non_finite", "rounded"]

CASTS: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


EXPONENTS: dict[str, int] = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF << 52}
"""The bits that are all set in NaN and infinity, and in nothing else."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How many values of a tensor a cast changed."""

    values: int = 0
    changed: int = 0
    """Values that differ afterwards, those below among them."""
    to_infinity: int = 0
    """Finite values too large for the new dtype."""
    to_zero: int = 0

    def __add__(self, other: "Loss") -> "Loss":
        mine, theirs = asdict(self), asdict(other)
        return Loss(**{key: mine[key] + theirs[key] for key in mine})


def cast(array: NDArray[Any], dtype: np.dtype[Any]) -> tuple[NDArray[Any], Loss]:
    """Round an array to a dtype, to nearest even, and count what changes.

    Args:
        array: floating point, any shape.
        dtype: one of CASTS.

    Returns:
        The array in the new dtype (the same one if it has it already), and the loss; a NaN that stays one is no loss.
    """
    if array.dtype == dtype:
        return array, Loss(array.size)
    found = rounded(array, dtype)
    if dtype.itemsize > array.dtype.itemsize:  # a wider floating dtype holds every value of a narrower one
        return found, Loss(array.size)
    back = rounded(found, array.dtype)
    with np.errstate(invalid="ignore"):  # NaN is no surprise here either
        changed = (back != array) & ~(np.isnan(back) & np.isnan(array))
    return found, Loss(
        values=array.size,
        changed=int(np.count_nonzero(changed)),
        to_infinity=int(np.count_nonzero(changed & np.isinf(found))),
        to_zero=int(np.count_nonzero(changed & (found == 0))),
    )


def rounded(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round an array to a dtype, to nearest even; the same array if it has it already. Its axes keep their order."""
    with np.errstate(all="ignore"):  # overflow and underflow are for `cast` to count, NaN is no surprise
        return array.astype(dtype, copy=False)


def count_non_finite(bits: NDArray[Any], dtype: np.dtype[Any]) -> int:
    """Count NaN and infinite values among the bits of floating-point values; 0 for a dtype that is not followed."""
    if dtype.name not in EXPONENTS or not bits.size:
        return 0
    infinity = EXPONENTS[dtype.name]
    sign = 1 << (8 * bits.itemsize - 1)
    # As integers, what is not finite comes last: among the positive values, and among all.
    if bits.view(f"i{bits.itemsize}").max() < infinity and bits.max() < sign | infinity:
        return 0
    mask = bits.dtype.type(infinity)
    return int(np.count_nonzero(bits & mask == mask))
