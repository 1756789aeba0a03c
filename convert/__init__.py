"""Mixtral checkpoints: Hugging Face's layouts to the Flax tree and back, bit for bit, in bounded memory.

`convert(src, dst)` converts a directory, `Checkpoint.open(path).view(layout)` sees one in memory as any layout has it.
NumPy is loaded with the first of those names that is used, so that the command line answers `--help` at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from convert.errors import BadDestination, BadInput, ConfigError, Interrupted, TensorMismatch, UnreadableCheckpoint

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint, View
    from convert.execute import Report, convert, save

__all__ = [
    "BadDestination",
    "BadInput",
    "Checkpoint",
    "ConfigError",
    "Interrupted",
    "Report",
    "TensorMismatch",
    "UnreadableCheckpoint",
    "View",
    "convert",
    "save",
]

_HOMES = {
    "Checkpoint": "checkpoint",
    "View": "checkpoint",
    "Report": "execute",
    "convert": "execute",
    "save": "execute",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
