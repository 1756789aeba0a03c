"""The pattern language: what it reads, and that undoing a pattern gives the bytes back."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.layouts import LAYOUTS
from convert.patterns import parse

SIZES = {"V": 11, "D": 12, "F": 7, "N": 6, "K": 2, "H": 4, "P": 2, "E": 5, "C": 3}
ROWS = sorted({rule.pattern for layout in LAYOUTS.values() for rule in layout.rules})
NATIVE = ["(N P 2) D -> D N (2 P)", "(E F) D -> E F D"]


def numbered(shape: tuple[int, ...], dtype: Any = np.int64) -> np.ndarray[Any, Any]:
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize(
    ("pattern", "shape", "by_hand"),
    [
        ("V D -> V D", (11, 12), lambda x: x),
        ("(N H) D -> D N H", (24, 12), lambda x: x.reshape(6, 4, 12).transpose(2, 0, 1)),
        ("D (N H) -> N H D", (12, 24), lambda x: x.reshape(12, 6, 4).transpose(1, 2, 0)),
        ("E D -> D E", (5, 12), lambda x: x.T),
        ("E (1/2 F) D -> E D F", (5, 14, 12), lambda x: x[:, 7:].transpose(0, 2, 1)),
        ("(N P 2) D -> D N (2 P)", (24, 12), lambda x: x.reshape(6, 2, 2, 12).transpose(3, 0, 2, 1).reshape(12, 6, 4)),
    ],
)
def test_apply_is_what_it_reads_like(pattern: str, shape: tuple[int, ...], by_hand: Any) -> None:
    x = numbered(shape)
    np.testing.assert_array_equal(parse(pattern).apply(x, SIZES), by_hand(x))


@pytest.mark.parametrize("pattern", [*(row for row in ROWS if "/" not in row), *NATIVE])
@given(data=st.data())
def test_inverse_gives_the_bytes_back(pattern: str, data: st.DataObject) -> None:
    sizes = {axis: data.draw(st.integers(1, 5)) for axis in "VDFNKHPEC"}
    parsed = parse(pattern)
    if "E" not in pattern.partition("->")[0]:  # the name says which expert
        parsed = parsed.without("E")
    dtype = data.draw(st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32, np.float64, np.int8]))
    shape = parsed.source_shape(sizes)
    raw = data.draw(st.binary(min_size=math.prod(shape) * np.dtype(dtype).itemsize, max_size=10_000))
    x = np.frombuffer(raw[: math.prod(shape) * np.dtype(dtype).itemsize], dtype).reshape(shape)
    back = parsed.invert().apply(parsed.apply(x, sizes), sizes)
    assert back.shape == x.shape
    assert back.tobytes() == x.tobytes()


@pytest.mark.parametrize("pattern", ROWS)
def test_every_row_moves_one_expert_as_a_view(pattern: str) -> None:
    parsed = parse(pattern)
    x = numbered(parsed.source_shape(SIZES))
    stacked = "E D" in pattern.partition("->")[2] or "E F" in pattern.partition("->")[2]
    fixed = {"E": 3} if stacked and not pattern.endswith("D E") else {}
    block = parsed.apply(x, SIZES, fixed)
    merged = "(2 P)" in pattern  # adjacent rotary lanes are moved apart, which no view can do
    assert np.shares_memory(block, x) != merged
    back = parsed.invert()
    for axis in fixed:
        back = back.without(axis)
    region = back.apply(block, SIZES)
    assert np.shares_memory(region, x) != merged
    assert region.flags.c_contiguous
    start = int(region.reshape(-1)[0])
    assert region.reshape(-1).tolist() == list(range(start, start + region.size))


def test_halves_follow_each_other_within_an_expert() -> None:
    gate, up = parse("E (0/2 F) D -> E D F"), parse("E (1/2 F) D -> E D F")
    order = sorted([(p.position({"E": e}), half) for e in range(3) for half, p in (("gate", gate), ("up", up))])
    assert [half for _, half in order] == ["gate", "up"] * 3


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(24, 12\), got \(12, 24\)"):
        parse("(N H) D -> D N H").apply(numbered((12, 24)), SIZES)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("V D", "no '->'"),
        ("(N H D -> D N H", "unbalanced"),
        ("D D -> D", "twice"),
        ("(2/2 F) D -> D F", "'2/2'"),
        ("v D -> D v", "'v'"),
        ("(N P 2) D -> D N P", "one side only"),
    ],
)
def test_nonsense_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(text)
