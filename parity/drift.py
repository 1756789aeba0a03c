"""How far the distribution of the next token has moved, layer by layer. NumPy only."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parity.metrics import Precision
from parity.trace import Array, Batch

__all__ = ["Drift", "WorstToken", "compare_logits"]

MOST_WORST = 8
CHUNK = 1 << 15
"""Elements at a time, so that float64 copies stay in a processor's cache."""


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A token after which the sides differ most in what they expect next.

    Args:
        token: index into M.
        kl: KL(torch || Flax) there, in nats.
        torch_next: the token that torch finds likeliest.
        flax_next: the one that Flax does.
    """

    token: int
    kl: float
    torch_next: int
    flax_next: int


@dataclass(frozen=True, slots=True)
class Drift:
    """Torch's and Flax's next-token distributions of one batch after one layer, each on its own stream.

    Args:
        layer: 0-based, through final norm and head (the lens); None for the model's own logits.
        batch: its name.
        dtype: what both sides computed in.
        tokens: how many real tokens were compared.
        kl: mean over tokens of KL(torch || Flax), in nats.
        worst_kl: the largest of any token.
        top1: share of tokens whose likeliest next token is the same.
        worst: the tokens with the largest KL, the largest first.
    """

    layer: int | None
    batch: str
    dtype: Precision
    tokens: int
    kl: float
    worst_kl: float
    top1: float
    worst: tuple[WorstToken, ...]


def compare_logits(
    torch_BTV: Array, flax_BTV: Array, batch: Batch, layer: int | None, dtype: Precision
) -> Drift | None:
    """Compare what both sides expect after every real token.

    Args:
        torch_BTV: logits, any float dtype.
        flax_BTV: the same of Flax.
        batch: says which tokens are real.
        layer: where they were read; None after the last.
        dtype: of the walk.

    Returns:
        The comparison; None where there is no real token, or a logit is not finite: the verdict speaks of that.
    """
    real = np.flatnonzero(batch.real_M)
    if real.size == 0 or torch_BTV.shape != flax_BTV.shape:
        return None
    torch_MV, flax_MV = (logits.reshape(-1, logits.shape[-1])[real] for logits in (torch_BTV, flax_BTV))
    torch_next_M, flax_next_M = torch_MV.argmax(axis=1), flax_MV.argmax(axis=1)
    kl_M = np.concatenate(list(_divergence(torch_MV, flax_MV)))
    if not np.isfinite(kl_M).all():
        return None
    order = np.argsort(-kl_M, kind="stable")[:MOST_WORST]
    worst = tuple(
        WorstToken(int(real[row]), float(kl_M[row]), int(torch_next_M[row]), int(flax_next_M[row])) for row in order
    )
    same = float((torch_next_M == flax_next_M).mean())
    return Drift(layer, batch.name, dtype, len(real), float(kl_M.mean()), float(kl_M.max()), same, worst)


def _divergence(torch_MV: Array, flax_MV: Array) -> Iterator[Array]:
    rows = max(1, CHUNK // torch_MV.shape[1])
    for start in range(0, len(torch_MV), rows):
        (torch_RV, torch_powers_RV), (flax_RV, flax_powers_RV) = (
            _shifted(logits[start : start + rows]) for logits in (torch_MV, flax_MV)
        )
        torch_sum_R, flax_sum_R = torch_powers_RV.sum(axis=1), flax_powers_RV.sum(axis=1)
        # A difference of log probabilities is one of logits and of the logarithms of their sums.
        mean_R = np.sum(torch_powers_RV * (torch_RV - flax_RV), axis=1) / torch_sum_R
        # A sum of rounding errors may fall below zero, a divergence may not.
        yield np.maximum(mean_R + np.log(flax_sum_R) - np.log(torch_sum_R), 0.0)


def _shifted(logits_RV: Array) -> tuple[Array, Array]:
    """Give logits whose largest is 0, and their exponentials."""
    wide_RV = logits_RV.astype(np.float64)
    shifted_RV: Array = wide_RV - wide_RV.max(axis=1, keepdims=True)
    return shifted_RV, np.exp(shifted_RV)
