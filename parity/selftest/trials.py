"""The harness on trial: every known fault planted, every benign variant run, and what was made of each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from convert import Checkpoint
from flax_mixtral.config import MixtralConfig
from parity.cast import ATTENTION, EXPERTS
from parity.decoding import continuable
from parity.diagnosis.cache_causes import cache_causes
from parity.diagnosis.causes import name_causes
from parity.inputs import Suite, suite
from parity.metrics import Precision
from parity.oracle.model import Oracle
from parity.points import kind_of
from parity.port import Port
from parity.recordings.detail import ALL
from parity.result import Divergence, Result
from parity.router import exact_ties
from parity.selftest.controls import CONTROLS, Control
from parity.selftest.faults import FAULTS
from parity.selftest.judged_once import JudgedOnce
from parity.selftest.planting import Fault, Scene, planted
from parity.sides.flax import FlaxSide
from parity.sides.remembering import Remembering
from parity.sides.torch_hf import TorchSide
from parity.tokens import Tokens, follow, judge_decoding
from parity.trace import Array, Batch
from parity.verdict import Place
from parity.walk import Sides, Walk
from parity.weights import Difference, Rounded, compare_configs, compare_weights

__all__ = ["Absent", "Alarm", "Row", "Trial", "passed", "selftest", "steps", "to_json"]


FED = 16
"""Tokens that are fed through the cache."""

NAMED_SHARE = 0.95
"""How many of the planted faults must be named first."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What the harness made of one planted fault.

    Args:
        slug: the fault.
        dtype: what both sides computed in.
        layer: where it was planted; None in the head or the model as a whole.
        found: whether the verdict was not "pass".
        placed: whether the first divergence was at its layer and at a point that shows it.
        named: whether the first cause was this fault.
        cause: the slugs of the causes, in order.
        at: where it was placed, as "layer point".
        margin: the largest of the deciding margins.
    """

    slug: str
    dtype: Precision
    layer: int | None
    found: bool
    placed: bool
    named: bool
    cause: str
    at: str
    margin: float


@dataclass(frozen=True, slots=True)
class Alarm:
    """What the harness made of one benign variant: no alarm is right."""

    slug: str
    dtype: Precision
    false_alarm: bool
    at: str
    margin: float


@dataclass(frozen=True, slots=True)
class Absent:
    """A fault or a control that this model, these inputs or this machine cannot have, and what it would need."""

    slug: str
    dtype: Precision
    needs: str


Row = Trial | Alarm | Absent


class Court:
    """One checkpoint, one dtype, and the reference and the unchanged port, which are computed once for all trials.

    Args:
        source: the checkpoint.
        batches: the inputs.
        dtype: what both sides compute in.
    """

    def __init__(self, source: Checkpoint, batches: Sequence[Batch], dtype: Precision):
        self.source, self.batches, self.dtype = source, batches, dtype
        self._leaves = source.view("flax")
        self._torch = Remembering(self.torch_side())
        self._legacy = Rounded(source.view("hf-legacy"), dtype)
        self._oracle = Remembering(Oracle(source.config, self._legacy))
        self._flax = Remembering(FlaxSide(source.config, Rounded(self._leaves, dtype)))
        self._judge = JudgedOnce(source.config, dtype, ALL)
        self.examine(lambda port: port)
        # What follows a fault, or another reference, is new to every side each time, and would fill the memory.
        self._torch.learns = self._flax.learns = self._oracle.learns = False

    def examine(
        self,
        change: Callable[[Port], Port],
        attention: str = ATTENTION,
        experts: str = EXPERTS,
        threads: int | None = None,
        *,
        named: bool = True,
    ) -> Result:
        """Run the walk on a changed port; `named` says whether causes are looked for."""
        unchanged: Any = self._flax  # FlaxSide answers every call, which the type of what remembers it does not say
        port = change(Port(self.source.config, self._leaves, side=lambda config, weights: unchanged))
        differences: list[Difference] = compare_configs(self.source.config, port.config)
        if port.weights is not self._leaves:
            differences += compare_weights(self._leaves, port.weights, lambda leaf: None)[1]
        flax = port.side(port.config, Rounded(port.weights, self.dtype))
        usual = (attention, experts, threads) == (ATTENTION, EXPERTS, None)
        torch = self._torch if usual else self.torch_side(attention, experts, threads)
        sides = Sides(torch, flax, self._oracle)
        walk = Walk(self.source.config, sides, self.batches, dtype=self.dtype)
        walk.judge = self._judge
        findings = list(walk.run())
        leaves = (self._leaves, port.weights)
        causes = (
            name_causes(self.source.config, differences, leaves, findings, walk.suspect, self._legacy) if named else ()
        )
        return Result(findings, walk.routing, differences, 0, (), self.dtype, {}, {}, {}, causes)

    def continue_prompts(self, change: Callable[[Port], Port]) -> Result:
        """Continue the prompts with a changed port's cache; torch's tokens are followed."""
        port = change(Port(self.source.config, self._leaves))
        flax: Any = port.side(port.config, Rounded(port.weights, self.dtype))  # an own side need not offer a cache
        config, tokens = self.source.config, Tokens()
        torch, oracle = self.torch_side(), Oracle(config, self._legacy)
        for batch in filter(continuable, self.batches):
            fed_BX = torch.generate(batch, FED)
            found = follow(config, (torch, flax, oracle), batch, fed_BX, self.dtype)
            place = Place(None, "cache", batch.name, self.dtype)
            tokens.continuations.append(found)
            tokens.findings.extend(judge_decoding(place, found))
        causes = cache_causes(config, self._legacy, tokens)
        return Result(tokens.findings, {}, (), 0, (), self.dtype, {}, {}, {}, causes)

    def scene(self, layer: int) -> Scene:
        """Say what a fault of one layer is to be planted into."""
        ties = sum(self._ties(layer, batch) for batch in self.batches)
        longest = max(int(batch.real_BT.sum(axis=1).max()) for batch in self.batches)
        tokens = max(batch.input_ids.size for batch in self.batches)
        quietest = min(self._quietest(layer, batch) for batch in self.batches)
        return Scene(self.source.config, ties=ties, tokens=tokens, longest=longest, quietest=quietest)

    def _ties(self, layer: int, batch: Batch) -> int:
        """Count the tokens that tie where a fault is planted: run op by op, others may than in a compiled block."""
        port = planted(Fault(slug="nothing", shows=()), layer)(Port(self.source.config, self._leaves))
        trace = port.side(port.config, Rounded(port.weights, self.dtype)).block(
            layer, self._stream_before(layer, batch), batch
        )
        return exact_ties(trace, batch.real_M)[0]

    def _quietest(self, layer: int, batch: Batch) -> float:
        x_BTD = self._stream_before(layer, batch)
        return float(np.square(x_BTD[batch.real_BT].astype(np.float64)).mean(axis=-1).min())

    def _stream_before(self, layer: int, batch: Batch) -> Array:
        x_BTD = self._torch.stream_before(layer, batch)
        assert x_BTD is not None, "the unchanged port was examined"
        return x_BTD

    def torch_side(self, attention: str = ATTENTION, experts: str = EXPERTS, threads: int | None = None) -> TorchSide:
        """Build torch's side in some setting."""
        return TorchSide(
            self.source.config,
            self.source.raw_config,
            Rounded(self.source.view("hf-fused"), self.dtype),
            dtype=self.dtype,
            attention=attention,  # type: ignore[arg-type]  # checked by transformers
            experts=experts,  # type: ignore[arg-type]  # as above
            threads=threads,
        )


