"""One form of a fault, as a replay tries it. Imports parity.diagnosis.replay only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from parity.diagnosis.replay import Block

__all__ = ["Change"]


def _as_it_is(block: Block) -> Block:
    return block


@dataclass(frozen=True, slots=True)
class Change:
    """One form of a fault.

    Args:
        detail: what it does, with its numbers; goes into the evidence.
        ops: the operations that it replaces, by their field of `Ops`.
        block: changes anything else: configuration, batch, weights.
        at: the points that it touches where that is fewer than its hypothesis says.
        covers: points that it disturbs in a way that cannot be replayed.
    """

    detail: str
    ops: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    block: Callable[[Block], Block] = _as_it_is
    at: tuple[str, ...] | None = None
    covers: tuple[str, ...] = ()
