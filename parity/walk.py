"""The walk: every block of every side, side by side, on torch's input (local) and on its own (propagated)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.causes import Suspect
from parity.detail import ALL, Detail
from parity.drift import Drift, compare_logits
from parity.metrics import Precision
from parity.points import POINTS, Point, block_points, head_points, operation_points
from parity.router import LayerRouting, comparable_ids, compare_routing, dense_weights, rerouted
from parity.sides.offered import Offered
from parity.trace import Array, Batch, Trace
from parity.verdict import Finding, Mode, Place, judge, judge_equal

__all__ = ["RoutingKey", "Sides", "Walk"]

Advance = Callable[[str], None]

RoutingKey = tuple[int, Mode, str, Precision]
"""Layer, mode, batch and dtype of a comparison of routing."""

BY_NAME = {point.name: point for point in POINTS}
BEFORE_ROUTING = frozenset(point.name for point in POINTS[: POINTS.index(BY_NAME["router_weights"])])
"""The points that a forced routing does not touch."""


@dataclass(frozen=True, slots=True)
class Sides:
    """The three implementations of one comparison, each of `Side`, whole or in part (`Offered`)."""

    torch: Any
    flax: Any
    oracle: Any


@dataclass(slots=True)
class Stream:
    """One batch on its way through the model."""

    batch: Batch
    torch_BTD: Array | None
    flax_BTD: Array | None
    oracle_BTD: Array | None
    flipped_M: Array
    """Tokens that any layer so far routed differently in the propagated stream."""
    routing_known: bool = True
    """Whether every side has said so far how it routed in the propagated stream."""
    router_logits: dict[str, list[Array]] = field(default_factory=lambda: {"torch": [], "flax": [], "oracle": []})
    torch_logits: Array | None = None
    oracle_logits: Array | None = None

    @property
    def clean_M(self) -> Array:
        """Real tokens that no flip can have touched: none flipped up to them in their row."""
        flipped_BT = np.logical_or.accumulate(self.flipped_M.reshape(self.batch.input_ids.shape), axis=1)
        clean: Array = self.batch.real_M & ~flipped_BT.reshape(-1)
        return clean


@dataclass(frozen=True, slots=True)
class Compared:
    """The traces of one block in one mode (torch, Flax, oracle), and how they routed."""

    traces: tuple[Trace, Trace, Trace]
    routing: LayerRouting | None
    """None where a side does not say how it routed."""


class Walk:
    """The loop over blocks; one block of each side is in memory at a time.

    Args:
        config: the model's.
        sides: torch, Flax and the oracle on the same weights.
        batches: what they are fed.
        dtype: what torch and Flax compute in.
        layers: the blocks to compare; every side enters the first of them with torch's stream.
        detail: how much of torch's trace there is; the other sides are judged on as much.
        advance: called before each step with what it is, for a progress bar.
        read_ahead: called with a layer before the one before it is run.
    """

    def __init__(
        self,
        config: MixtralConfig,
        sides: Sides,
        batches: Sequence[Batch],
        *,
        dtype: Precision,
        layers: range | None = None,
        detail: Detail = ALL,
        advance: Advance = lambda step: None,
        read_ahead: Callable[[int], None] = lambda layer: None,
    ):
        self.config = config
        self.torch, self.flax, self.oracle = (Offered(side) for side in (sides.torch, sides.flax, sides.oracle))
        self.layers = range(config.num_hidden_layers) if layers is None else layers
        self.detail = detail
        self.read_ahead = read_ahead
        self.batches = batches
        self.dtype = dtype
        self.advance = advance
        self.routing: dict[RoutingKey, LayerRouting] = {}
        self.drift: list[Drift] = []
        self.streams: list[Stream] = []
        self.suspect: Suspect | None = None

    def run(self) -> Iterator[Finding]:
        """Walk the model from embedding to losses and give the findings in that order."""
        self.read_ahead(self.layers.start)
        for batch in self.batches:
            yield from self._enter(batch)
        for layer in self.layers:
            self.advance(f"block {layer}")
            self.read_ahead(layer + 1)
            traces = [self.torch.block(layer, stream.torch_BTD, stream.batch) for stream in self.streams]
            self.torch.done(layer)
            for stream, torch in zip(self.streams, traces, strict=True):
                yield from self._block(layer, stream, self._with_lens(self.torch, torch, stream.batch))
            self.flax.done(layer)
            self.oracle.done(layer)
        if self.layers.stop == self.config.num_hidden_layers:
            self.advance("head")
            for stream in self.streams:
                yield from self._head(stream)

    def _enter(self, batch: Batch) -> Iterator[Finding]:
        """Start a stream at the embedding, or before the first of the layers."""
        flipped_M = np.zeros(batch.input_ids.size, bool)
        if self.layers.start == 0:
            self.advance("embedding")
            torch_BTD, flax_BTD = self.torch.embed(batch), self.flax.embed(batch)
            oracle_BTD = self.oracle.embed(batch)
            self.streams.append(Stream(batch, torch_BTD, _usable(flax_BTD, torch_BTD), oracle_BTD, flipped_M))
            yield judge_equal("embed", self._place(None, "local", batch), torch_BTD, flax_BTD)
            return
        torch_BTD = self.torch.stream_before(self.layers.start, batch)
        if torch_BTD is None:
            torch_BTD = self.torch.embed(batch)
            for layer in range(self.layers.start):
                self.advance(f"block {layer}, torch alone")
                self.read_ahead(layer + 1)
                torch_BTD = self.torch.block(layer, torch_BTD, batch).arrays.get("resid_out")
                self.torch.done(layer)
        self.streams.append(Stream(batch, torch_BTD, torch_BTD, torch_BTD, flipped_M))

    def _block(self, layer: int, stream: Stream, torch: Trace) -> Iterator[Finding]:
        batch = stream.batch
        local = self._beside(torch, layer, "local", batch, stream.torch_BTD, stream.torch_BTD)
        routing_known = local.routing is not None
        findings = list(self._judge_block(layer, "local", batch, local, routing_known=routing_known))
        yield from findings
        replayable = stream.torch_BTD is not None and self.detail == ALL
        if self.suspect is None and replayable and _blamed(findings):
            assert stream.torch_BTD is not None
            forced = local.routing is not None and bool(local.routing.flips)
            routing = torch["router_ids"] if forced else None
            self.suspect = Suspect(layer, batch, stream.torch_BTD, torch, local.traces[1], self.dtype, routing)
        if self.dtype == "bfloat16" and (torch.thinned or "attn_probs" in torch.arrays):
            yield from self._operations(layer, stream, local)
        own = self._beside(torch, layer, "propagated", batch, stream.flax_BTD, stream.oracle_BTD)
        stream.routing_known &= own.routing is not None
        yield from self._judge_block(layer, "propagated", batch, own, routing_known=stream.routing_known)
        self._note_drift(layer, batch, *(trace.arrays.get("lens") for trace in own.traces[:2]))
        torch_BTD, flax_BTD, oracle_BTD = (trace.arrays.get("resid_out") for trace in own.traces)
        stream.torch_BTD, stream.flax_BTD, stream.oracle_BTD = torch_BTD, _usable(flax_BTD, torch_BTD), oracle_BTD
        if own.routing is not None:
            stream.flipped_M[[flip.token for flip in own.routing.flips]] = True
        for side, trace in zip(("torch", "flax", "oracle"), own.traces, strict=True):
            logits_ME, like_ME = (found.arrays.get("router_logits") for found in (trace, own.traces[0]))
            if logits_ME is not None and (like_ME is None or logits_ME.shape == like_ME.shape):
                stream.router_logits[side].append(logits_ME)

    def _operations(self, layer: int, stream: Stream, local: Compared) -> Iterator[Finding]:
        """Run every operation alone on torch's recorded input; what a side cannot run so is unchecked."""
        torch = local.traces[0]
        found, exact = (
            Trace() if torch.thinned else side.operations(layer, stream.torch_BTD, torch, stream.batch)
            for side in (self.flax, self.oracle)
        )
        findings = [
            self._judge_operation(
                name, point, self._place(layer, "operation", stream.batch), (torch, found, exact), stream
            )
            for name, point in operation_points(self.config)
        ]
        yield from findings
        if self.suspect is None and _blamed(findings) and stream.torch_BTD is not None:
            first = next(finding.point for finding in findings if finding.verdict == "fail")
            routing = torch["router_ids"]
            self.suspect = Suspect(
                layer, stream.batch, stream.torch_BTD, torch, found, self.dtype, routing, torch, first
            )

    def _judge_operation(
        self, name: str, point: Point, place: Place, traces: tuple[Trace, Trace, Trace], stream: Stream
    ) -> Finding:
        arrays = [trace.arrays.get(name) for trace in traces]
        if point.axes != "B N T S":
            return judge(name, point, place, *arrays, rows=_real_rows(point, stream.batch))
        if len({None if array is None else array.shape for array in arrays}) > 1:
            return judge(name, point, place, *arrays)
        # Hidden keys have no part, and padding is no query.
        pairs_BTS = stream.batch.pairs_BTS
        seen = [None if array is None else array.swapaxes(0, 1)[:, pairs_BTS].reshape(-1, 1) for array in arrays]
        return judge(name, point, place, *seen)

    def _place(self, layer: int | None, mode: Mode, batch: Batch) -> Place:
        return Place(layer, mode, batch.name, self.dtype)

    def _beside(
        self, torch: Trace, layer: int, mode: Mode, batch: Batch, flax_BTD: Array | None, oracle_BTD: Array | None
    ) -> Compared:
        """Run Flax and the oracle beside torch's trace; where Flax routes otherwise, once more with torch's experts."""
        oracle = self.oracle.block(layer, oracle_BTD, batch, torch.arrays.get("router_ids"))
        flax = self.flax.block(layer, flax_BTD, batch)
        if rerouted(torch, flax, batch).any():
            free = flax
            flax = self.flax.block(layer, flax_BTD, batch, torch["router_ids"])
            flax.arrays.update({name: array for name, array in free.arrays.items() if name in BEFORE_ROUTING})
        routing = self._compare_routing(layer, mode, batch, (torch, flax, oracle))
        self._with_lens(self.oracle, oracle, batch)
        self._with_lens(self.flax, flax, batch)
        return Compared((torch, flax, oracle), routing)

    def _compare_routing(
        self, layer: int, mode: Mode, batch: Batch, traces: tuple[Trace, Trace, Trace]
    ) -> LayerRouting | None:
        """Compare routing and keep the comparison; None where a side does not say how it routed."""
        if any(name not in trace.arrays for trace in traces for name in ("router_ids", "router_logits")):
            return None
        torch, flax, _ = traces
        if flax["router_logits"].shape != torch["router_logits"].shape or not comparable_ids(torch, flax):
            return None
        routing = compare_routing(*traces, batch)
        self.routing[layer, mode, batch.name, self.dtype] = routing
        return routing

    def _with_lens(self, side: Offered, trace: Trace, batch: Batch) -> Trace:
        """Add `lens`; a side that has lost its stream has none."""
        x_BTD = trace.arrays.get("resid_out")
        if x_BTD is not None and x_BTD.shape == (*batch.input_ids.shape, self.config.hidden_size):
            head = side.head(x_BTD, batch)
            if "logits" in head.arrays:
                lens = Trace({"lens": head["logits"]}, thinned=head.thinned)
                trace.arrays["lens"] = (self.detail.thin(lens, batch) if trace.thinned else lens)["lens"]
        return trace

    def _judge_block(
        self, layer: int, mode: Mode, batch: Batch, compared: Compared, *, routing_known: bool
    ) -> Iterator[Finding]:
        traces, routing = compared.traces, compared.routing
        torch, flax, oracle = (self.detail.thin(trace, batch) for trace in traces)
        thinned = (torch, flax, oracle)
        forced = routing is not None and bool(routing.flips)
        for name, point in block_points(self.config):
            place = replace(self._place(layer, mode, batch), forced=forced and name not in BEFORE_ROUTING)
            if point.kind == "ids":
                finding = _judge_routing(name, place, routing)
            elif name == "router_weights" and routing is not None:
                finding = self._judge_weights(point, place, traces, batch, forced)
            elif point.place == "expert" and not _same_rows(name, thinned):
                finding = place.finding(name, "fail", "the sides recorded this expert on different tokens")
            else:
                arrays = (trace.arrays.get(name) for trace in thinned)
                rows = _real_rows(point, batch) if self.detail.keeps_every_token(name) else None
                recorded = self.detail.roundoff(name)
                finding = judge(name, point, place, *arrays, rows=rows, recorded_roundoff=recorded)
                finding = self.detail.weigh(finding)
            yield self._unless_rerouted(finding, routing_known)

    def _unless_rerouted(self, finding: Finding, routing_known: bool) -> Finding:
        """Leave a failure in bfloat16 unchecked where a benign flip that no side tells of would cause it too."""
        if routing_known or self.dtype != "bfloat16" or finding.verdict != "fail":
            return finding
        reason = f"{finding.reason}; a side does not say how it routed here or before"
        return replace(finding, verdict="unchecked", reason=reason)

    def _judge_weights(
        self, point: Point, place: Place, traces: tuple[Trace, Trace, Trace], batch: Batch, forced: bool
    ) -> Finding:
        """Compare routing weights expert by expert: the order of a token's experts is no difference."""
        torch, flax, oracle = traces
        torch_ids_MA = torch["router_ids"]
        flax_ids_MA = torch_ids_MA if forced else flax["router_ids"]
        dense = (
            dense_weights(ids_MA, trace.arrays.get("router_weights"), self.config.num_local_experts)
            for ids_MA, trace in ((torch_ids_MA, torch), (flax_ids_MA, flax), (torch_ids_MA, oracle))
        )
        return judge("router_weights", point, place, *dense, rows=batch.real_M)

    def _head(self, stream: Stream) -> Iterator[Finding]:
        torch = self.torch.head(stream.torch_BTD, stream.batch)
        stream.torch_logits = torch.arrays.get("logits")
        streams: tuple[tuple[Mode, Array | None, Array | None], ...] = (
            ("local", stream.torch_BTD, stream.torch_BTD),
            ("propagated", stream.flax_BTD, stream.oracle_BTD),
        )
        for mode, flax_BTD, oracle_BTD in streams:
            flax = self.flax.head(flax_BTD, stream.batch)
            oracle = self.oracle.head(oracle_BTD, stream.batch)
            stream.oracle_logits = oracle.arrays.get("logits")  # of the propagated stream, which comes last
            if mode == "propagated":
                self._note_drift(None, stream.batch, stream.torch_logits, flax.arrays.get("logits"))
            if self.config.architecture == "MixtralForCausalLM":
                self._add_losses(stream, mode, torch, flax, oracle)
            findings = []
            for name, point in head_points(self.config):
                arrays = (trace.arrays.get(name) for trace in (torch, flax, oracle))
                place = self._place(None, mode, stream.batch)
                finding = judge(name, point, place, *arrays, rows=_real_rows(point, stream.batch))
                findings.append(self._unless_rerouted(finding, mode == "local" or stream.routing_known))
            if self.suspect is None and mode == "local" and stream.torch_BTD is not None and _blamed(findings):
                self.suspect = Suspect(None, stream.batch, stream.torch_BTD, torch, flax, self.dtype)
            yield from findings

    def _note_drift(self, layer: int | None, batch: Batch, torch: Array | None, flax: Array | None) -> None:
        """Keep how far a language model's expectations have moved."""
        kept = layer is None or self.detail == ALL
        if self.config.architecture == "MixtralForCausalLM" and kept and torch is not None and flax is not None:
            drift = compare_logits(torch, flax, batch, layer, self.dtype)
            self.drift += [] if drift is None else [drift]

    def _add_losses(self, stream: Stream, mode: Mode, torch: Trace, flax: Trace, oracle: Trace) -> None:
        """Add the losses where the side has recorded every layer's router; else they are missing, and so unchecked."""
        traces = {"torch": torch, "flax": flax, "oracle": oracle}
        for (name, trace), side in zip(traces.items(), (self.torch, self.flax, self.oracle), strict=True):
            own = "torch" if mode == "local" else name
            logits = (torch if mode == "local" else trace).arrays.get("logits")
            complete = len(stream.router_logits[own]) == self.config.num_hidden_layers
            like = torch.arrays.get("logits")
            if logits is None or (like is not None and logits.shape != like.shape) or not complete:
                continue
            trace.arrays.update(side.losses(logits, stream.router_logits[own], stream.batch).arrays)


def _usable(flax_BTD: Array | None, torch_BTD: Array | None) -> Array | None:
    """Let Flax go on from torch's stream where it has lost its own: its other blocks are still to be judged."""
    lost = flax_BTD is None or (torch_BTD is not None and flax_BTD.shape != torch_BTD.shape)
    return torch_BTD if lost else flax_BTD


def _blamed(findings: Sequence[Finding]) -> bool:
    """Say whether a block or the head failed by itself: a wrong head spoils every block's lens."""
    return any(finding.verdict == "fail" and finding.point != "lens" for finding in findings)


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


def _same_rows(name: str, traces: tuple[Trace, Trace, Trace]) -> bool:
    """Say whether all traces hold this expert for the same tokens; a trace without it is judged as missing."""
    expert = int(name.split(".")[1])
    rows = [trace.rows.get(expert) for trace in traces if name in trace.arrays]
    return all(row is not None and rows[0] is not None and np.array_equal(row, rows[0]) for row in rows)
