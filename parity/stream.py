"""One batch on its way through the model, and the traces of one block side by side."""

from dataclasses import dataclass, field

import numpy as np

from parity.router import LayerRouting
from parity.trace import Array, Batch, Trace

__all__ = ["Compared", "Stream"]


@dataclass(slots=True)
class Stream:
    """One batch on its way through the model."""

    batch: Batch
    torch_BTD: Array | None
    flax_BTD: Array | None
    oracle_BTD: Array | None
    flipped_M: Array
    """Tokens that any layer so far routed differently in the propagated stream."""
    settled: bool = True
    """Whether no side can have routed otherwise so far, in the propagated stream, without saying so."""
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
    settled: bool
    """Whether it is said, or no rounding can change it."""
