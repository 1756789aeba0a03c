"""What the size of an error in several dtypes means. Imports parity.metrics only."""

from collections.abc import Mapping

import numpy as np

from parity.metrics import UNIT_ROUNDOFF

__all__ = ["slope"]

FLAT = 30.0
"""Errors in two dtypes within this factor are the same error: their roundoffs are 65,536 apart and more."""


def slope(errors_by_dtype: Mapping[str, float]) -> str:
    """Say in one sentence what an error's size in several dtypes means.

    Args:
        errors_by_dtype: relative error of the same point in float64, float32 and bfloat16, as far as known.
    """
    shown = ", ".join(f"{error:.2g} in {dtype}" for dtype, error in errors_by_dtype.items())
    units = {"float64": float(np.finfo(np.float64).eps) / 2, **UNIT_ROUNDOFF}
    wide = [error for dtype, error in errors_by_dtype.items() if dtype != "bfloat16"]
    narrow = errors_by_dtype.get("bfloat16")
    roundings = {dtype: error / units[dtype] for dtype, error in errors_by_dtype.items()}
    if len(errors_by_dtype) < 2:
        return f"relative error {shown}: one dtype has no slope"
    if max(errors_by_dtype.values()) <= FLAT * min(errors_by_dtype.values()):
        return f"relative error {shown}: the same whatever the rounding, so logic or weights"
    if max(roundings.values()) <= FLAT * min(roundings.values()):
        return f"relative error {shown}: in proportion to the rounding, so rounding alone"
    if narrow is not None and wide and all(roundings[d] <= FLAT for d in errors_by_dtype if d != "bfloat16"):
        return f"relative error {shown}: only bfloat16 is off, so something is not upcast"
    return f"relative error {shown}: neither flat nor in proportion to the rounding"
