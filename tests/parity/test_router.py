"""Flips: found, excused where the router was undecided, and not where it was clear."""

import numpy as np
import pytest

from parity.router import compare_routing, dense_weights
from parity.trace import Array, Batch, Trace

BATCH = Batch("b", np.zeros((1, 4), np.int64), np.array([[0, 1, 1, 1]]))
EXACT = np.array([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 2, 1, 0], [2, 1.00001, 1, 0]])
IDS = np.array([[0, 1]] * 4)


def _trace(logits: Array, ids: Array) -> Trace:
    return Trace({"router_logits": logits, "router_ids": ids})


def _noisy(size: float) -> Array:
    return EXACT + size * np.random.default_rng(0).choice([-1.0, 1.0], EXACT.shape)


def _flipped(token: int) -> Array:
    ids = IDS.copy()
    ids[token] = [0, 2]
    return ids


def test_agreement_ignores_order_and_padding() -> None:
    flax_ids = np.array([[3, 2], [1, 0], [0, 1], [1, 0]])
    found = compare_routing(_trace(_noisy(1e-6), IDS), _trace(_noisy(1e-6), flax_ids), _trace(EXACT, IDS), BATCH)
    assert found.flips == ()
    assert found.agreement == 1
    assert found.tokens == 3
    assert found.load == (3, 3, 0, 0)
    assert found.min_margin == pytest.approx(1e-5)


@pytest.mark.parametrize(("noise", "token", "excused"), [(1e-5, 3, True), (1e-6, 3, False), (1e-5, 2, False)])
def test_a_flip_is_excused_within_four_logit_errors(noise: float, token: int, excused: bool) -> None:
    found = compare_routing(
        _trace(_noisy(noise), IDS), _trace(_noisy(noise), _flipped(token)), _trace(EXACT, IDS), BATCH
    )
    assert [flip.token for flip in found.flips] == [token]
    assert found.flips[0].torch_ids == (0, 1)
    assert found.flips[0].flax_ids == (0, 2)
    assert found.flips[0].excused is excused
    assert found.agreement == pytest.approx(2 / 3)


def test_exact_ties_are_marked_and_excused() -> None:
    tied = EXACT.copy()
    tied[3, 1] = tied[3, 2]
    found = compare_routing(_trace(tied, IDS), _trace(tied, _flipped(3)), _trace(tied, IDS), BATCH)
    assert found.flips[0].tie
    assert found.flips[0].excused


def _with_probs(ids: Array, probs: Array) -> Trace:
    return Trace({"router_logits": EXACT, "router_ids": ids, "router_probs": probs.astype(np.float32)})


@pytest.mark.parametrize(("ids", "misbroken"), [([0, 1], ()), ([0, 2], (3,))])
def test_an_exact_tie_goes_to_the_lowest_expert(ids: list[int], misbroken: tuple[int, ...]) -> None:
    chosen = IDS.copy()
    chosen[3] = ids
    tied = np.array([[0.4, 0.3, 0.3, 0], [0.4, 0.35, 0.25, 0], [0.4, 0.35, 0.25, 0], [0.4, 0.3, 0.3, 0]])
    found = compare_routing(_trace(EXACT, chosen), _with_probs(chosen, tied), _trace(EXACT, IDS), BATCH)
    assert found.ties == 1, "the first token is padding"
    assert found.misbroken == misbroken


def test_every_expert_chosen_cannot_flip() -> None:
    ids = np.tile(np.arange(4), (4, 1))
    found = compare_routing(_trace(EXACT, ids), _trace(EXACT, ids[:, ::-1]), _trace(EXACT, ids), BATCH)
    assert found.flips == ()
    assert found.min_margin == np.inf


def test_dense_weights_forget_the_order_of_ids() -> None:
    one = dense_weights(np.array([[2, 0]]), np.array([[0.7, 0.3]]), 4)
    other = dense_weights(np.array([[0, 2]]), np.array([[0.3, 0.7]]), 4)
    np.testing.assert_array_equal(one, [[0.3, 0, 0.7, 0]])
    np.testing.assert_array_equal(one, other)
