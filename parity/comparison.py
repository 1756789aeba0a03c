"""The walks of one comparison, in every dtype that it has: the same for sides that are live and for recorded ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flax_mixtral.config import MixtralConfig
from parity.cast import WALKS
from parity.diagnosis.causes import Suspect
from parity.drift import Drift
from parity.inputs import unexercised
from parity.metrics import Precision
from parity.recordings.detail import ALL, Detail
from parity.router import LayerRouting
from parity.sides.timed import Cost, Timed
from parity.steps import Steps
from parity.trace import Batch
from parity.verdict import Finding
from parity.walk import RoutingKey, Sides, Walk
from parity.whole import compare_whole

__all__ = ["Comparison", "Outcome", "Parts"]

Parts = Mapping[str, Any]
"""Who plays torch, flax and oracle."""


@dataclass(slots=True)
class Outcome:
    """What the walks of a comparison found."""

    findings: list[Finding] = field(default_factory=list)
    routing: dict[RoutingKey, LayerRouting] = field(default_factory=dict)
    drift: list[Drift] = field(default_factory=list)
    cost: dict[str, Cost] = field(default_factory=dict)
    suspect: Suspect | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared, on what, and how much of it.

    Args:
        config: the model's.
        batches: what the sides are fed.
        dtype: of the run.
        layers: the blocks to compare.
        follow: see `Walk`.
        detail: how much of torch's trace there is.
        parts: gives the sides of the walk in one dtype.
        too_large: why a side is not run whole in a dtype, by its part.
        steps: counts for a progress bar.
        read_ahead: called with the layer whose weights will be needed next.
        after: called after each walk with its sides and dtype: what else is compared.
    """

    config: MixtralConfig
    batches: Sequence[Batch]
    dtype: Precision
    layers: range
    parts: Callable[[Precision], Parts]
    too_large: Callable[[Precision], Mapping[str, str]]
    steps: Steps
    follow: bool = False
    detail: Detail = ALL
    read_ahead: Callable[[int], None] = lambda layer: None
    after: Callable[[Mapping[str, Timed], Precision], Iterable[Finding]] = lambda sides, dtype: ()

    @property
    def complete(self) -> bool:
        """Whether every block is compared."""
        return self.layers == range(self.config.num_hidden_layers)

    @property
    def walks(self) -> int:
        """How many steps the walks have."""
        return len(WALKS[self.dtype]) * (self.layers.stop + 3)

    def run(self) -> Outcome:
        """Walk in every dtype, and run the models whole in the run's own."""
        outcome = Outcome()
        for dtype in WALKS[self.dtype]:
            sides = {name: Timed(side) for name, side in self.parts(dtype).items()}
            walk = Walk(
                self.config,
                Sides(**sides),
                self.batches,
                dtype=dtype,
                layers=self.layers,
                follow=self.follow,
                detail=self.detail,
                advance=self.steps.advance,
                read_ahead=self.read_ahead,
            )
            outcome.findings += walk.run()
            outcome.routing |= walk.routing
            outcome.drift += walk.drift
            outcome.suspect = outcome.suspect or walk.suspect
            self.steps.advance("whole models")
            ends = self.complete or (self.follow and self.layers.stop == self.config.num_hidden_layers)
            if dtype == self.dtype and ends and self.config.architecture != "MixtralModel":
                reasons = self.too_large(dtype)
                outcome.findings += compare_whole(self.config, walk, sides["torch"], sides["flax"], reasons)
            outcome.findings += self.after(sides, dtype)
            for name, side in sides.items():
                outcome.cost[name] = outcome.cost.get(name, Cost()) + side.cost
        return outcome

    def notes(self, outcome: Outcome) -> list[str]:
        """List what this comparison could not show."""
        notes = unexercised(self.batches, self.config)
        if not self.complete:
            last = self.config.num_hidden_layers
            head = "" if self.follow and self.layers.stop == last else ", and no head"
            notes.append(f"only layers {self.layers.start}:{self.layers.stop} of {last} were compared{head}")
        if self.detail.tokens is not None:
            notes.append(
                f"within a block {self.detail.tokens} tokens of each batch were compared, as they were recorded"
            )
        if self.detail.bfloat16:
            notes.append("within a block points were recorded in bfloat16: those that pass inform, and do not decide")
        if self.detail != ALL and any(finding.verdict == "fail" for finding in outcome.findings):
            notes.append(
                "no cause can be looked for in a part of a trace: record the layer that fails whole (--layers)"
            )
        return notes
