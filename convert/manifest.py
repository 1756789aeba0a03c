"""What was written: a journal while it goes on, a manifest with a SHA-256 per tensor when it is done.

Imports the standard library and convert's plan.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from convert.casting import Loss
from convert.errors import BadDestination
from convert.plan import Plan, PlannedFile

__all__ = ["JOURNAL", "MANIFEST", "Journal", "Written", "fingerprint", "manifest"]

JOURNAL, MANIFEST = ".journal", "manifest.json"


@dataclass(frozen=True, slots=True)
class Written:
    """One tensor that is in its place."""

    sha256: str
    """Of the tensor's bytes."""
    loss: Loss
    non_finite: int = 0
    """Values that are NaN or infinite."""


def fingerprint(plan: Plan, sources: Iterable[Path]) -> str:
    """Say in a line what is converted into what: equal for the same plan over files that nobody has touched."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    whole = json.dumps([plan.to_json(), stats], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def manifest(files: Sequence[PlannedFile], written: Mapping[str, Written]) -> dict[str, Any]:
    """List every tensor with its file and hash."""
    tensors = {
        tensor.name: {
            "file": file.name,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "sha256": written[tensor.name].sha256,
        }
        for file in files
        for tensor in file.tensors
    }
    return {"format_version": 1, "tensors": tensors}


@dataclass
class Journal:
    """The tensors that are done, one a line, in the directory they are in; held by one process at a time."""

    directory: Path
    conversion: str | None
    """Its fingerprint; None to hold the directory and nothing else."""
    written: dict[str, Written] = field(default_factory=dict)
    """What the journal claims to be there; nothing that it says is believed without a look at the bytes."""

    def __enter__(self) -> "Journal":
        """Begin the journal or go on with it.

        Raises:
            BadDestination: another process has it, or it is of another conversion.
        """
        self._file = os.open(self.directory / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError as error:
            os.close(self._file)
            raise BadDestination(f"{self.directory}: another conversion is writing there; wait for it") from error
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._file)

    def add(self, tensor: str, written: Written) -> None:
        """Note a tensor whose bytes have all been written."""
        self.written[tensor] = written
        self._line(
            {"tensor": tensor, "sha256": written.sha256, "loss": asdict(written.loss), "non_finite": written.non_finite}
        )

    def _line(self, entry: dict[str, Any]) -> None:
        os.write(self._file, (json.dumps(entry) + "\n").encode())

    def _read(self) -> None:
        if self.conversion is None:
            return
        lines = (self.directory / JOURNAL).read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # killed within the line
            os.truncate(self._file, sum(map(len, lines[:-1])))
            del lines[-1]
        if not lines:
            self._line({"conversion": self.conversion})
            return
        entries = []
        with suppress(ValueError):  # a line that the disk lost ends what can be known
            entries = [json.loads(line) for line in lines]
        if not entries or entries[0] != {"conversion": self.conversion}:
            raise BadDestination(
                f"{self.directory}: left by another conversion (other options, or SRC has changed); without --resume "
                "it is removed and the conversion starts afresh"
            )
        for entry in entries[1:]:
            self.written[entry["tensor"]] = Written(entry["sha256"], Loss(**entry["loss"]), entry["non_finite"])
