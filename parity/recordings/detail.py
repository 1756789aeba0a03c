"""How much of a trace is kept: every token or a sample, every bit or bfloat16. What is kept less of decides less.

Imports NumPy and parity's own.
"""

from dataclasses import dataclass, replace

import numpy as np

from parity.metrics import UNIT_ROUNDOFF
from parity.trace import FEW_ROWS, Array, Batch, Trace
from parity.verdict import Finding

__all__ = ["ALL", "Detail"]

ROUTER = ("router_logits", "router_probs", "router_ids", "router_weights")
WHOLE = frozenset(("embed", "resid_in", *ROUTER, "resid_out", "final_norm", "logits", "loss", "aux_loss"))
"""Points that are always kept whole: what a comparison is fed, and what it decides by."""


@dataclass(frozen=True, slots=True)
class Detail:
    """What a recording keeps of the points that are not `WHOLE`.

    Args:
        tokens: how many of a batch's real tokens, evenly spread; None for all, padding included. An expert keeps as
            many of its own tokens.
        bfloat16: whether values are rounded to bfloat16.
    """

    tokens: int | None = None
    bfloat16: bool = False

    def keeps_every_token(self, point: str) -> bool:
        """Say whether the rows of a point are all tokens."""
        return self.tokens is None or point in WHOLE

    def thin(self, trace: Trace, batch: Batch) -> Trace:
        """Keep the sample's tokens: [1, R, ...] of [B, T, ...], and R rows of each expert's.

        Args:
            trace: of a block; one that is thinned already is given back.
            batch: what it was run on.
        """
        if self.tokens is None or trace.thinned:
            return trace
        sample = _spread(np.flatnonzero(batch.real_M), self.tokens)
        rows = {
            expert: _spread(np.arange(len(held)), max(self.tokens, FEW_ROWS)) for expert, held in trace.rows.items()
        }
        arrays = {}
        for name, array in trace.arrays.items():
            if name in WHOLE:
                arrays[name] = array
            elif name in ("attn_scores", "attn_probs"):
                continue  # for single operations, which need every token
            elif name.startswith("expert."):
                arrays[name] = array[rows[int(name.split(".")[1])]]
            else:
                arrays[name] = array.reshape(-1, *array.shape[2:])[sample][None]
        return Trace(arrays, {expert: held[rows[expert]] for expert, held in trace.rows.items()}, thinned=True)

    def weigh(self, finding: Finding) -> Finding:
        """Let a point that passed in bfloat16 inform: what hides below that rounding was not seen."""
        if not self.bfloat16 or finding.point in WHOLE or finding.verdict != "pass" or finding.dtype == "bfloat16":
            return finding
        return replace(
            finding, decides=False, reason="recorded in bfloat16: a difference below its rounding is not seen"
        )

    def roundoff(self, point: str) -> float:
        """Give the unit roundoff that values were recorded with; 0 where they are as they were computed."""
        return UNIT_ROUNDOFF["bfloat16"] if self.bfloat16 and point not in WHOLE else 0.0


ALL = Detail()


def _spread(indices: Array, most: int) -> Array:
    """Take at most so many, evenly spread."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]
