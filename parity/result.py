"""The result of a run: what every report is rendered from. `to_json` has the documented, versioned fields."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from parity.baseline import Baseline, BaselineDiff
from parity.diagnosis.cause import Cause
from parity.drift import Drift
from parity.gradient_points import backward_depth
from parity.metrics import Precision
from parity.points import POINTS
from parity.provenance import environment
from parity.router import LayerRouting
from parity.sides.timed import Cost
from parity.verdict import MARGIN_LIMIT, Finding, Mode, Verdict, overall
from parity.weights import Difference

__all__ = ["EXIT_CODES", "SCHEMA_VERSION", "Divergence", "Result"]

SCHEMA_VERSION = 1

EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "unchecked": 4}

BLAME_ORDER: tuple[Mode, ...] = ("reference", "local", "operation", "propagated", "whole", "cache", "backward")
"""Which mode's failures place a fault best: a local one blames its block, a propagated one may be inherited."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where the sides part first: a layer (None outside the blocks) and a point."""

    layer: int | None
    point: str


@dataclass(frozen=True, slots=True)
class Result:
    """Everything a run found.

    Args:
        findings: one verdict for each point, layer, batch and mode, in the order of computation.
        routing: the comparison of routing by layer, mode, batch and dtype.
        differences: configuration fields and weights that are not equal; any makes the run fail.
        weights_compared: how many leaves were; 0 where Flax's weights are the source mapped in memory.
        notes: what these inputs could not show.
        dtype: what both sides computed in.
        environment: versions and machine.
        provenance: checkpoints and their hashes, inputs, seed.
        cost: by side.
        causes: what is behind the failures, the surest first.
        drift: of a language model's expectations, layer by layer.
        tokens: the ids of the M tokens of a batch, by its name.
        words: the text of token ids, where the checkpoint has a tokenizer.
        error: what stopped the run before it had a verdict.
        baseline: the run beside an earlier one, where that was asked for.
    """

    findings: Sequence[Finding]
    routing: Mapping[tuple[int, Mode, str, Precision], LayerRouting]
    differences: Sequence[Difference]
    weights_compared: int
    notes: Sequence[str]
    dtype: Precision
    environment: Mapping[str, Any]
    provenance: Mapping[str, Any]
    cost: Mapping[str, Cost]
    causes: Sequence[Cause] = ()
    drift: Sequence[Drift] = ()
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    words: Mapping[int, str] = field(default_factory=dict)
    error: str | None = None
    baseline: BaselineDiff | None = None

    @classmethod
    def stopped(cls, error: str) -> "Result":
        """Give the result of a run that ended in an error: nothing is checked.

        Args:
            error: the message, or the traceback where nobody has foreseen it.
        """
        return cls([], {}, [], 0, [], "float32", environment(), {"command": sys.argv}, {}, error=error)

    def held_to(self, baseline: Baseline, path: Path) -> "Result":
        """Give this result beside a baseline, which was read from a file.

        Raises:
            BadInput: it is that of another comparison.
        """
        found = baseline.compare(path, self.dtype, self.findings, self.packages, self.provenance)
        return replace(self, baseline=found)

    @property
    def verdict(self) -> Verdict:
        """Sum up findings and differences."""
        if self.error is not None:
            return "unchecked"
        worse = self.baseline is not None and self.baseline.failed
        return "fail" if self.differences or worse else overall(self.findings)

    @property
    def exit_code(self) -> int:
        """What the command line ends with."""
        return EXIT_CODES[self.verdict]

    @property
    def packages(self) -> Mapping[str, str | None]:
        """The versions that computed, by package: torch and transformers on torch's machine, the others on Flax's.

        Raises:
            KeyError: the run has none.
        """
        if "torch" in self.environment:
            torch, flax = (self.environment[side]["packages"] for side in ("torch", "flax"))
            return {**flax, **{name: torch[name] for name in ("torch", "transformers")}}
        return dict(self.environment["packages"])

    @property
    def worst(self) -> Finding | None:
        """The finding with the largest margin."""
        measured = [finding for finding in self.findings if finding.margin is not None and finding.decides]
        return max(measured, key=lambda finding: finding.margin or 0.0, default=None)

    @property
    def first_divergence(self) -> Divergence | None:
        """The first failure in the order of computation, of the mode that places best; else the first difference."""
        for mode in BLAME_ORDER:
            failures = [f for f in self.findings if f.mode == mode and f.verdict == "fail" and f.decides]
            failures = [
                f for f in failures if f.point != "lens"
            ] or failures  # lens repeats what the head is blamed for
            if failures:
                first = min(failures, key=_depth)
                return Divergence(first.layer, first.point)
        if self.differences:
            name = self.differences[0].name
            return Divergence(_layer_of(name), name)
        return None

    def to_json(self) -> dict[str, Any]:
        """Give the content of result.json."""
        first = self.first_divergence
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "first_divergence": None if first is None else asdict(first),
            "error": self.error,
            "causes": [asdict(cause) for cause in self.causes],
            "dtype": self.dtype,
            "margin_limit": MARGIN_LIMIT[self.dtype],
            "points": [_jsonable(asdict(finding)) for finding in self.findings],
            "router": [self._routing_json(key, routing) for key, routing in self.routing.items()],
            "drift": [self._drift_json(drift) for drift in self.drift],
            "weights": {
                "compared": self.weights_compared,
                "differences": [asdict(difference) for difference in self.differences],
            },
            "baseline": None if self.baseline is None else asdict(self.baseline),
            "notes": list(self.notes),
            "environment": dict(self.environment),
            "provenance": dict(self.provenance),
            "cost": {side: asdict(cost) for side, cost in self.cost.items()},
        }

    def text(self, batch: str, token: int) -> str | None:
        """Give the text of one token of a batch, where it is known."""
        return self.words.get(self.tokens[batch][token]) if batch in self.tokens else None

    def _routing_json(self, key: tuple[int, Mode, str, Precision], routing: LayerRouting) -> dict[str, Any]:
        layer, mode, batch, dtype = key
        return {
            "layer": layer,
            "mode": mode,
            "batch": batch,
            "dtype": dtype,
            "tokens": routing.tokens,
            "agreement": _jsonable(routing.agreement),
            "flips": [
                _jsonable({**asdict(flip), "excused": flip.excused, "text": self.text(batch, flip.token)})
                for flip in routing.flips
            ],
            "excused": sum(flip.excused for flip in routing.flips),
            "min_margin": _jsonable(routing.min_margin),
            "ties": routing.ties,
            "misbroken_ties": len(routing.misbroken),
            "median_margin": _jsonable(routing.median_margin),
            "load": list(routing.load),
        }

    def _drift_json(self, drift: Drift) -> dict[str, Any]:
        worst = [
            {
                **asdict(token),
                "text": self.text(drift.batch, token.token),
                "torch_next_text": self.words.get(token.torch_next),
                "flax_next_text": self.words.get(token.flax_next),
            }
            for token in drift.worst
        ]
        return {**asdict(drift), "worst": worst}


_ORDER = {point.name.split(".")[-1]: number for number, point in enumerate(POINTS)}


def _depth(finding: Finding) -> tuple[float, int]:
    """Order findings as they are computed: embedding, blocks, head; within a block by the table of points."""
    if finding.mode == "backward":
        return backward_depth(finding.layer, finding.point)
    order = _ORDER[finding.point.split(".")[-1]]
    if finding.layer is None:
        return (-1.0 if finding.point == "embed" else math.inf, order)
    return (finding.layer, order)


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def _jsonable(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
