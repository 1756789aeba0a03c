"""The verdict on one comparison point: pass, fail, or unchecked. What is not there, or not finite, never passes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from parity.metrics import UNIT_ROUNDOFF, Precision, margin
from parity.points import Point
from parity.trace import Array

__all__ = ["MARGIN_LIMIT", "UNEQUAL_LIMIT", "Finding", "Mode", "Place", "Verdict", "judge", "judge_equal", "overall"]

Verdict = Literal["pass", "fail", "unchecked"]
Mode = Literal["local", "operation", "propagated", "reference", "whole", "backward", "cache"]

MARGIN_LIMIT = {"float32": 10.0, "bfloat16": 4.0}
"""The largest margin that passes: between the worst correct variant and the weakest fault of docs/tolerances.md."""


UNEQUAL_LIMIT = 0.01
"""The largest share of a single bfloat16 operation's elements that may differ from torch's, on torch's own input. Where
both round at the same places only a float32 sum in another order tells them apart, and that is rare. A lost upcast or
another place of rounding changes many times more (docs/tolerances.md), although no result is farther from the truth."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one point of one layer in one batch and mode.

    Args:
        layer: 0-based; None before the first and after the last block.
        point: its name in the traces.
        mode: how Flax came by its input: the block's from torch (local), the single operation's from torch (operation),
            its own stream (propagated), or the model as users run it (whole). In mode reference it is torch itself, run
            as users run it, against its own walk. In mode backward the point is a gradient of the training loss; in
            mode cache the model continues a prompt.
        batch: the batch's name.
        verdict: pass, fail or unchecked.
        margin: Flax's error over torch's, None where there is none to compute.
        statistic: the statistic in which the margin is largest.
        torch_error: relative RMS error of torch.
        flax_error: relative RMS error of Flax.
        forced: whether Flax was given torch's routing here, since its own differed.
        reason: why it failed or could not be checked, in words.
        dtype: what both sides computed in.
        decides: whether the verdict of the run depends on it; what does not decide informs.
        unequal: share of elements that are not torch's, of a single operation in bfloat16.
    """

    layer: int | None
    point: str
    mode: Mode
    batch: str
    verdict: Verdict
    margin: float | None = None
    statistic: str | None = None
    torch_error: float | None = None
    flax_error: float | None = None
    forced: bool = False
    reason: str | None = None
    dtype: Precision = "float32"
    decides: bool = True
    unequal: float | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a comparison stands; the part of a finding that is known before it is judged."""

    layer: int | None
    mode: Mode
    batch: str
    dtype: Precision
    forced: bool = False
    decides: bool = True

    def finding(self, point: str, verdict: Verdict, reason: str | None = None) -> Finding:
        """Make a finding without numbers."""
        return Finding(
            self.layer,
            point,
            self.mode,
            self.batch,
            verdict,
            forced=self.forced,
            reason=reason,
            dtype=self.dtype,
            decides=self.decides,
        )


