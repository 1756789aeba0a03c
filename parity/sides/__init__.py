"""The sides of a comparison. `Side` is the protocol: anything that offers it, whole or in part, can be walked.

Of a side that is tried (`--flax-side`), every method may be missing, and every array of a trace: what is not offered is
unchecked.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from parity.trace import Array, Batch, Trace

__all__ = ["Keeping", "Operations", "Seekable", "Side", "WholeModel"]


class Side(Protocol):
    """One implementation of Mixtral, cut into the pieces that the walk calls.

    Arrays go in and come out as NumPy. Points (parity.points) that a side does not offer are left out of its traces.
    """

    name: str

    def embed(self, batch: Batch) -> Array:
        """Look the tokens up: [B, T, D]."""
        ...

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """Run one decoder block and record its points.

        Args:
            layer: 0-based.
            x_BTD: the residual stream before the block.
            batch: gives mask and positions.
            routing: [M, A] expert ids to use instead of the router's own choice; the weights still come from the
                side's own logits. `router_ids` is then still the side's own choice.

        Returns:
            The block's points but `lens`; `resid_out` is what the next block takes.
        """
        ...

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        """Apply final norm and head: `final_norm`, and `logits` where the architecture has a head."""
        ...

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        """Compute `loss` (its labels as `training_labels` gives them) and `aux_loss` from L arrays [M, E]."""
        ...


@runtime_checkable
class Seekable(Protocol):
    """A side that knows the residual stream before a block without running those before it, as a recording does."""

    def stream_before(self, layer: int, batch: Batch) -> Array | None:
        """Give the input of a block [B, T, D]; None where it is not known."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """A side that keeps a block's parameters between calls."""

    def done(self, layer: int) -> None:
        """Let go of a block: no call for it follows."""
        ...


@runtime_checkable
class WholeModel(Protocol):
    """A side that can also run the model as its users do, in one call."""

    def whole(self, batch: Batch) -> Array | None:
        """Give the logits; None for a model without a head."""
        ...


@runtime_checkable
class Operations(Protocol):
    """A side that can run each operation of a block by itself."""

    def operations(self, layer: int, x_BTD: Array, given: Trace, batch: Batch) -> Trace:
        """Run every operation of a block alone, each on what torch recorded as its input.

        Args:
            layer: 0-based.
            x_BTD: the block's input.
            given: torch's trace of the block; `attn_scores` and `attn_probs` among its points.
            batch: gives mask and positions.

        Returns:
            The points that come out, but `router_ids` and `lens`; `moe_out` is the weighted sum of the experts'
            recorded outputs, for real tokens.
        """
        ...
