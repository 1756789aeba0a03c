"""What is missing, empty, misshaped, of another dtype or not finite never passes."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from parity.points import Point
from parity.trace import Array
from parity.verdict import Finding, Place, Verdict, judge, judge_equal, overall

POINT = Point("attn_out", "block", "B T D", "")
PLACE = Place(3, "local", "batch", "float32")
EXACT = np.random.default_rng(0).normal(size=(2, 5, 7))
TORCH = EXACT.astype(np.float32)


def _judge(torch: Array | None, flax: Array | None, exact: Array | None, rows: Array | None = None) -> Finding:
    return judge("attn_out", POINT, PLACE, torch, flax, exact, rows=rows)


def _with(value: float) -> Array:
    changed = TORCH.copy()
    changed[1, 2, 3] = value
    return changed


@pytest.mark.parametrize(
    ("torch", "flax", "exact", "verdict", "word"),
    [
        (TORCH, TORCH, EXACT, "pass", ""),
        (TORCH, _with(9), EXACT, "fail", "limit 10"),
        (TORCH, None, EXACT, "unchecked", "missing from flax"),
        (None, TORCH, EXACT, "unchecked", "missing from torch"),
        (None, None, EXACT, "unchecked", "missing from torch and flax"),
        (TORCH, TORCH, None, "unchecked", "missing from oracle"),
        (TORCH[:, :0], TORCH[:, :0], EXACT[:, :0], "unchecked", "empty"),
        (TORCH, _with(np.nan), EXACT, "fail", "not finite"),
        (TORCH, _with(np.inf), EXACT, "fail", "not finite"),
        (_with(np.nan), TORCH, EXACT, "unchecked", "torch's array is not finite"),
        (_with(np.nan), _with(np.nan), EXACT, "unchecked", "not finite"),
        (TORCH, TORCH, EXACT * np.nan, "unchecked", "oracle's array is not finite"),
        (TORCH, TORCH[:1], EXACT, "fail", "shapes differ"),
        (TORCH, TORCH.transpose(1, 0, 2), EXACT, "fail", "shapes differ"),
        (TORCH, TORCH.astype(np.float64), EXACT, "fail", "dtypes differ"),
        (TORCH, TORCH[:, ::-1], EXACT, "fail", "limit 10"),
    ],
)
def test_verdicts(torch: Array | None, flax: Array | None, exact: Array | None, verdict: Verdict, word: str) -> None:
    finding = _judge(torch, flax, exact)
    assert finding.verdict == verdict
    assert word in (finding.reason or "")


def test_padding_may_differ_but_must_be_finite() -> None:
    real = np.ones(10, bool)
    real[1 * 5 + 2] = False
    assert _judge(TORCH, _with(9), EXACT, real).verdict == "pass"
    assert _judge(TORCH, _with(np.nan), EXACT, real).verdict == "fail"


def test_no_real_row_is_no_pass() -> None:
    assert _judge(TORCH, TORCH, EXACT, np.zeros(10, bool)).verdict == "unchecked"


def test_points_without_arithmetic_must_be_equal() -> None:
    assert judge_equal("embed", PLACE, TORCH, TORCH.copy()).verdict == "pass"
    assert judge_equal("embed", PLACE, TORCH, np.nextafter(TORCH, 9)).verdict == "fail"
    assert judge_equal("embed", PLACE, TORCH, None).verdict == "unchecked"
    assert judge_equal("embed", PLACE, TORCH, _with(np.nan)).verdict == "fail"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "unchecked"),
        (["pass"], "pass"),
        (["pass", "unchecked"], "unchecked"),
        (["unchecked", "fail", "pass"], "fail"),
    ],
)
def test_the_sum_of_verdicts(verdicts: list[Verdict], expected: Verdict) -> None:
    finding = _judge(TORCH, TORCH, EXACT)
    assert overall([replace(finding, verdict=verdict) for verdict in verdicts]) == expected


def test_a_single_bfloat16_operation_must_round_where_torch_does() -> None:
    torch = EXACT.astype(ml_dtypes.bfloat16)
    place = Place(3, "operation", "batch", "bfloat16")

    def found(flax: Array) -> Finding:
        return judge("attn_out", POINT, place, torch, flax, EXACT)

    assert found(torch).unequal == 0
    twice = np.nextafter(torch, ml_dtypes.bfloat16(9))
    twice[1:] = torch[1:]  # one rounding off in half of the elements: no margin shows it
    assert found(twice).verdict == "fail"
    assert "not rounded as torch's" in (found(twice).reason or "")
    assert judge("attn_out", POINT, replace(place, mode="local"), torch, twice, EXACT).verdict == "pass"


def test_what_informs_does_not_decide() -> None:
    failed = _judge(TORCH, _with(9), EXACT)
    assert overall([failed, _judge(TORCH, TORCH, EXACT)]) == "fail"
    assert overall([replace(failed, decides=False), _judge(TORCH, TORCH, EXACT)]) == "pass"
    assert overall([replace(failed, decides=False)]) == "unchecked"
