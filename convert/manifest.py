"""What was written: a journal while it goes on, a manifest with a SHA-256 per tensor when it is done.

Imports the standard library and convert's plan.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from convert.casting import Loss
from convert.errors import BadDestination
from convert.plan import Plan, PlannedFile
from convert.share import Share

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
    """The tensors and files that are done, one a line, in the directory they are in.

    Held by one process at a time, or by several that each have a share: each of them writes a journal of its own then,
    and reads those of all.
    """

    directory: Path
    conversion: str | None
    """Its fingerprint; None to hold the directory and nothing else."""
    share: Share | None = None
    """What this process does of it; None for all."""
    written: dict[str, Written] = field(default_factory=dict)
    """What the journals claim to be there; nothing that they say is believed without a look at the bytes."""
    files: set[str] = field(default_factory=set)
    """Files that are whole and on disk."""
    finishes: bool = field(default=True, init=False)
    """Whether it is this process that puts the directory in its place."""

    def __enter__(self) -> "Journal":
        """Begin the journal or go on with it.

        Raises:
            BadDestination: another process has it or this share of it, or it is of another conversion.
        """
        self.finishes = self.share is None
        own = JOURNAL if self.share is None else f"{JOURNAL}-{self.share.stem}"
        with ExitStack() as opened:
            self._lock = self._open(JOURNAL, opened)
            self._file = self._open(own, opened) if self.share else self._lock
            if self.share is not None:
                _hold(self._lock, fcntl.LOCK_SH, self.directory, "another conversion")
            _hold(
                self._file, fcntl.LOCK_EX, self.directory, f"share {self.share}" if self.share else "another conversion"
            )
            self._begin(own)
            opened.pop_all()
        return self

    def _open(self, name: str, opened: ExitStack) -> int:
        descriptor = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        opened.callback(os.close, descriptor)
        return descriptor

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for descriptor in {self._file, self._lock}:
            os.close(descriptor)

    def add(self, tensor: str, written: Written) -> None:
        """Note a tensor whose bytes have all been written."""
        self.written[tensor] = written
        self._line(
            {"tensor": tensor, "sha256": written.sha256, "loss": asdict(written.loss), "non_finite": written.non_finite}
        )

    def add_file(self, name: str) -> None:
        """Note a file that is whole and on disk."""
        self.files.add(name)
        self._line({"file": name})
        os.fsync(self._file)

    def take_over(self, files: Collection[str]) -> bool:
        """Hold the directory alone from now on, and know what the others did, if all these files are in it.

        Of several that ask, the last one gets it.
        """
        if not self.finishes:
            with suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._lock).st_nlink == 0:  # another one has put the directory in its place
                    return False
                self._read()
                self.finishes = self.files.issuperset(files)
        return self.finishes

    def _line(self, entry: dict[str, Any]) -> None:
        os.write(self._file, (json.dumps(entry) + "\n").encode())

    def _begin(self, own: str) -> None:
        """Mend this process's journal or start it, and read all of them."""
        if self.conversion is None:
            return
        content = (self.directory / own).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed within the line
            os.truncate(self._file, len(whole))
        if not whole:
            self._line({"conversion": self.conversion})
        self._read()

    def _read(self) -> None:
        """Read every journal that is there; another process may be writing its last line."""
        for path in sorted(self.directory.glob(f"{JOURNAL}*")):
            content = path.read_bytes()
            lines = content[: content.rfind(b"\n") + 1].splitlines()
            if not lines:
                continue
            entries = []
            with suppress(ValueError):  # a line that the disk lost ends what can be known
                entries = [json.loads(line) for line in lines]
            if not entries or entries[0] != {"conversion": self.conversion}:
                raise BadDestination(
                    f"{self.directory}: left by another conversion (other options, or SRC has changed); remove it, or "
                    "convert without --resume and --share: it is removed then and the conversion starts afresh"
                )
            for entry in entries[1:]:
                if "file" in entry:
                    self.files.add(entry["file"])
                else:
                    self.written[entry["tensor"]] = Written(entry["sha256"], Loss(**entry["loss"]), entry["non_finite"])


def _hold(descriptor: int, kind: int, directory: Path, who: str) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadDestination(f"{directory}: {who} is writing there; wait for it") from error
