"""The transforms again with NNX in tree mode, which FLIP 5310 makes the default.

In a process of its own, since the flags are read once, on import.
"""

import pytest

from tests.flax_mixtral import test_transforms
from tests.flax_mixtral.transforms import GRADIENTS, LOGITS
from tests.rerun import rerun


@pytest.mark.parametrize(
    ("test", "which", "expected"),
    [
        ("test_it_traces_to_the_same_shapes_and_dtypes", [], len(LOGITS | GRADIENTS)),
        pytest.param("test_logits_are_the_plain_ones", ["-m", ""], 2 * len(LOGITS), marks=pytest.mark.slow),
        pytest.param("test_gradients_are_the_plain_ones", ["-m", ""], 2 * len(GRADIENTS), marks=pytest.mark.slow),
    ],
)
def test_tree_mode_passes_the_same_tests(test: str, which: list[str], expected: int) -> None:
    tests = f"{test_transforms.__file__}::{test}"
    rerun(*which, tests, expected=expected, NNX_GRAPH_MODE="false", NNX_GRAPH_UPDATES="false")
