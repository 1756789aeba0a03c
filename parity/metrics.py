"""The four statistics of an error, and the margin of one side's error over the other's. NumPy only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

from parity.trace import Array

__all__ = ["UNIT_ROUNDOFF", "Margin", "Precision", "Statistics", "margin", "statistics"]

Precision = Literal["float32", "bfloat16"]

UNIT_ROUNDOFF: dict[str, float] = {
    "float32": float(np.finfo(np.float32).eps) / 2,
    "bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2,
}
"""The largest relative error of rounding once to a dtype: a side cannot be asked to be closer to the truth."""


TINY = float(np.finfo(np.float64).tiny)

CHUNK = 1 << 15
"""Elements that are summed up at a time."""


class Statistics(NamedTuple):
    """How large an error is, in four ways."""

    pooled: float
    worst_token: float
    worst_channel: float
    largest: float


@dataclass(frozen=True, slots=True)
class Margin:
    """How much farther from the exact answer Flax is than torch, in the statistic where that is worst.

    Args:
        value: the ratio; 1 is as close as torch.
        statistic: the name of that statistic.
        torch_error: pooled RMS error of torch relative to the exact array's RMS.
        flax_error: the same of Flax.
    """

    value: float
    statistic: str
    torch_error: float
    flax_error: float


def statistics(error_RC: Array, exact_RC: Array) -> Statistics:
    """Sum an error up.

    Args:
        error_RC: [rows, channels] float64, a side's array minus the exact one.
        exact_RC: [rows, channels] float64.

    Returns:
        RMS over everything; the largest over rows of RMS error / RMS magnitude; the same over channels; the largest
        absolute element. A row or channel that is (nearly) zero counts with a 2**-24 part of the array's magnitude.
        Of a single row, channels are elements, whose own relative errors say nothing about rounding: there the channel
        statistic is that of the row; and the same the other way round.
    """
    return _relate(_sizes([_squares(error_RC)]), _sizes([_squares(exact_RC)]))


def margin(torch_RC: Array, flax_RC: Array, exact_RC: Array, unit_roundoff: float) -> Margin:
    """Compare both sides' errors against the exact answer for the same input.

    Args:
        torch_RC: [rows, channels], any float dtype, finite, not empty.
        flax_RC: the same of Flax.
        exact_RC: the oracle's, float64.
        unit_roundoff: of the dtype that both sides compute in.

    Returns:
        The largest of the four ratios stat(Flax's error) / max(stat(torch's error), unit_roundoff * magnitude).
    """
    parts: list[tuple[_Squares, _Squares, _Squares]] = []
    for rows in _chunks(exact_RC.shape):
        exact, torch, flax = exact_RC[rows], torch_RC[rows].astype(np.float64), flax_RC[rows].astype(np.float64)
        parts.append((_squares(exact), _squares(torch - exact), _squares(flax - exact)))
    of_exact, of_torch, of_flax = zip(*parts, strict=True)
    exact_sizes = _sizes(of_exact)
    torch_stats, flax_stats = (_relate(_sizes(squares), exact_sizes) for squares in (of_torch, of_flax))
    # The two relative statistics have magnitude 1; the two absolute ones that of the array and of its largest element.
    one_rounding = Statistics(exact_sizes.pooled, 1.0, 1.0, exact_sizes.largest)
    ratios = {
        name: flax / max(torch, unit_roundoff * unit, TINY)
        for name, flax, torch, unit in zip(Statistics._fields, flax_stats, torch_stats, one_rounding, strict=True)
    }
    worst = max(ratios, key=lambda name: ratios[name])
    relative = max(exact_sizes.pooled, TINY)
    return Margin(ratios[worst], worst, torch_stats.pooled / relative, flax_stats.pooled / relative)


class _Squares(NamedTuple):
    """Of some rows: their mean squares, their sum of squares in every channel, and the largest absolute element."""

    of_row_R: Array
    of_channel_C: Array
    largest: float


class _Sizes(NamedTuple):
    """RMS of an array, of its rows and of its channels, and its largest absolute element."""

    pooled: float
    of_row_R: Array
    of_channel_C: Array
    largest: float


def _chunks(shape_RC: tuple[int, ...]) -> Iterator[slice]:
    """Cut rows so that what is computed from them stays in a processor's cache: logits have many columns."""
    step = max(1, CHUNK // shape_RC[1])
    return (slice(start, start + step) for start in range(0, shape_RC[0], step))


def _squares(x_RC: Array) -> _Squares:
    squares_RC = np.square(x_RC)
    return _Squares(squares_RC.mean(axis=1), squares_RC.sum(axis=0), float(max(x_RC.max(), -x_RC.min())))


def _sizes(parts: Sequence[_Squares]) -> _Sizes:
    squares_R = np.concatenate([part.of_row_R for part in parts])
    squares_C = sum(part.of_channel_C for part in parts) / len(squares_R)
    largest = max(part.largest for part in parts)
    return _Sizes(float(np.sqrt(squares_R.mean())), np.sqrt(squares_R), np.sqrt(squares_C), largest)


def _relate(error: _Sizes, exact: _Sizes) -> Statistics:
    floor = max(exact.pooled * 2.0**-24, TINY)
    worst_row = float((error.of_row_R / np.maximum(exact.of_row_R, floor)).max())
    worst_channel = float((error.of_channel_C / np.maximum(exact.of_channel_C, floor)).max())
    if len(error.of_row_R) == 1:
        worst_channel = worst_row
    elif len(error.of_channel_C) == 1:
        worst_row = worst_channel
    return Statistics(error.pooled, worst_row, worst_channel, error.largest)
