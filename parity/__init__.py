"""Parity: Flax's Mixtral against PyTorch's, block by block, with a float64 oracle as the judge.

Names are imported on first use: they load JAX and torch, which `mixtral-parity --help` does without.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity.result import Result
    from parity.runner import run
    from parity.sides import Side
    from parity.trace import Batch, Trace

__all__ = ["Batch", "Result", "Side", "Trace", "run"]

_HOME = {"Batch": "trace", "Result": "result", "Side": "sides", "Trace": "trace", "run": "runner"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
