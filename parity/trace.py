"""What a side is given and what it gives back: a batch of tokens, and the named arrays of one piece of the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Batch", "Trace", "expert_rows", "routed"]

Array = npt.NDArray[Any]

FEW_ROWS = 16
"""An expert that fewer tokens chose is given every token: it must be compared although hardly used."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids as every side gets them.

    Args:
        name: how reports call it.
        input_ids: [B, T] int64, each below vocab_size.
        attention_mask: [B, T] int64, 1 on real tokens and 0 on padding; None where there is no padding.
        position_ids: [B, T] int64; None for 0..T-1 in each row. Without an attention_mask, positions that do not go
            up by one start a new packed sequence, as in transformers.
    """

    name: str
    input_ids: Array
    attention_mask: Array | None = None
    position_ids: Array | None = None

    @property
    def real_BT(self) -> npt.NDArray[np.bool_]:
        """[B, T] bool: which tokens are not padding."""
        mask_BT = np.ones(self.input_ids.shape) if self.attention_mask is None else self.attention_mask
        return mask_BT.astype(bool)

    @property
    def real_M(self) -> npt.NDArray[np.bool_]:
        """[M] bool: the same, token by token."""
        return self.real_BT.reshape(-1)

    @property
    def pairs_BTS(self) -> npt.NDArray[np.bool_]:
        """[B, T, T] bool: the pairs of a real query and a real key that is not later."""
        real_BT = self.real_BT
        return np.tril(real_BT[:, :, None] & real_BT[:, None, :])


@dataclass(slots=True)
class Trace:
    """The arrays of one block (or of the head) by point name.

    `rows[e]` are the indices into M, ascending, of the tokens that `expert.{e}.*` hold. `thinned` says that points
    are held of a sample of tokens alone (`parity.recordings.detail`).
    """

    arrays: dict[str, Array] = field(default_factory=dict)
    rows: dict[int, Array] = field(default_factory=dict)
    thinned: bool = False

    def __getitem__(self, point: str) -> Array:
        return self.arrays[point]


def expert_rows(ids_MA: Array, batch: Batch, experts: int) -> Sequence[Array]:
    """Choose the tokens on which each expert is recorded: the real ones routed to it, or all if those are few.

    Args:
        ids_MA: experts of each token.
        batch: says which tokens are real.
        experts: E.

    Returns:
        E arrays of ascending indices into M.
    """
    real = batch.real_M
    every = np.flatnonzero(real)
    chosen = [np.flatnonzero((ids_MA == expert).any(axis=1) & real) for expert in range(experts)]
    return [rows if len(rows) >= FEW_ROWS else every for rows in chosen]


def routed(trace: Trace, expert: int) -> tuple[Array, Array]:
    """Tell which of an expert's rows were routed to it, and with what weight.

    Args:
        trace: a block's, with `router_ids` and `router_weights` that belong to them.
        expert: its number.

    Returns:
        [R] bool and [R] weights, 0 where not routed.
    """
    rows_R = trace.rows[expert]
    hit_RA = trace["router_ids"][rows_R] == expert
    weights_R: Array = np.where(hit_RA, trace["router_weights"][rows_R], 0).sum(axis=1)
    return hit_RA.any(axis=1), weights_R
