"""Read a conversion back from disk and compare it with its source, tensor by tensor.

Imports the standard library, NumPy, and convert's plan and checkpoint.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.casting import CASTS, cast
from convert.checkpoint import Checkpoint
from convert.errors import BadDestination, UnreadableCheckpoint
from convert.io.json_strict import read_object
from convert.io.safetensors import as_bits
from convert.manifest import MANIFEST
from convert.plan import Plan, PlannedTensor
from convert.transpose import blocks, contiguous

__all__ = ["is_complete", "verify"]

AHEAD = 4
"""Blocks of the source that are being brought into order while one is compared."""


def is_complete(directory: Path, plan: Plan) -> bool:
    """Say whether a directory claims to be the outcome of a plan."""
    try:
        listed = read_object(directory / MANIFEST).get("tensors")
    except UnreadableCheckpoint:
        return False
    if not isinstance(listed, dict) or any(not isinstance(entry, dict) for entry in listed.values()):
        return False
    found = {name: (entry.get("file"), entry.get("dtype"), entry.get("shape")) for name, entry in listed.items()}
    return found == {t.name: (file.name, t.dtype.name, list(t.shape)) for file in plan.files for t in file.tensors}


def verify(checkpoint: Checkpoint, plan: Plan, directory: Path) -> None:
    """Compare every byte on disk with what the source gives, and with the manifest.

    Raises:
        BadDestination: a tensor differs.
    """
    _forget(path for file in plan.files if (path := directory / file.name).exists())
    written = Checkpoint.open(directory)
    listed = read_object(directory / MANIFEST)["tensors"]
    with ThreadPoolExecutor(2) as workers:
        for tensor in plan.tensors:
            stored = as_bits(written.stored(tensor.name)).reshape(-1).view(np.uint8)
            found, at = hashlib.sha256(), 0
            for data in _source(checkpoint, plan, tensor, workers):
                part = stored[at : at + data.size]
                found.update(part.data)
                if not np.array_equal(part, data):
                    raise BadDestination(
                        f"{directory}: {tensor.name} differs from its source near byte {at:,} when it is read back; "
                        "the disk or the memory is at fault, or SRC has changed: convert again"
                    )
                written.release(part)
                at += data.size
            if found.hexdigest() != listed[tensor.name]["sha256"]:
                raise BadDestination(f"{directory}: {tensor.name} does not have the hash that {MANIFEST} lists")


def _source(
    checkpoint: Checkpoint, plan: Plan, tensor: PlannedTensor, workers: ThreadPoolExecutor
) -> Iterator[NDArray[np.uint8]]:
    """Give the bytes that a tensor must have, block by block."""
    view = checkpoint.view(plan.to_layout)
    dtype = CASTS.get(plan.dtype)

    def transform(block: NDArray[Any]) -> NDArray[np.uint8]:
        return contiguous(block if dtype is None else cast(block, dtype)[0]).reshape(-1).view(np.uint8)

    for piece in view.pieces(tensor.name):
        cut = blocks(piece)
        pending: deque[Future[NDArray[np.uint8]]] = deque(workers.submit(transform, b) for b in islice(cut, AHEAD))
        while pending:
            yield pending.popleft().result()
            pending.extend(workers.submit(transform, block) for block in islice(cut, 1))
        view.release(tensor.name, piece)
    view.release(tensor.name)


def _forget(paths: Iterable[Path]) -> None:
    """Drop what the system caches of files that are on disk, so that they are read from there."""
    for path in paths:
        if hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
