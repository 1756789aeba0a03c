"""The verdicts on one block, on its operations and on the head: what the walk's traces are held against."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.metrics import Precision
from parity.points import POINTS, Point, block_points, head_points, operation_points
from parity.recordings.detail import Detail
from parity.router import LayerRouting, dense_weights
from parity.stream import Compared
from parity.trace import Array, Batch, Trace
from parity.verdict import Finding, Mode, Place, judge

__all__ = ["BEFORE_ROUTING", "Judge", "blamed", "terms", "unless_rerouted"]

Traces = tuple[Trace, Trace, Trace]
"""Torch's, Flax's and the oracle's."""

BY_NAME = {point.name: point for point in POINTS}
BEFORE_ROUTING = frozenset(point.name for point in POINTS[: POINTS.index(BY_NAME["router_weights"])])
"""The points that a forced routing does not touch."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges traces point by point, in the order of computation.

    Args:
        config: the model's.
        dtype: what torch and Flax computed in.
        detail: how much of torch's trace there is; the other sides are judged on as much.
    """

    config: MixtralConfig
    dtype: Precision
    detail: Detail

    def place(self, layer: int | None, mode: Mode, batch: Batch) -> Place:
        """Say where a comparison stands."""
        return Place(layer, mode, batch.name, self.dtype)

    def block(self, layer: int, mode: Mode, batch: Batch, compared: Compared, *, settled: bool) -> Iterator[Finding]:
        """Judge every point of a block; `settled` says that no side can hide a flip in a block before."""
        traces, routing = compared.traces, compared.routing
        torch, flax, oracle = (self.detail.thin(trace, batch) for trace in traces)
        thinned = (torch, flax, oracle)
        forced = routing is not None and bool(routing.flips)
        for name, point in block_points(self.config):
            if name == "lens" and mode == "local":
                continue  # the head alone is compared on torch's stream after the last block
            place = replace(self.place(layer, mode, batch), forced=forced and name not in BEFORE_ROUTING)
            if point.kind == "ids":
                finding = _judge_routing(name, place, routing)
            elif name == "router_weights" and routing is not None:
                finding = self._weights(point, place, traces, batch, forced)
            elif point.place == "expert" and not _same_rows(name, thinned):
                finding = place.finding(name, "fail", "the sides recorded this expert on different tokens")
            else:
                arrays = (trace.arrays.get(name) for trace in thinned)
                rows = _real_rows(point, batch) if self.detail.keeps_every_token(name) else None
                recorded = self.detail.roundoff(name)
                finding = judge(name, point, place, *arrays, rows=rows, recorded_roundoff=recorded)
                finding = self.detail.weigh(finding)
            yield unless_rerouted(finding, settled and (compared.settled or name in BEFORE_ROUTING))

    def operations(self, layer: int, batch: Batch, traces: Traces) -> Iterator[Finding]:
        """Judge every operation, run alone on what torch recorded as its input."""
        for name, point in operation_points(self.config):
            yield self._operation(name, point, self.place(layer, "operation", batch), traces, batch)

    def head(self, mode: Mode, batch: Batch, traces: Traces, *, settled: bool) -> Iterator[Finding]:
        """Judge final norm, logits and losses."""
        for name, point in head_points(self.config):
            arrays = (trace.arrays.get(name) for trace in traces)
            place, summed = self.place(None, mode, batch), terms(name, self.config, batch)
            finding = judge(name, point, place, *arrays, rows=_real_rows(point, batch), summed=summed)
            yield unless_rerouted(finding, settled)

    def _operation(self, name: str, point: Point, place: Place, traces: Traces, batch: Batch) -> Finding:
        arrays = [trace.arrays.get(name) for trace in traces]
        if point.axes != "B N T S":
            return judge(name, point, place, *arrays, rows=_real_rows(point, batch))
        if len({None if array is None else array.shape for array in arrays}) > 1:
            return judge(name, point, place, *arrays)
        # Hidden keys have no part, and padding is no query.
        pairs_BTS = batch.pairs_BTS
        seen = [None if array is None else array.swapaxes(0, 1)[:, pairs_BTS].reshape(-1, 1) for array in arrays]
        return judge(name, point, place, *seen)

    def _weights(self, point: Point, place: Place, traces: Traces, batch: Batch, forced: bool) -> Finding:
        """Compare routing weights expert by expert: the order of a token's experts is no difference."""
        torch, flax, oracle = traces
        torch_ids_MA = torch["router_ids"]
        flax_ids_MA = torch_ids_MA if forced else flax["router_ids"]
        dense = (
            dense_weights(ids_MA, trace.arrays.get("router_weights"), self.config.num_local_experts)
            for ids_MA, trace in ((torch_ids_MA, torch), (flax_ids_MA, flax), (torch_ids_MA, oracle))
        )
        return judge("router_weights", point, place, *dense, rows=batch.real_M)


