"""The directory that a conversion makes: whether it may, and how it appears whole or not at all.

Imports the standard library and convert's plan.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from convert.errors import BadDestination, Interrupted
from convert.manifest import JOURNAL, MANIFEST, Journal
from convert.plan import SIDE_FILES
from convert.share import Share

__all__ = ["check_destination", "partial_of", "replacing", "restore", "sync_directory", "write_json"]

KNOWN = ("config.json", "params.json", MANIFEST, "*.safetensors", "*.safetensors.index.json", "*.orbax", *SIDE_FILES)
"""What a directory may hold that is overwritten."""


def partial_of(dst: Path) -> Path:
    """Give the directory that grows until it becomes DST; always the same, so that --resume finds it."""
    return dst.parent / f".{dst.name}.partial"


def check_destination(src: Path, dst: Path, overwrite: bool) -> None:
    """Refuse a destination that overlaps the source, or exists and may not be overwritten.

    Raises:
        BadDestination: it is so.
    """
    real_src, real_dst = src.resolve(), dst.resolve()
    if real_dst == real_src or real_src in real_dst.parents or real_dst in real_src.parents:
        raise BadDestination(f"{dst}: DST must lie apart from SRC ({src}), neither inside it nor around it")
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise BadDestination(f"{dst}: exists already; choose another DST, or allow to overwrite it")
    if dst.is_symlink() or not dst.is_dir():
        raise BadDestination(f"{dst}: is no directory; only a checkpoint's directory is overwritten")
    others = [
        path.name
        for path in dst.iterdir()
        if path.is_dir() != path.name.endswith(".orbax") or not any(fnmatch(path.name, known) for known in KNOWN)
    ]
    if others:
        raise BadDestination(f"{dst}: holds {sorted(others)[0]!r}, which is no part of a checkpoint: not overwritten")


@contextmanager
def replacing(
    dst: Path,
    nbytes: int,
    conversion: str,
    *,
    share: Share | None = None,
    resume: bool = False,
    keep: bool = True,
) -> Iterator[Journal]:
    """Give the journal of a directory beside DST that takes its place at the end.

    Args:
        dst: the directory to make.
        nbytes: the disk it will take.
        conversion: the fingerprint of what is done.
        share: this process's part of it; the directory is then put in its place by the one that has taken the journal
            over, and stays for the others whatever happens to this one.
        resume: go on with what an interrupted conversion has left, instead of removing it.
        keep: leave it for the next one to resume when interrupted.

    Raises:
        BadDestination: it cannot be written; nothing is left then, but for what other shares have done.
        Interrupted: by the user; what there is so far is left.
    """
    partial = partial_of(dst)
    with _journal(partial, conversion, share, resume or share is not None) as journal:
        try:
            free, taken = shutil.disk_usage(dst.parent).free, _disk_bytes(partial)
            if free + taken < nbytes:
                raise BadDestination(f"{dst}: needs {nbytes:,} bytes, {free + taken:,} are free")
            yield journal
            if journal.finishes:
                _put_in_place(partial, dst)
        except BaseException as error:
            if keep and isinstance(error, KeyboardInterrupt):
                message = f"interrupted; {partial} keeps what is done, and --resume goes on from there"
                raise Interrupted(message) from error
            if journal.finishes:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise BadDestination(f"{dst}: cannot be written: {error.strerror or error}") from error
            raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small file and bring it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _journal(partial: Path, conversion: str, share: Share | None, resume: bool) -> Journal:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(partial) and not resume:
            with Journal(partial, None):  # refuses while another process writes there
                shutil.rmtree(partial)
        partial.mkdir(exist_ok=resume)
    except OSError as error:
        raise BadDestination(f"{partial}: cannot be written: {error.strerror or error}") from error
    return Journal(partial, conversion, share)


def _disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def _put_in_place(partial: Path, dst: Path) -> None:
    """Rename, with the old directory out of the way; killed in between, `restore` or the next try puts it right."""
    replaced = _replaced(dst)
    for journal in partial.glob(f"{JOURNAL}*"):
        journal.unlink()
    sync_directory(partial)
    if os.path.lexists(dst):
        dst.rename(replaced)
    try:
        partial.rename(dst)
    except OSError:
        if os.path.lexists(replaced):
            replaced.rename(dst)
        raise
    sync_directory(dst.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore(dst: Path) -> None:
    """Undo or finish the replacing of DST where a process was killed between its two renames."""
    replaced = _replaced(dst)
    if os.path.lexists(replaced):
        if os.path.lexists(dst):
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(dst)


def _replaced(dst: Path) -> Path:
    return dst.parent / f".{dst.name}.replaced"


def sync_directory(path: Path) -> None:
    """Bring a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
