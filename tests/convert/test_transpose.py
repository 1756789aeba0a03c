"""Blocked copies hold what NumPy's own copy holds, in every dtype and for every order of axes."""

from itertools import permutations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.transpose import TILE, blocks, contiguous


@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.integers(0, 5), st.sampled_from([1, 2, 4, 8]))
def test_contiguous_is_numpys(shape: list[int], order: int, itemsize: int) -> None:
    x = np.random.default_rng(0).integers(0, 255, (*shape, itemsize), np.uint8).view(f"u{itemsize}")[..., 0]
    turned = x.transpose(list(permutations(range(x.ndim)))[order % len(list(permutations(range(x.ndim))))])
    assert contiguous(turned).flags.c_contiguous
    np.testing.assert_array_equal(contiguous(turned), np.ascontiguousarray(turned))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_more_rows_than_a_tile(dtype: type) -> None:
    x: np.ndarray = (
        np.random.default_rng(0).integers(0, 2**15, (37, TILE + 5), np.uint16).astype(np.float64).astype(dtype)
    )
    assert contiguous(x.T).tobytes() == x.T.tobytes()


def test_what_is_in_order_is_not_copied() -> None:
    x = np.ones((3, 4), np.float32)
    assert np.shares_memory(contiguous(x), x)
    assert np.shares_memory(contiguous(x[1:]), x)


@pytest.mark.parametrize("block_bytes", [1, 100, 4096, 10**9])
def test_blocks_follow_each_other(block_bytes: int) -> None:
    x = np.arange(66 * 10 * 3, dtype=np.float32).reshape(10, 66, 3).transpose(1, 0, 2)
    cut = list(blocks(x, block_bytes))
    assert b"".join(block.tobytes() for block in cut) == x.tobytes()
    assert all(np.shares_memory(block, x) for block in cut)
    assert len(cut) == {1: 66, 100: 66, 4096: 3, 10**9: 1}[block_bytes]


def test_a_scalar_is_one_block() -> None:
    assert [block.shape for block in blocks(np.array(1.0))] == [()]
