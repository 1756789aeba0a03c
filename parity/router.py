"""Routing compared: which tokens the sides route differently, and whether rounding excuses it."""

from dataclasses import dataclass

import numpy as np

from parity.trace import Array, Batch, Trace

__all__ = [
    "Flip",
    "LayerRouting",
    "comparable_ids",
    "compare_routing",
    "contested",
    "dense_weights",
    "exact_ties",
    "rerouted",
]

EXCUSED_ERRORS = 4.0
"""A flip is rounding where the oracle's margin is within so many of the token's calibrated logit errors: two sides that
are each as wrong as torch reorder two logits that are no farther apart."""


@dataclass(frozen=True, slots=True)
class Flip:
    """One real token whose set of experts differs between torch and Flax.

    Args:
        token: index into M.
        torch_ids: torch's experts, ascending.
        flax_ids: Flax's, ascending.
        margin: the oracle's logit of rank A minus that of rank A + 1.
        logit_error: the token's calibrated logit error.
        tie: whether torch's own logits at rank A and A + 1 are equal.
    """

    token: int
    torch_ids: tuple[int, ...]
    flax_ids: tuple[int, ...]
    margin: float
    logit_error: float
    tie: bool

    @property
    def excused(self) -> bool:
        """Whether rounding alone can have caused it."""
        return self.tie or self.margin <= EXCUSED_ERRORS * self.logit_error


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """The routing of one layer in one batch and mode.

    Args:
        tokens: how many real tokens were compared.
        flips: those that the sides route differently.
        min_margin: the oracle's smallest margin between rank A and A + 1.
        median_margin: the same margin of the median token.
        load: real tokens of each expert on the torch side.
        ties: tokens where Flax's own probabilities at rank A and A + 1 are equal.
        misbroken: those of them that did not go to the lowest of the equal experts.
    """

    tokens: int
    flips: tuple[Flip, ...]
    min_margin: float
    median_margin: float
    load: tuple[int, ...]
    ties: int = 0
    misbroken: tuple[int, ...] = ()

    @property
    def agreement(self) -> float:
        """The share of tokens with the same set of experts."""
        return 1 - len(self.flips) / self.tokens if self.tokens else float("nan")


def compare_routing(torch: Trace, flax: Trace, oracle: Trace, batch: Batch) -> LayerRouting:
    """Compare the sets of experts token by token.

    Args:
        torch: a block's trace with `router_ids` and `router_logits`.
        flax: the same of Flax, routed by itself.
        oracle: the exact `router_logits`.
        batch: says which tokens are real.
    """
    torch_MA, flax_MA = _by_number(torch), _by_number(flax)
    same_count = torch_MA.shape == flax_MA.shape
    real = batch.real_M
    margin_M, error_M, tie_M = _certainty(torch, oracle, batch)
    differs_M = rerouted(torch, flax, batch)
    flips = tuple(
        Flip(
            int(m),
            tuple(map(int, torch_MA[m])),
            tuple(map(int, flax_MA[m])),
            float(margin_M[m]) if same_count else float("inf"),
            float(error_M[m]),
            bool(tie_M[m]) and same_count,
        )
        for m in np.flatnonzero(differs_M)
    )
    load = np.bincount(torch_MA[real].reshape(-1), minlength=oracle["router_logits"].shape[1])
    least, median = (float(pick(margin_M[real])) if real.any() else float("nan") for pick in (np.min, np.median))
    ties, misbroken = exact_ties(flax, real)
    return LayerRouting(int(real.sum()), flips, least, median, tuple(map(int, load)), ties, misbroken)


def contested(torch: Trace, oracle: Trace, batch: Batch) -> bool:
    """Say whether rounding alone can send a real token to other experts, so that a side that hides its routing may.

    Args:
        torch: a block's trace; without its `router_ids` and `router_logits` nobody can say, and the answer is yes.
        oracle: the exact `router_logits`.
        batch: says which tokens are real.
    """
    if any(name not in trace.arrays for trace in (torch, oracle) for name in ("router_ids", "router_logits")):
        return True
    margin_M, error_M, tie_M = _certainty(torch, oracle, batch)
    return bool(((tie_M | (margin_M <= EXCUSED_ERRORS * error_M)) & batch.real_M).any())


