"""The selftest in processes: one that dies is not taken for one that is done."""

import os

import pytest

from parity.selftest import courts


class _Deadly:
    """A path on which only the process that opens it dies, as if the system had killed it."""

    def __fspath__(self) -> str:
        os._exit(9)


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the selftest in float32 ended before it was done"):
        list(courts.hold_courts(_Deadly(), dtypes=("float32", "float32"), inputs="quick", seed=0))  # type: ignore[arg-type]  # planted
