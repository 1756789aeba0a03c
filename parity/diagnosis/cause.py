"""What a diagnosis says. Imports the standard library only."""

from dataclasses import dataclass

__all__ = ["UNKNOWN", "Cause"]

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why Flax's answer is wrong at one place.

    Args:
        fault: the slug of the fault, or "unknown".
        layer: 0-based; None outside the blocks.
        point: the comparison point, or the leaf's path where a weight is wrong.
        evidence: one sentence, in numbers.
    """

    fault: str
    layer: int | None
    point: str
    evidence: str