def _certainty(torch: Trace, oracle: Trace, batch: Batch) -> tuple[Array, Array, Array]:
    """Give each token's exact margin, its calibrated logit error, and whether torch's own logits tie: [M] each."""
    exact_ME, torch_ME = (trace["router_logits"].astype(np.float64) for trace in (oracle, torch))
    A, real = torch["router_ids"].shape[1], batch.real_M
    error_M = np.abs(torch_ME - exact_ME).max(axis=1)
    calibrated_M = np.maximum(error_M, np.median(error_M[real])) if real.any() else error_M
    return _margins(exact_ME, A), calibrated_M, _margins(torch_ME, A) == 0


def exact_ties(flax: Trace, real_M: Array) -> tuple[int, tuple[int, ...]]:
    """Count Flax's exact ties at the last place, and list those that it broke otherwise than `jax.lax.top_k` does.

    torch.topk promises no order, so torch cannot be the judge of this: Flax's ids are held against its own
    probabilities, from which they were chosen. A side that does not give them is not asked.
    """
    probs_ME, ids_MA = flax.arrays.get("router_probs"), flax["router_ids"]
    A = ids_MA.shape[1]
    if probs_ME is None or probs_ME.ndim != 2 or len(probs_ME) != len(ids_MA) or probs_ME.shape[1] <= A:
        return 0, ()
    order_ME = np.argsort(-probs_ME.astype(np.float64), axis=1, kind="stable")
    last_M2 = np.take_along_axis(probs_ME, order_ME[:, A - 1 : A + 1], axis=1)
    tied_M = (last_M2[:, 0] == last_M2[:, 1]) & real_M
    wrong_M = tied_M & (np.sort(order_ME[:, :A], axis=1) != np.sort(ids_MA, axis=1)).any(axis=1)
    return int(tied_M.sum()), tuple(map(int, np.flatnonzero(wrong_M)))


def rerouted(torch: Trace, flax: Trace, batch: Batch) -> Array:
    """Mark the real tokens that the sides send to different experts: [M] bool, none where a side does not say."""
    if not comparable_ids(torch, flax):
        return np.zeros(batch.input_ids.size, bool)
    torch_MA, flax_MA = _by_number(torch), _by_number(flax)
    if torch_MA.shape != flax_MA.shape:
        return batch.real_M
    differs_M: Array = (torch_MA != flax_MA).any(axis=1) & batch.real_M
    return differs_M


def comparable_ids(torch: Trace, flax: Trace) -> bool:
    """Say whether both sides give a list of experts for each token."""
    torch_MA, flax_MA = torch.arrays.get("router_ids"), flax.arrays.get("router_ids")
    if torch_MA is None or flax_MA is None:
        return False
    return flax_MA.ndim == 2 and flax_MA.dtype.kind in "iu" and len(flax_MA) == len(torch_MA)


def _by_number(trace: Trace) -> Array:
    ids_MA: Array = np.sort(trace["router_ids"], axis=1)
    return ids_MA


def dense_weights(ids_MA: Array, weights_MA: Array | None, experts: int) -> Array | None:
    """Spread routing weights over all experts, 0 where a token was not routed: [M, E], whatever the order of ids."""
    if weights_MA is None or weights_MA.shape != ids_MA.shape:
        return weights_MA
    dense_ME = np.zeros((len(ids_MA), experts), weights_MA.dtype)
    np.put_along_axis(dense_ME, ids_MA.astype(np.int64), weights_MA, axis=1)
    return dense_ME


def _margins(logits_ME: Array, per_token: int) -> Array:
    """Give rank A minus rank A + 1 of each row; infinite where every expert is chosen."""
    if per_token == logits_ME.shape[1]:
        return np.full(len(logits_ME), np.inf)
    ordered_ME = np.sort(logits_ME, axis=1)[:, ::-1]
    margins: Array = ordered_ME[:, per_token - 1] - ordered_ME[:, per_token]
    return margins
