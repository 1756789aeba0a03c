"""The drift of next-token distributions, against scipy and by hand."""

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax  # type: ignore[import-untyped]  # SciPy ships no types

from parity.drift import compare_logits
from parity.trace import Batch

RNG = np.random.default_rng(3)
BATCH = Batch("two rows", np.arange(10).reshape(2, 5), np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))


def test_equal_logits_have_not_drifted() -> None:
    logits_BTV = RNG.standard_normal((2, 5, 7))
    drift = compare_logits(logits_BTV, logits_BTV, BATCH, 1, "float32")
    assert drift is not None
    assert (drift.kl, drift.worst_kl, drift.top1, drift.tokens) == (0, 0, 1, 9)


def test_the_divergence_is_that_of_scipy_over_real_tokens() -> None:
    torch_BTV, flax_BTV = RNG.standard_normal((2, 2, 5, 7))
    drift = compare_logits(torch_BTV, flax_BTV, BATCH, None, "float32")
    assert drift is not None
    kl_BT = rel_entr(softmax(torch_BTV, axis=-1), np.exp(log_softmax(flax_BTV, axis=-1))).sum(axis=-1)
    assert drift.kl == pytest.approx(kl_BT[BATCH.real_BT].mean())
    worst = drift.worst[0]
    assert drift.worst_kl == worst.kl == pytest.approx(kl_BT[BATCH.real_BT].max())
    assert worst.token == np.where(BATCH.real_BT, kl_BT, -1).argmax()
    assert worst.torch_next == torch_BTV.reshape(10, 7)[worst.token].argmax()


def test_a_shift_of_all_logits_is_no_drift() -> None:
    logits_BTV = RNG.standard_normal((2, 5, 7))
    drift = compare_logits(logits_BTV, logits_BTV + 1000.0, BATCH, 0, "float32")
    assert drift is not None
    assert drift.worst_kl == pytest.approx(0, abs=1e-12)


def test_nothing_is_claimed_of_what_is_not_finite() -> None:
    logits_BTV = RNG.standard_normal((2, 5, 7))
    broken_BTV = np.where(np.arange(7) == 3, np.nan, logits_BTV)
    assert compare_logits(logits_BTV, broken_BTV, BATCH, 0, "float32") is None
