"""A side that measures itself: seconds inside its calls and the process's memory after them."""

import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from parity.decoding import Decoded, Generates
from parity.gradients import Differentiable, Gradients
from parity.sides.offered import Offered
from parity.trace import Array, Batch, Trace

__all__ = ["Cost", "Timed"]

T = TypeVar("T")


@dataclass(slots=True)
class Cost:
    """What one side took: seconds inside its calls, and the process's resident bytes after the largest of them."""

    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, max(self.peak_bytes, other.peak_bytes))


class Timed:
    """Pass every call on to a side, whole or in part (`Offered`), and add up what it costs."""

    def __init__(self, side: Any):
        self.cost = Cost()
        self.side = side
        self._offered = Offered(side)
        self.name = self._offered.name

    def embed(self, batch: Batch) -> Array | None:
        """See `Offered.embed`."""
        return self._measured(lambda: self._offered.embed(batch))

    def block(self, layer: int, x_BTD: Array | None, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Offered.block`."""
        return self._measured(lambda: self._offered.block(layer, x_BTD, batch, routing))

    def operations(self, layer: int, x_BTD: Array | None, given: Trace, batch: Batch) -> Trace:
        """See `Offered.operations`."""
        return self._measured(lambda: self._offered.operations(layer, x_BTD, given, batch))

    def head(self, x_BTD: Array | None, batch: Batch) -> Trace:
        """See `Offered.head`."""
        return self._measured(lambda: self._offered.head(x_BTD, batch))

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        """See `Offered.losses`."""
        return self._measured(lambda: self._offered.losses(logits, router_logits, batch))

    def whole(self, batch: Batch) -> Array | None:
        """See `Offered.whole`."""
        return self._measured(lambda: self._offered.whole(batch))

    def done(self, layer: int) -> None:
        """See `Offered.done`."""
        self._offered.done(layer)

    def stream_before(self, layer: int, batch: Batch) -> Array | None:
        """See `Offered.stream_before`."""
        return self._offered.stream_before(layer, batch)

    def gradients(self, batch: Batch, labels_BT: Array, routing: Sequence[Array] | None = None) -> Gradients | None:
        """See `Differentiable.gradients`; None from a side that has none."""
        side = self.side
        if not isinstance(side, Differentiable):
            return None
        return self._measured(lambda: side.gradients(batch, labels_BT, routing))

    def generate(self, batch: Batch, new: int) -> Array | None:
        """See `Generates.generate`."""
        side = self.side
        return self._measured(lambda: side.generate(batch, new)) if isinstance(side, Generates) else None

    def decode(self, batch: Batch, ids_BX: Array, routing: Sequence[Array] | None = None) -> Decoded | None:
        """See `Generates.decode`."""
        side = self.side
        return self._measured(lambda: side.decode(batch, ids_BX, routing)) if isinstance(side, Generates) else None

    def _measured(self, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        found = call()
        self.cost.seconds += time.perf_counter() - start
        self.cost.peak_bytes = max(self.cost.peak_bytes, _resident_bytes())
        return found


def _resident_bytes() -> int:
    """Give what the process holds now; where the system does not say, the most it ever held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
