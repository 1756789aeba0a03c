"""The four statistics and the margin, on arrays whose answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from parity import metrics
from parity.metrics import UNIT_ROUNDOFF, margin, statistics

U = UNIT_ROUNDOFF["float32"]
EXACT = np.random.default_rng(0).normal(size=(40, 12))


def _noise(seed: int, size: float) -> np.ndarray:
    return size * np.random.default_rng(seed).normal(size=EXACT.shape)


def test_unit_roundoff_is_half_the_gap_after_one() -> None:
    assert UNIT_ROUNDOFF == {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def test_statistics_of_an_error_in_one_place() -> None:
    exact = np.full((4, 5), 2.0)
    error = np.zeros((4, 5))
    error[1, 3] = 1.0
    found = statistics(error, exact)
    assert found.pooled == pytest.approx(np.sqrt(1 / 20))
    assert found.worst_token == pytest.approx(np.sqrt(1 / 5) / 2)
    assert found.worst_channel == pytest.approx(np.sqrt(1 / 4) / 2)
    assert found.largest == 1.0


def test_equal_noise_has_a_margin_near_one() -> None:
    found = margin(EXACT + _noise(1, 1e-5), EXACT + _noise(2, 1e-5), EXACT, U)
    assert 0.5 < found.value < 3


def test_the_margin_grows_with_the_error() -> None:
    found = margin(EXACT + _noise(1, 1e-6), EXACT + _noise(1, 1e-4), EXACT, U)
    assert found.value == pytest.approx(100, rel=1e-3)
    assert found.flax_error == pytest.approx(100 * found.torch_error, rel=1e-3)


@pytest.mark.parametrize(
    ("place", "statistic"), [(np.s_[7, :], "worst_token"), (np.s_[:, 5], "worst_channel"), (np.s_[7, 5], "largest")]
)
def test_an_error_in_one_place_is_seen_where_it_is(place: tuple[slice | int, ...], statistic: str) -> None:
    exact = np.ones_like(EXACT)
    torch, flax = exact + _noise(1, 1e-6), exact + _noise(2, 1e-6)
    flax[place] += 1e-4
    found = margin(torch, flax, exact, U)
    assert found.value > 20
    assert found.statistic == statistic


def test_rows_are_summed_up_a_chunk_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch, flax = (EXACT + _noise(seed, 1e-5) for seed in (1, 2))
    whole = margin(torch, flax, EXACT, U)
    for elements in (1, 5 * 12, 41 * 12):  # a row; five rows; more than all
        monkeypatch.setattr(metrics, "CHUNK", elements)
        found = margin(torch, flax, EXACT, U)
        assert found.statistic == whole.statistic
        assert found.value == pytest.approx(whole.value, rel=1e-12)


def test_an_exact_torch_asks_for_one_rounding_at_most() -> None:
    assert margin(EXACT, EXACT.astype(np.float32), EXACT, U).value < 1.5
    assert margin(EXACT, EXACT, EXACT, U).value == 0


@given(
    arrays(np.float64, (3, 4), elements=st.floats(-1e3, 1e3)),
    arrays(np.float64, (3, 4), elements=st.floats(-1e-3, 1e-3)),
    arrays(np.float64, (3, 4), elements=st.floats(-1e-3, 1e-3)),
)
def test_a_margin_is_never_negative_nor_undefined(exact: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    assert margin(exact + one, exact + other, exact, U).value >= 0


@given(st.integers(-20, 20))
def test_the_margin_does_not_depend_on_the_unit(power: int) -> None:
    scale = 2.0**power
    torch, flax = EXACT + _noise(1, 1e-5), EXACT + _noise(2, 3e-5)
    assert margin(torch * scale, flax * scale, EXACT * scale, U).value == margin(torch, flax, EXACT, U).value


def test_of_a_single_row_elements_are_not_judged_by_their_own_size() -> None:
    exact = np.array([[1.0, 1e-5, 1.0, 1.0]])
    error = np.array([[0.0, 1e-6, 0.0, 0.0]])
    row, column = statistics(error, exact), statistics(error.T, exact.T)
    assert row == column
    assert row.worst_channel == row.worst_token < 1e-6