def judge(
    name: str,
    point: Point,
    place: Place,
    torch: Array | None,
    flax: Array | None,
    exact: Array | None,
    *,
    rows: Array | None = None,
    recorded_roundoff: float = 0.0,
    summed: int = 1,
) -> Finding:
    """Judge one point by the margin of Flax's error over torch's.

    Args:
        name: the point's name in the traces.
        point: its row of the table.
        place: where it stands.
        torch: torch's array; None where it has none, as for the other two.
        flax: Flax's array.
        exact: the oracle's array for the same input.
        rows: [R] bool or indices of the rows to compare (the real tokens); None for all.
        recorded_roundoff: the unit roundoff that a recording was rounded to, where that is coarser than what it holds.
        summed: how many numbers were added up to a scalar. Their order is each side's own, and torch's error, a single
            number, is sometimes next to nothing: it is taken for no less than a random walk of as many roundings.
    """
    if (reason := _incomparable(torch, flax, exact)) is not None:
        return place.finding(name, *reason)
    assert torch is not None and flax is not None and exact is not None
    torch_RC, flax_RC, exact_RC = (
        _rows(x, point.axes, rows) for x in (torch, flax, exact.astype(np.float64, copy=False))
    )
    if torch_RC.size == 0:
        return place.finding(name, "unchecked", "empty: no row to compare")
    # A single operation rounds to the dtype of its result (the router's is float32 in every model); what a whole block
    # or model gives carries the roundings of the dtype that it computes in.
    rounds_to = torch.dtype.name if place.mode == "operation" else place.dtype
    walked = UNIT_ROUNDOFF["float32"] * math.sqrt(summed)  # sums are float32's at least
    found = margin(torch_RC, flax_RC, exact_RC, max(UNIT_ROUNDOFF[rounds_to], recorded_roundoff, walked))
    unequal = None
    reasons = []
    limit = MARGIN_LIMIT[place.dtype]
    if not found.value <= limit:  # not a number is no pass
        distance = f"Flax is {found.value:.3g} x as far from the exact answer as torch"
        reasons.append(f"{found.statistic}: {distance}; limit {limit:g}")
    if place.mode == "operation" and rounds_to == "bfloat16":
        unequal = float((torch_RC != flax_RC).mean())
        if unequal > UNEQUAL_LIMIT:
            reasons.append(f"{unequal:.1%} of the elements are not rounded as torch's; limit {UNEQUAL_LIMIT:.0%}")
    return replace(
        place.finding(name, "fail" if reasons else "pass", "; ".join(reasons) or None),
        unequal=unequal,
        margin=found.value,
        statistic=found.statistic,
        torch_error=found.torch_error,
        flax_error=found.flax_error,
    )


def judge_equal(name: str, place: Place, torch: Array | None, flax: Array | None) -> Finding:
    """Judge a point without arithmetic: the arrays must be equal."""
    if (reason := _incomparable(torch, flax, torch)) is not None:
        return place.finding(name, *reason)
    assert torch is not None and flax is not None
    differing = int((torch != flax).sum())
    if differing:
        return place.finding(name, "fail", f"{differing} of {torch.size} elements differ; they must be equal")
    return place.finding(name, "pass")


def overall(findings: Sequence[Finding]) -> Verdict:
    """Sum up what decides: fail if anything failed, unchecked if anything could not be checked or nothing was."""
    verdicts = {finding.verdict for finding in findings if finding.decides}
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts == {"pass"} else "unchecked"


def _incomparable(torch: Array | None, flax: Array | None, exact: Array | None) -> tuple[Verdict, str] | None:
    """Say why two arrays cannot be compared, or None where they can."""
    missing = [side for side, array in (("torch", torch), ("flax", flax), ("oracle", exact)) if array is None]
    if torch is None or flax is None or exact is None:
        return "unchecked", f"missing from {' and '.join(missing)}"
    if not torch.shape == flax.shape == exact.shape:
        return "fail", f"shapes differ: torch {torch.shape}, flax {flax.shape}, oracle {exact.shape}"
    if torch.dtype != flax.dtype:
        return "fail", f"dtypes differ: torch {torch.dtype}, flax {flax.dtype}"
    if torch.size == 0:
        return "unchecked", "empty"
    for side, array in (("torch", torch), ("oracle", exact)):
        if not _finite(array):
            return "unchecked", f"{side}'s array is not finite: there is nothing to compare with"
    if not _finite(flax):
        bad = int((~np.isfinite(flax)).sum())
        return "fail", f"{bad} of {flax.size} elements of Flax are not finite"
    return None


def _finite(array: Array) -> bool:
    return bool(np.isfinite(array).all())


def _rows(array: Array, axes: str, rows: Array | None) -> Array:
    """View an array as [rows, channels] by its axes, and keep the rows asked for."""
    letters = axes.split()
    if letters[:2] == ["B", "T"]:
        flat = array.reshape(array.shape[0] * array.shape[1], -1)
    else:
        flat = array.reshape(array.shape[0] if array.ndim else 1, -1)
    every = rows is None or (rows.dtype == bool and rows.all())
    return flat if every else flat[rows]
