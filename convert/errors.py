"""What convert raises.

    Exception
    ├── BadInput                    exit 3; the message is complete and needs no traceback
    │   ├── UnreadableCheckpoint    a file is missing, truncated, corrupt or hostile
    │   ├── TensorMismatch          tensors and config.json disagree, or a target tensor cannot be built
    │   └── BadDestination          DST exists, cannot be written, or overlaps SRC
    └── ValueError
        └── ConfigError             exit 3; flax_mixtral's: config.json cannot be honoured
    KeyboardInterrupt
    └── Interrupted                 exit 5; what is written so far is kept, and --resume goes on from it

Imports nothing but flax_mixtral.config.
"""

from flax_mixtral.config import ConfigError

__all__ = [
    "BadDestination",
    "BadInput",
    "ConfigError",
    "Interrupted",
    "TensorMismatch",
    "UnreadableCheckpoint",
    "printable",
]


def printable(message: str) -> str:
    """Escape what a file may have put into a message to trick a terminal or to break the printing of it."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)


class BadInput(Exception):  # noqa: N818  # it names the fault, as its subclasses do
    """Something the caller gave cannot be used; the message says what, where and what to do."""


class UnreadableCheckpoint(BadInput):
    """A file of the checkpoint is missing, truncated, corrupt or points outside the checkpoint."""


class TensorMismatch(BadInput):
    """The tensors do not fit the configuration; the message lists all of them and the likely causes."""


class BadDestination(BadInput):
    """The destination exists, cannot be written, or overlaps the source."""


class Interrupted(KeyboardInterrupt):
    """The conversion was stopped on its way; the message says where its files are."""
