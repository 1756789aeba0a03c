"""Why a block is wrong: each operation that fails is replayed under every hypothesis of the table, in NumPy.

A hypothesis explains a point where Flax is as near to its answer as torch is to the exact one. Imports parity's own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.diagnosis.cause import UNKNOWN, Cause
from parity.diagnosis.change import Change
from parity.diagnosis.fit import Fit, Gauge
from parity.diagnosis.hypotheses import HYPOTHESES, Hypothesis
from parity.diagnosis.replay import BASE_OPS, Block, block_names
from parity.diagnosis.slope import slope
from parity.points import kind_of
from parity.trace import Array, Batch, Trace
from parity.verdict import MARGIN_LIMIT

__all__ = ["Cause", "replay", "replay_head", "slope"]

HEAD = ("final_norm", "logits")

CLEARLY = 3.0
"""A hypothesis must bring Flax so many times nearer than the right operation does."""

MOST_RULED_OUT = 3


@dataclass(frozen=True, slots=True)
class Explanation:
    """A change that brings the point down to noise.

    Args:
        hypothesis: its row.
        change: its form.
        fit: at the failing point.
        explained: the failing points that it explains.
    """

    hypothesis: Hypothesis
    change: Change
    fit: Fit
    explained: frozenset[str]

    @property
    def rank(self) -> tuple[int, float]:
        """Order by how much is explained, then by how well."""
        return -len(self.explained), self.fit.pooled


def replay(
    config: MixtralConfig,
    weights: Mapping[str, Array],
    batch: Batch,
    layer: int,
    x_BTD: Array,
    torch: Trace,
    flax: Trace,
    *,
    dtype: str,
    point: str | None = None,
    routing: Array | None = None,
    inputs: Trace | None = None,
) -> list[Cause]:
    """Name what is wrong in one block.

    Args:
        config: the model's.
        weights: Hugging Face's legacy names to [out, in] arrays.
        batch: what the block was run on.
        layer: 0-based.
        x_BTD: what the block was fed, on both sides.
        torch: its points.
        flax: Flax's points on the same input.
        dtype: what both computed in.
        point: the point that failed first; None to look for any.
        routing: [M, A] the experts that were forced on Flax; None where it used its own.
        inputs: what each of Flax's operations was fed, where that was not its own points.

    Returns:
        A cause for every operation that fails, in the order of computation; several for one operation where several
        explain it equally well; "unknown" with what was ruled out where none does. Nothing where nothing fails.
    """
    used_MA = flax.arrays.get("router_ids", torch["router_ids"]) if routing is None else routing
    block = Block(
        config=config,
        weights=weights,
        batch=batch,
        layer=layer,
        x_BTD=x_BTD,
        inputs=flax if inputs is None else inputs,
        observed=flax,
        ids_MA=used_MA,
        dtype=dtype,
        ops=BASE_OPS[dtype],
    )
    own = replace(block, inputs=torch, observed=torch, ids_MA=torch["router_ids"])
    names = tuple(name for name in block_names(config) if name in flax.arrays)
    return _Diagnosis(Gauge(block, own), names).causes(point, layer)


def replay_head(
    config: MixtralConfig,
    weights: Mapping[str, Array],
    batch: Batch,
    x_BTD: Array,
    torch: Trace,
    flax: Trace,
    *,
    dtype: str,
    point: str | None = None,
) -> list[Cause]:
    """Name what is wrong in final norm and head.

    Args:
        config: the model's.
        weights: Hugging Face's legacy names to [out, in] arrays.
        batch: what the head was run on.
        x_BTD: what it was fed, on both sides.
        torch: its points.
        flax: Flax's points on the same input.
        dtype: what both computed in.
        point: the point that failed first; None to look for any.
    """
    block = Block(
        config=config,
        weights=weights,
        batch=batch,
        layer=config.num_hidden_layers,
        x_BTD=x_BTD,
        inputs=flax,
        observed=flax,
        ids_MA=np.empty((0, 0), np.int64),
        dtype=dtype,
        ops=BASE_OPS[dtype],
    )
    names = tuple(name for name in HEAD if name in flax.arrays)
    return _Diagnosis(Gauge(block, replace(block, inputs=torch, observed=torch)), names).causes(point, layer=None)


@dataclass(slots=True)
class _Diagnosis:
    """One block under examination, and its recorded points in order."""

    gauge: Gauge
    names: tuple[str, ...]

    def causes(self, point: str | None, layer: int | None) -> list[Cause]:
        """Explain the failing operations one after the other."""
        failing = [name for name in self.names if name == point or self.gauge.plain(name).margin > self.limit]
        causes: list[Cause] = []
        unexplained: list[tuple[str, str]] = []
        while failing:
            first = point if point in failing else failing[0]
            assert first is not None
            found, tried = self._explain(first, failing)
            if found:
                causes += self._named(found, first, layer)
                covered = {kind for each in found for kind in each.change.covers}
                explained = frozenset.union(*(each.explained for each in found))
                failing = [name for name in failing if name not in explained and kind_of(name) not in covered]
            else:
                unexplained.append((first, _ruled_out(tried)))
                failing.remove(first)
        if causes:  # a point that failed for what came before it, and is itself within the noise, needs no cause
            unexplained = [each for each in unexplained if self.gauge.plain(each[0]).margin > self.limit]
        if unexplained:
            causes.append(self._unknown(unexplained, layer))
        return causes

    @property
    def limit(self) -> float:
        return MARGIN_LIMIT[self.gauge.flax.dtype]

    def _explain(self, first: str, failing: Sequence[str]) -> tuple[list[Explanation], list[tuple[Fit, str]]]:
        """Try the table at a point: the best explanations, and what was tried in vain."""
        found: list[Explanation] = []
        tried: list[tuple[Fit, str]] = []
        for last in (False, True):
            for hypothesis, change in self._candidates(first, last):
                explanation, fit = self._try(hypothesis, change, first, failing)
                if explanation is None:
                    tried.append((fit, f"{hypothesis.slug} ({change.detail})"))
                else:
                    found.append(explanation)
            if found:
                break
        return _best(found), tried

    def _candidates(self, first: str, last: bool) -> Iterator[tuple[Hypothesis, Change]]:
        kind = kind_of(first)
        for hypothesis in HYPOTHESES:
            if hypothesis.last is last and kind in hypothesis.points and self.gauge.flax.dtype in hypothesis.dtypes:
                for change in hypothesis.changes(self.gauge.flax):
                    if change.at is None or kind in change.at:
                        yield hypothesis, change

    def _try(
        self, hypothesis: Hypothesis, change: Change, first: str, failing: Sequence[str]
    ) -> tuple[Explanation | None, Fit]:
        """Test a change at the point, then at the others that it touches: it must explain what fails and spoil none."""
        touched = change.at or hypothesis.points
        changed = change.block(replace(self.gauge.flax, ops=replace(self.gauge.flax.ops, **change.ops)))
        experts_right = first == "moe_out" and not any(name.startswith("expert.") for name in failing)
        inside = experts_right and (hypothesis.points != ("moe_out",) or change.at is not None)
        if inside:  # what the experts are recorded to give is right, so the fault is on another path through them
            touched, changed = ("moe_out",), replace(changed, inside=True)
        fit = self.gauge.fit(changed, first)
        if not self._explains(fit, first, hypothesis):
            return None, fit
        explained = {first}
        for name in self.names:
            if name == first or kind_of(name) not in touched:
                continue
            if name == "moe_out" and name not in failing:
                continue  # it is made of the recorded outputs, wrong ones included
            other = self.gauge.fit(changed, name)
            if name in failing and self._explains(other, name, hypothesis):
                explained.add(name)
            elif name not in failing and other.margin > self.limit:
                return None, other
        return Explanation(hypothesis, change, fit, frozenset(explained)), fit

    def _explains(self, fit: Fit, name: str, hypothesis: Hypothesis) -> bool:
        clearly = fit.pooled <= self.gauge.plain(name).pooled / CLEARLY
        return math.isfinite(fit.margin) and clearly and (hypothesis.rounding or fit.margin <= self.limit)

    def _named(self, found: Sequence[Explanation], first: str, layer: int | None) -> Iterator[Cause]:
        plain = self.gauge.plain(first)
        for each in found:
            others = [name for name in sorted(each.explained) if name != first]
            also = f", and {len(others)} more points likewise" if others else ""
            evidence = (
                f"with {each.change.detail}, Flax's relative error at {first} falls from {plain.pooled:.2g} to "
                f"{each.fit.pooled:.2g} ({each.fit.margin:.2g} x the noise; limit {self.limit:g}){also}"
            )
            yield Cause(each.hypothesis.slug, layer, first, evidence)

    def _unknown(self, unexplained: Sequence[tuple[str, str]], layer: int | None) -> Cause:
        (first, ruled_out), rest = unexplained[0], unexplained[1:]
        also = f"; also unexplained: {', '.join(name for name, _ in rest[:4])}" if rest else ""
        plain = self.gauge.plain(first)
        size = f"Flax's relative error at {first} is {plain.pooled:.2g} ({plain.margin:.3g} x the noise)"
        return Cause(UNKNOWN, layer, first, f"{size}; {ruled_out}{also}")


def _best(found: Sequence[Explanation]) -> list[Explanation]:
    """Keep the best form of each fault, and those faults that explain as much about as well."""
    ranked = sorted(found, key=lambda each: each.rank)
    kept: list[Explanation] = []
    for each in ranked:
        alike = not kept or (
            len(each.explained) == len(kept[0].explained) and each.fit.pooled <= CLEARLY * kept[0].fit.pooled
        )
        if alike and each.hypothesis.slug not in {other.hypothesis.slug for other in kept}:
            kept.append(each)
    return kept


def _ruled_out(tried: Sequence[tuple[Fit, str]]) -> str:
    nearest: dict[str, Fit] = {}
    for fit, text in sorted(tried, key=lambda pair: pair[0].pooled):
        nearest.setdefault(text.split(" (")[0], fit)
    if not nearest:
        return "no hypothesis of the table touches this point"
    shown = [f"{slug} leaves {fit.pooled:.2g}" for slug, fit in list(nearest.items())[:MOST_RULED_OUT]]
    return f"ruled out: {', '.join(shown)}" + (
        f" and {len(nearest) - len(shown)} more" if len(nearest) > len(shown) else ""
    )