def selftest(
    source: Checkpoint,
    *,
    dtypes: Sequence[Precision] = ("float32", "bfloat16"),
    inputs: Suite = "standard",
    seed: int = 0,
    faults: Sequence[Fault] = FAULTS,
    controls: Sequence[Control] = CONTROLS,
    layer: int | None = None,
) -> Iterator[Row]:
    """Plant every fault that the model can have, and run every control.

    Args:
        source: the checkpoint.
        dtypes: a fault is planted in those where it exists.
        inputs: the suite.
        seed: of its token ids.
        faults: which.
        controls: which.
        layer: where faults of one layer go; the middle one unless given.

    Yields:
        One row for each, as soon as it is there.
    """
    config = source.config
    where = config.num_hidden_layers // 2 if layer is None else layer
    batches = suite(inputs, config, seed)
    for dtype in dtypes:
        court = Court(source, batches, dtype)
        scene = court.scene(where)
        for control in controls:
            lacking = control.lacks(scene)
            yield _listen(court, control) if lacking is None else Absent(control.slug, dtype, lacking)
        for fault in faults:
            if dtype not in fault.dtypes:
                continue
            lacking = fault.lacks(scene)
            yield _try(court, fault, where, config) if lacking is None else Absent(fault.slug, dtype, lacking)


def steps(dtypes: Sequence[Precision]) -> int:
    """Count the rows of a selftest of everything."""
    return sum(dtype in fault.dtypes for dtype in dtypes for fault in FAULTS) + len(dtypes) * len(CONTROLS)


def passed(rows: Sequence[Row]) -> bool:
    """Say whether every fault was found and placed, 95 % of them named first, and nothing else accused."""
    trials = [row for row in rows if isinstance(row, Trial)]
    accused = any(row.false_alarm for row in rows if isinstance(row, Alarm))
    named = sum(trial.named for trial in trials) >= NAMED_SHARE * len(trials)
    return all(trial.found and trial.placed for trial in trials) and named and not accused


def _listen(court: Court, control: Control) -> Alarm:
    if control.cached:
        result = court.continue_prompts(control.change)
    else:
        result = court.examine(control.change, control.attention, control.experts, control.threads)
    return Alarm(control.slug, court.dtype, result.verdict != "pass", _at(result), _worst(result))


def _try(court: Court, fault: Fault, where: int, config: MixtralConfig) -> Trial:
    layer = {"layer": where, "head": None, "model": fault.fixed_layer, "cache": None}[fault.place]
    if fault.slug == "hidden-state-after-norm":
        layer = where = config.num_hidden_layers - 1
    change = planted(fault, where)
    result = court.continue_prompts(change) if fault.place == "cache" else court.examine(change)
    first = _first(result)
    found = result.verdict == ("unchecked" if fault.unchecked else "fail")
    placed = first is not None and first.layer == layer and kind_of(first.point) in fault.shows
    slugs = [cause.fault for cause in result.causes]
    named = slugs[:1] == [fault.slug]
    cause = ", ".join(dict.fromkeys(slugs))
    return Trial(fault.slug, court.dtype, layer, found, placed, named, cause, _at(result), _worst(result))


def _first(result: Result) -> Divergence | None:
    """Give where the sides part first, or the first point that could not be checked."""
    unchecked = (f for f in result.findings if f.verdict == "unchecked" and f.decides)
    missing = next((Divergence(f.layer, f.point) for f in unchecked), None)
    return result.first_divergence or missing


def _at(result: Result) -> str:
    first = _first(result)
    return "" if first is None else f"{'' if first.layer is None else first.layer} {first.point}".strip()


def _worst(result: Result) -> float:
    return 0.0 if result.worst is None or result.worst.margin is None else result.worst.margin


def to_json(row: Row) -> dict[str, Any]:
    """Give a row as JSON holds it."""
    return asdict(row)
