"""How much margins vary among correct implementations of the Flax side on the same inputs, and what follows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from parity.baseline import Baseline
from parity.port import Port
from parity.result import Result
from parity.selftest.controls import CONTROLS

__all__ = ["BENIGN", "with_baseline"]

BENIGN = ("op-by-op", "other-batch-size", "softmax-of-chosen")
"""The variants whose margins are the noise of a baseline: other roundings, other sums, another way to a number."""

Again = Callable[[Callable[[Port], Port]], Result]
"""The same run with another Flax side."""


def with_baseline(result: Result, path: Path, again: Again) -> Result:
    """Hold a result against the baseline in a file; write the file where it is not there.

    Args:
        result: of a run.
        path: the baseline; JSON.
        again: makes the run again with a variant of the Flax side, to measure noise.

    Returns:
        The result, with the comparison in it where there was a baseline, or a note where none could be written.

    Raises:
        BadInput: the file is no baseline, or that of another comparison.
    """
    if path.exists():
        return result.held_to(Baseline.read(path), path)
    if result.verdict != "pass":
        note = f"no baseline was written to {path}: a baseline is a run that passes"
        return replace(result, notes=[*result.notes, note])
    variants = [control for control in CONTROLS if control.slug in BENIGN]
    benign = [again(control.change).findings for control in variants]
    made = Baseline.of(result.dtype, result.findings, benign, result.packages, result.provenance)
    made.write(path)
    note = f"wrote the baseline {path}: {len(made.margins)} margins, noise of {len(benign)} correct variants"
    return replace(result, notes=[*result.notes, note])
