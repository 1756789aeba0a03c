"""How far a side is from an answer at one point, against the noise. Imports NumPy and parity's own."""

from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from parity.diagnosis.replay import Block, compute
from parity.metrics import UNIT_ROUNDOFF, statistics
from parity.points import POINTS, kind_of
from parity.trace import Array, Batch

__all__ = ["NO_FIT", "Fit", "Gauge"]

AXES = {kind_of(point.name): point.axes.split() for point in POINTS}


@dataclass(frozen=True, slots=True)
class Fit:
    """How far a side is from an answer at one point.

    Args:
        margin: the largest of the four statistics over the noise.
        pooled: relative RMS error.
    """

    margin: float
    pooled: float


NO_FIT = Fit(np.inf, np.inf)
"""An answer of another shape, or not finite elsewhere."""


@dataclass(slots=True)
class Gauge:
    """Measures Flax's points of one block.

    Args:
        flax: the block as Flax ran it, with the right operations.
        torch: the same of torch: its distance from them is the noise.
    """

    flax: Block
    torch: Block
    _noise: dict[tuple[str, bool], tuple[float, ...]] = field(default_factory=dict)
    _plain: dict[str, Fit] = field(default_factory=dict)

    def plain(self, name: str) -> Fit:
        """Measure Flax against the right operation."""
        if name not in self._plain:
            self._plain[name] = self.fit(self.flax, name)
        return self._plain[name]

    def fit(self, block: Block, name: str) -> Fit:
        """Measure Flax against what a block computes at one point."""
        observed = self.flax.observed.arrays.get(name)
        try:
            exact = compute(block, name)
        except (KeyError, ValueError, IndexError):
            return NO_FIT  # shapes do not fit together under this change, or an input is missing
        if observed is None or observed.shape != exact.shape:
            return NO_FIT
        if name == "router_ids":
            return _fit_ids(observed, exact, block)
        if not _same_holes(name, observed, exact, block.batch):
            return NO_FIT
        flax = _relative(_rows(name, observed, block.batch), _rows(name, exact, block.batch))
        noise = self.noise(name, inside=block.inside)
        return Fit(max(f / n for f, n in zip(flax, noise, strict=True)), flax[0])

    def noise(self, name: str, *, inside: bool = False) -> tuple[float, ...]:
        """Measure torch against the right operation: four statistics, each at least one rounding.

        Args:
            name: the point.
            inside: measure `moe_out` through the whole experts, whose products add their rounding to the sum's.
        """
        if (name, inside) not in self._noise:
            torch, unit = self.torch.observed.arrays.get(name), UNIT_ROUNDOFF[self.flax.dtype]
            errors: tuple[float, ...] = (unit,) * 4
            if torch is not None and torch.size:
                with suppress(KeyError):  # an input that torch's side does not record: then one rounding
                    exact = compute(replace(self.torch, inside=inside), name)
                    errors = _relative(_rows(name, torch, self.flax.batch), _rows(name, exact, self.flax.batch))
            self._noise[name, inside] = tuple(max(error, unit) if np.isfinite(error) else unit for error in errors)
        return self._noise[name, inside]


def _fit_ids(observed_MA: Array, exact_MA: Array, block: Block) -> Fit:
    """Compare sets of experts, exact ties included: both were chosen from the same probabilities."""
    differ_X = (np.sort(observed_MA, axis=1) != np.sort(exact_MA, axis=1)).any(axis=1)[block.batch.real_M]
    return Fit(float("inf") if differ_X.any() else 0.0, float(differ_X.mean()))


def _same_holes(name: str, observed: Array, exact: Array, batch: Batch) -> bool:
    """Say whether both are infinite or NaN at the same places, padding included where it is recorded."""
    if name in ("moe_out", "attn_scores", "attn_probs"):
        observed, exact = _rows(name, observed, batch), _rows(name, exact, batch)
    return np.array_equal(np.isfinite(observed.astype(np.float64)), np.isfinite(exact))


def _rows(name: str, array: Array, batch: Batch) -> Array:
    """View a point's real tokens as [rows, channels] float64."""
    axes = AXES[kind_of(name)]
    wide = array.astype(np.float64)
    if axes == ["B", "N", "T", "S"]:  # hidden keys have no part, and padding is no query
        return wide.transpose(0, 2, 3, 1)[batch.pairs_BTS]
    if axes[:2] == ["B", "T"] or (axes == ["logits"] and array.ndim == 3):
        return wide.reshape(array.shape[0] * array.shape[1], -1)[batch.real_M]
    return wide[batch.real_M] if axes[0] == "M" else wide.reshape(len(array), -1)


def _relative(side_RC: Array, exact_RC: Array) -> tuple[float, ...]:
    """Give the four statistics of an error, each relative to its own magnitude."""
    finite = np.isfinite(exact_RC).all(axis=1)
    side_RC, exact_RC = side_RC[finite], exact_RC[finite]
    if exact_RC.size == 0:
        return (0.0,) * 4
    tiny = float(np.finfo(np.float64).tiny)
    magnitude = max(float(np.sqrt(np.mean(np.square(exact_RC)))), tiny)
    found = statistics(side_RC - exact_RC, exact_RC)
    return (
        found.pooled / magnitude,
        found.worst_token,
        found.worst_channel,
        found.largest / max(float(np.abs(exact_RC).max()), tiny),
    )