def terms(name: str, config: MixtralConfig, batch: Batch) -> int:
    """Count the numbers that are added up to a loss; 1 for what is none."""
    tokens = int(batch.real_M.sum())
    return {"loss": tokens, "training_loss": tokens, "aux_loss": tokens * config.num_hidden_layers}.get(name, 1)


def blamed(findings: Sequence[Finding]) -> bool:
    """Say whether a block or the head failed by itself: a wrong head spoils every block's lens."""
    return any(finding.verdict == "fail" and finding.point != "lens" for finding in findings)


def unless_rerouted(finding: Finding, settled: bool) -> Finding:
    """Leave a failure unchecked where a benign flip that no side tells of would cause it too."""
    if settled or finding.verdict != "fail":
        return finding
    reason = f"{finding.reason}; a side does not say how it routed here or before, where rounding can change it"
    return replace(finding, verdict="unchecked", reason=reason)


def _judge_routing(name: str, place: Place, routing: LayerRouting | None) -> Finding:
    if routing is None:
        return place.finding(
            name, "unchecked", "a side does not give whole router_ids and router_logits that fit the batch"
        )
    if routing.tokens == 0:
        return place.finding(name, "unchecked", "empty: no real token")
    unexcused = [flip for flip in routing.flips if not flip.excused]
    if unexcused:
        worst = max(unexcused, key=lambda flip: flip.margin / max(flip.logit_error, 1e-300))
        return place.finding(
            name,
            "fail",
            f"{len(unexcused)} of {routing.tokens} tokens go to other experts although the router is clear about them; "
            f"token {worst.token}: torch {worst.torch_ids}, Flax {worst.flax_ids}, margin {worst.margin:.3g} at a "
            f"logit error of {worst.logit_error:.3g}",
        )
    if routing.misbroken:
        return place.finding(
            name,
            "fail",
            f"{len(routing.misbroken)} of {routing.ties} exact ties of Flax's own probabilities do not go to the "
            f"lowest of the equal experts, as jax.lax.top_k has it; first token {routing.misbroken[0]}",
        )
    if routing.flips:
        return place.finding(name, "pass", f"{len(routing.flips)} of {routing.tokens} tokens flipped within rounding")
    return place.finding(name, "pass")


def _real_rows(point: Point, batch: Batch) -> Array | None:
    """Keep real tokens where rows are tokens; an expert's rows are real already."""
    return batch.real_M if point.axes.split()[:2] == ["B", "T"] or point.axes.startswith("M") else None


def _same_rows(name: str, traces: Traces) -> bool:
    """Say whether all traces hold this expert for the same tokens; a trace without it is judged as missing."""
    expert = int(name.split(".")[1])
    rows = [trace.rows.get(expert) for trace in traces if name in trace.arrays]
    return all(row is not None and rows[0] is not None and np.array_equal(row, rows[0]) for row in rows)
