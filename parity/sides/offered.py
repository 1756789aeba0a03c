"""A side as the walk calls it: what it does not offer is answered with nothing, and so comes out as unchecked."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from convert import BadInput
from parity.points import POINTS, kind_of
from parity.sides import Keeping, Operations, Seekable, WholeModel
from parity.trace import Array, Batch, Trace

__all__ = ["Nothing", "Offered"]

KINDS = frozenset(kind_of(point.name) for point in POINTS)


class Nothing:
    """A side that offers nothing at all."""

    def __init__(self, name: str):
        self.name = name


class Offered:
    """Any implementation of `Side`, whole or in part.

    Args:
        side: its missing methods, and arrays that its traces leave out, count as not offered.
    """

    def __init__(self, side: Any):
        self.name: str = getattr(side, "name", "flax")
        self.side = side

    def embed(self, batch: Batch) -> Array | None:
        """See `Side.embed`; None from a side that has none."""
        found = self.side.embed(batch) if hasattr(self.side, "embed") else None
        return None if found is None else np.asarray(found)

    def block(self, layer: int, x_BTD: Array | None, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`; empty without an input."""
        if x_BTD is None or not hasattr(self.side, "block"):
            return Trace()
        return self._known(self.side.block(layer, x_BTD, batch, routing), "block")

    def operations(self, layer: int, x_BTD: Array | None, given: Trace, batch: Batch) -> Trace:
        """See `Operations.operations`."""
        if x_BTD is None or not isinstance(self.side, Operations):
            return Trace()
        return self._known(self.side.operations(layer, x_BTD, given, batch), "operations")

    def head(self, x_BTD: Array | None, batch: Batch) -> Trace:
        """See `Side.head`; empty without an input."""
        if x_BTD is None or not hasattr(self.side, "head"):
            return Trace()
        return self._known(self.side.head(x_BTD, batch), "head")

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        """See `Side.losses`."""
        if not hasattr(self.side, "losses"):
            return Trace()
        return self._known(self.side.losses(logits, router_logits, batch), "losses")

    def whole(self, batch: Batch) -> Array | None:
        """See `WholeModel.whole`."""
        found = self.side.whole(batch) if isinstance(self.side, WholeModel) else None
        return None if found is None else np.asarray(found)

    def done(self, layer: int) -> None:
        """See `Keeping.done`."""
        if isinstance(self.side, Keeping):
            self.side.done(layer)

    def stream_before(self, layer: int, batch: Batch) -> Array | None:
        """See `Seekable.stream_before`; None from a side that has to run the blocks before."""
        return self.side.stream_before(layer, batch) if isinstance(self.side, Seekable) else None

    def _known(self, trace: Trace, call: str) -> Trace:
        """Give the trace as NumPy arrays; refuse names that no point has, which would be left out without a word."""
        for name in trace.arrays:
            kind = kind_of(name)
            if kind not in KINDS:
                near = get_close_matches(kind, KINDS, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(sorted(KINDS))}"
                raise BadInput(f"{self.name}: {call} records {name!r}, which is no comparison point{hint}")
        return Trace({n: np.asarray(a) for n, a in trace.arrays.items()}, dict(trace.rows), trace.thinned)
