"""The walk: every block of every side, side by side, on torch's input (local) and on its own (propagated)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.diagnosis.causes import Suspect
from parity.drift import Drift, compare_logits
from parity.judging import BEFORE_ROUTING, Judge, blamed
from parity.metrics import Precision
from parity.recordings.detail import ALL, Detail
from parity.router import LayerRouting, comparable_ids, compare_routing, contested, rerouted
from parity.sides.offered import Offered
from parity.stream import Compared, Stream
from parity.trace import Array, Batch, Trace
from parity.verdict import Finding, Mode, judge_equal

__all__ = ["RoutingKey", "Sides", "Walk"]

Advance = Callable[[str], None]

RoutingKey = tuple[int, Mode, str, Precision]
"""Layer, mode, batch and dtype of a comparison of routing."""


@dataclass(frozen=True, slots=True)
class Sides:
    """The three implementations of one comparison, each of `Side`, whole or in part (`Offered`)."""

    torch: Any
    flax: Any
    oracle: Any


class Walk:
    """The loop over blocks; one block of each side is in memory at a time.

    Args:
        config: the model's.
        sides: torch, Flax and the oracle on the same weights.
        batches: what they are fed.
        dtype: what torch and Flax compute in.
        layers: the blocks to compare; every side enters the first of them with torch's stream.
        follow: enter it with each side's own stream instead, as a walk through all blocks does: every side runs those
            before, and nothing is compared there.
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
        follow: bool = False,
        detail: Detail = ALL,
        advance: Advance = lambda step: None,
        read_ahead: Callable[[int], None] = lambda layer: None,
    ):
        self.config = config
        self.torch, self.flax, self.oracle = (Offered(side) for side in (sides.torch, sides.flax, sides.oracle))
        self.layers = range(config.num_hidden_layers) if layers is None else layers
        self.follow = follow
        self.detail = detail
        self.judge = Judge(config, dtype, detail)
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
        first = 0 if self.follow else self.layers.start
        self.read_ahead(first)
        for batch in self.batches:
            yield from self._enter(batch)
        for layer in range(first, self.layers.stop):
            self.advance(f"block {layer}")
            self.read_ahead(layer + 1)
            traces = [self.torch.block(layer, stream.torch_BTD, stream.batch) for stream in self.streams]
            self.torch.done(layer)
            for stream, torch in zip(self.streams, traces, strict=True):
                last = stream is self.streams[-1]
                if layer in self.layers:
                    self._with_lens(self.torch, torch, stream.batch)
                    yield from self._block(layer, stream, torch, last=last)
                else:
                    self._pass(layer, stream, torch, last=last)
        if self.layers.stop == self.config.num_hidden_layers:
            self.advance("head")
            for stream in self.streams:
                yield from self._head(stream)

    def _enter(self, batch: Batch) -> Iterator[Finding]:
        """Start a stream at the embedding, or before the first of the layers."""
        flipped_M = np.zeros(batch.input_ids.size, bool)
        if self.layers.start == 0 or self.follow:
            self.advance("embedding")
            torch_BTD, flax_BTD = self.torch.embed(batch), self.flax.embed(batch)
            oracle_BTD = self.oracle.embed(batch)
            self.streams.append(Stream(batch, torch_BTD, _usable(flax_BTD, torch_BTD), oracle_BTD, flipped_M))
            if self.layers.start == 0:
                yield judge_equal("embed", self.judge.place(None, "local", batch), torch_BTD, flax_BTD)
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

    def _block(self, layer: int, stream: Stream, torch: Trace, *, last: bool) -> Iterator[Finding]:
        """Run one side after the other, so that one block is in memory at a time; then judge."""
        batch, torch_BTD = stream.batch, stream.torch_BTD
        alone = self.dtype == "bfloat16" and (torch.thinned or "attn_probs" in torch.arrays)
        flax = [self._flax_block(torch, layer, batch, x_BTD) for x_BTD in (torch_BTD, stream.flax_BTD)]
        flax_alone = self._operations(self.flax, layer, stream, torch) if alone else Trace()
        if last:
            self.flax.done(layer)
        forced_MA = torch.arrays.get("router_ids")
        exact = [self.oracle.block(layer, x_BTD, batch, forced_MA) for x_BTD in (torch_BTD, stream.oracle_BTD)]
        exact_alone = self._operations(self.oracle, layer, stream, torch) if alone else Trace()
        if last:
            self.oracle.done(layer)
        local = self._beside("local", layer, batch, (torch, flax[0], exact[0]))
        yield from self._judge_local(layer, stream, local)
        if alone:
            yield from self._judge_alone(layer, stream, (torch, flax_alone, exact_alone))
        for side, trace in ((self.oracle, exact[1]), (self.flax, flax[1])):
            self._with_lens(side, trace, batch)
        own = self._beside("propagated", layer, batch, (torch, flax[1], exact[1]))
        yield from self.judge.block(layer, "propagated", batch, own, settled=stream.settled)
        stream.settled &= own.settled
        self._move_on(layer, stream, own)

    def _pass(self, layer: int, stream: Stream, torch: Trace, *, last: bool) -> None:
        """Take every side's own stream past a block that is not compared, as `_block` does."""
        flax = self._flax_block(torch, layer, stream.batch, stream.flax_BTD)
        oracle = self.oracle.block(layer, stream.oracle_BTD, stream.batch, torch.arrays.get("router_ids"))
        if last:
            self.flax.done(layer)
            self.oracle.done(layer)
        own = self._beside("propagated", layer, stream.batch, (torch, flax, oracle))
        stream.settled &= own.settled
        self._move_on(layer, stream, own)

    def _judge_local(self, layer: int, stream: Stream, local: Compared) -> Iterator[Finding]:
        findings = list(self.judge.block(layer, "local", stream.batch, local, settled=True))
        yield from findings
        if self.suspect is None and stream.torch_BTD is not None and self.detail == ALL and blamed(findings):
            torch, flax, _ = local.traces
            forced = local.routing is not None and bool(local.routing.flips)
            routing = torch["router_ids"] if forced else None
            self.suspect = Suspect(layer, stream.batch, stream.torch_BTD, torch, flax, self.dtype, routing)

    def _judge_alone(self, layer: int, stream: Stream, traces: tuple[Trace, Trace, Trace]) -> Iterator[Finding]:
        findings = list(self.judge.operations(layer, stream.batch, traces))
        yield from findings
        if self.suspect is None and stream.torch_BTD is not None and blamed(findings):
            torch, flax, _ = traces
            first = next(finding.point for finding in findings if finding.verdict == "fail")
            self.suspect = Suspect(
                layer, stream.batch, stream.torch_BTD, torch, flax, self.dtype, torch["router_ids"], torch, first
            )

    def _move_on(self, layer: int, stream: Stream, own: Compared) -> None:
        """Take the streams past a block, with what later comparisons must know of it."""
        self._note_drift(layer, stream.batch, *(trace.arrays.get("lens") for trace in own.traces[:2]))
        torch_BTD, flax_BTD, oracle_BTD = (trace.arrays.get("resid_out") for trace in own.traces)
        stream.torch_BTD, stream.flax_BTD, stream.oracle_BTD = torch_BTD, _usable(flax_BTD, torch_BTD), oracle_BTD
        if own.routing is not None:
            stream.flipped_M[[flip.token for flip in own.routing.flips]] = True
        for side, trace in zip(("torch", "flax", "oracle"), own.traces, strict=True):
            logits_ME, like_ME = (found.arrays.get("router_logits") for found in (trace, own.traces[0]))
            if logits_ME is not None and (like_ME is None or logits_ME.shape == like_ME.shape):
                stream.router_logits[side].append(logits_ME)

    def _operations(self, side: Offered, layer: int, stream: Stream, torch: Trace) -> Trace:
        """Run every operation alone on torch's recorded input, of which every token is needed."""
        return Trace() if torch.thinned else side.operations(layer, stream.torch_BTD, torch, stream.batch)

    def _flax_block(self, torch: Trace, layer: int, batch: Batch, flax_BTD: Array | None) -> Trace:
        """Run Flax's block; where it routes otherwise than torch, once more with torch's experts."""
        free = self.flax.block(layer, flax_BTD, batch)
        if not rerouted(torch, free, batch).any():
            return free
        forced = self.flax.block(layer, flax_BTD, batch, torch["router_ids"])
        forced.arrays.update({name: array for name, array in free.arrays.items() if name in BEFORE_ROUTING})
        return forced

    def _beside(self, mode: Mode, layer: int, batch: Batch, traces: tuple[Trace, Trace, Trace]) -> Compared:
        """Put the sides' traces of a block side by side."""
        torch, _, oracle = traces
        routing = self._compare_routing(layer, mode, batch, traces)
        return Compared(traces, routing, settled=routing is not None or not contested(torch, oracle, batch))

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
        if layer in self.layers:
            self.routing[layer, mode, batch.name, self.dtype] = routing
        return routing

    def _with_lens(self, side: Offered, trace: Trace, batch: Batch) -> None:
        """Add `lens`; a side that has lost its stream has none."""
        x_BTD = trace.arrays.get("resid_out")
        if x_BTD is not None and x_BTD.shape == (*batch.input_ids.shape, self.config.hidden_size):
            head = side.head(x_BTD, batch)
            if "logits" in head.arrays:
                lens = Trace({"lens": head["logits"]}, thinned=head.thinned)
                if head.thinned:  # answered from a recording, which a block computed just now must not have more than
                    thin = self.detail.thin(trace, batch)
                    trace.arrays, trace.rows, trace.thinned = thin.arrays, thin.rows, thin.thinned
                trace.arrays["lens"] = (self.detail.thin(lens, batch) if trace.thinned else lens)["lens"]

    def _head(self, stream: Stream) -> Iterator[Finding]:
        batch = stream.batch
        torch = self.torch.head(stream.torch_BTD, batch)
        stream.torch_logits = torch.arrays.get("logits")
        streams: tuple[tuple[Mode, Array | None, Array | None], ...] = (
            ("local", stream.torch_BTD, stream.torch_BTD),
            ("propagated", stream.flax_BTD, stream.oracle_BTD),
        )
        for mode, flax_BTD, oracle_BTD in streams:
            flax, oracle = self.flax.head(flax_BTD, batch), self.oracle.head(oracle_BTD, batch)
            stream.oracle_logits = oracle.arrays.get("logits")  # of the propagated stream, which comes last
            if mode == "propagated":
                self._note_drift(None, batch, stream.torch_logits, flax.arrays.get("logits"))
            if self.config.architecture == "MixtralForCausalLM":
                self._add_losses(stream, mode, torch, flax, oracle)
            settled = mode == "local" or stream.settled
            findings = list(self.judge.head(mode, batch, (torch, flax, oracle), settled=settled))
            if self.suspect is None and mode == "local" and stream.torch_BTD is not None and blamed(findings):
                self.suspect = Suspect(None, batch, stream.torch_BTD, torch, flax, self.dtype)
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
