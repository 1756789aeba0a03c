"""Move a file's tensors: each thread takes a tensor, and block by block brings it into order, hashes it and writes it.

Imports the standard library, NumPy, and convert's plan and writer.
"""

import hashlib
import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from convert.casting import Loss, cast, count_non_finite
from convert.io.safetensors import Writer
from convert.manifest import Journal, Written
from convert.plan import WORKERS, PlannedFile, PlannedTensor
from convert.transpose import BLOCK_BYTES, blocks, contiguous

__all__ = ["Progress", "Stream", "Supply"]

Progress = Callable[[str, int, int], None]
"""Called after each block, from any thread but one at a time: the tensor's name, bytes written so far, bytes in all."""


class Supply(Protocol):
    """Where tensors come from."""

    def pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """Give a tensor as the parts that follow each other in it."""
        ...

    def release(self, name: str, piece: NDArray[Any] | None = None) -> None:
        """Take notice that a piece, or all of a tensor, is not needed again."""
        ...


class _Stopped(Exception):  # no error: another thread has one
    """The other threads have nothing to finish."""


@dataclass
class Stream:
    """Writes tensors from a supply, and tells the journal of each."""

    supply: Supply
    dtype: np.dtype[Any] | None
    """To cast to; None to leave every value as it is."""
    journal: Journal
    total_bytes: int
    progress: Progress | None = None
    done_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _own: threading.local = field(default_factory=threading.local)

    def write(self, writer: Writer, file: PlannedFile) -> None:
        """Write every tensor of a file, but those that are in their places already."""
        largest_first = sorted(file.tensors, key=lambda tensor: -tensor.nbytes)  # so that all end at about one time
        with ThreadPoolExecutor(WORKERS) as workers:
            try:
                moves = [workers.submit(self._move, writer, tensor) for tensor in largest_first]
                wait(moves, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()  # an interrupt arrives here, too
                workers.shutdown(cancel_futures=True)
        self._stop.clear()
        failed = [error for move in moves if not move.cancelled() and (error := move.exception())]
        for error in failed:
            if not isinstance(error, _Stopped):
                raise error

    def _move(self, writer: Writer, tensor: PlannedTensor) -> None:
        if self._is_there(writer, tensor):
            self._advance(tensor, tensor.nbytes)
            return
        digest, loss, non_finite, at, last_bytes = hashlib.sha256(), Loss(), 0, 0, 0
        for piece in self.supply.pieces(tensor.name):
            for block in blocks(piece):
                if self._stop.is_set():
                    raise _Stopped
                values, lost = (block, Loss()) if self.dtype is None else cast(block, self.dtype)
                bits = contiguous(values, self._buffer(values.nbytes)).reshape(-1)
                data = bits.view(np.uint8)
                digest.update(data.data)
                writer.write(tensor.name, at, data)
                non_finite += count_non_finite(bits, values.dtype)
                loss, at, last_bytes = loss + lost, at + data.nbytes, data.nbytes
                if at < tensor.nbytes:  # the last block counts when the journal knows of the tensor
                    self._advance(tensor, data.nbytes)
            self.supply.release(tensor.name, piece)
        self.supply.release(tensor.name)
        assert at == tensor.nbytes, f"{tensor.name}: {at} bytes for {tensor.nbytes}"
        with self._lock:
            self.journal.add(tensor.name, Written(digest.hexdigest(), loss, non_finite))
        self._advance(tensor, last_bytes)

    def _buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Give this thread's own memory, which begins with a page; what it held before is gone."""
        held: NDArray[np.uint8] | None = getattr(self._own, "buffer", None)
        if held is None or held.size < nbytes:
            held = self._own.buffer = np.frombuffer(mmap.mmap(-1, max(nbytes, BLOCK_BYTES)), np.uint8)
        return held

    def _is_there(self, writer: Writer, tensor: PlannedTensor) -> bool:
        claimed = self.journal.written.get(tensor.name)
        if claimed is None:
            return False
        found = hashlib.sha256()
        for chunk in writer.read(tensor.name):
            found.update(chunk)
        return found.hexdigest() == claimed.sha256

    def _advance(self, tensor: PlannedTensor, nbytes: int) -> None:
        with self._lock:
            self.done_bytes += nbytes
            if self.progress is not None:
                self.progress(tensor.name, self.done_bytes, self.total_bytes)
