"""Move a file's tensors: worker threads bring blocks into order while one thread hashes and one writes.

Imports the standard library, NumPy, and convert's plan and writer.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from convert.casting import Loss, cast, count_non_finite
from convert.io.safetensors import Writer
from convert.manifest import Journal, Written
from convert.plan import PlannedFile, PlannedTensor
from convert.transpose import blocks, contiguous

__all__ = ["Progress", "Stream", "Supply"]

Progress = Callable[[str, int, int], None]
"""Called after each block with the tensor's name, the bytes written so far and the bytes in all."""

WORKERS, IN_FLIGHT = 2, 8
"""Threads that transform, and blocks that are held at a time."""


class Supply(Protocol):
    """Where tensors come from."""

    def pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """Give a tensor as the parts that follow each other in it."""
        ...

    def release(self, name: str, piece: NDArray[Any] | None = None) -> None:
        """Take notice that a piece, or all of a tensor, is not needed again."""
        ...


class _Ready(NamedTuple):
    data: NDArray[np.uint8]
    loss: Loss
    non_finite: int


class _Block(NamedTuple):
    tensor: PlannedTensor
    array: NDArray[Any]
    piece: NDArray[Any] | None
    """Set on the last block of a piece."""
    is_last: bool


@dataclass
class Stream:
    """Writes tensors from a supply, in order, and tells the journal of each."""

    supply: Supply
    dtype: np.dtype[Any] | None
    """To cast to; None to leave every value as it is."""
    journal: Journal
    total_bytes: int
    progress: Progress | None = None
    done_bytes: int = 0
    _hash: Any = field(default_factory=hashlib.sha256)
    _loss: Loss = field(default_factory=Loss)
    _non_finite: int = 0
    _at: int = 0

    def write(self, writer: Writer, file: PlannedFile) -> None:
        """Write every tensor of a file, but those that are in their places already."""
        missing = [tensor for tensor in file.tensors if not self._is_there(writer, tensor)]
        with ThreadPoolExecutor(WORKERS) as workers, ThreadPoolExecutor(1) as hasher:
            pending: deque[tuple[_Block, Future[_Ready]]] = deque()
            try:
                for block in self._blocks(missing):
                    pending.append((block, workers.submit(self._transform, block.array)))
                    if len(pending) == IN_FLIGHT:
                        self._put(writer, hasher, *pending.popleft())
                while pending:
                    self._put(writer, hasher, *pending.popleft())
            except BaseException:
                workers.shutdown(cancel_futures=True)
                raise

    def _is_there(self, writer: Writer, tensor: PlannedTensor) -> bool:
        claimed = self.journal.written.get(tensor.name)
        if claimed is None:
            return False
        found = hashlib.sha256()
        for chunk in writer.read(tensor.name):
            found.update(chunk)
        if found.hexdigest() != claimed.sha256:
            return False
        self._advance(tensor, tensor.nbytes)
        return True

    def _blocks(self, tensors: Iterable[PlannedTensor]) -> Iterator[_Block]:
        for tensor in tensors:
            left = math.prod(tensor.shape)
            for piece in self.supply.pieces(tensor.name):
                piece_left = piece.size
                left -= piece.size
                for array in blocks(piece):
                    piece_left -= array.size
                    yield _Block(tensor, array, None if piece_left else piece, not (piece_left or left))

    def _transform(self, array: NDArray[Any]) -> _Ready:
        result, loss = (array, Loss()) if self.dtype is None else cast(array, self.dtype)
        bits = contiguous(result).reshape(-1)
        return _Ready(bits.view(np.uint8), loss, count_non_finite(bits, result.dtype))

    def _put(self, writer: Writer, hasher: ThreadPoolExecutor, block: _Block, future: Future[_Ready]) -> None:
        data, loss, non_finite = future.result()
        hashed = hasher.submit(self._hash.update, data)
        writer.write(block.tensor.name, self._at, data)
        hashed.result()
        self._at, self._loss, self._non_finite = (
            self._at + data.nbytes,
            self._loss + loss,
            self._non_finite + non_finite,
        )
        if block.piece is not None:
            self.supply.release(block.tensor.name, block.piece)
        if block.is_last:
            assert self._at == block.tensor.nbytes, f"{block.tensor.name}: {self._at} bytes"
            self.journal.add(block.tensor.name, Written(self._hash.hexdigest(), self._loss, self._non_finite))
            self.supply.release(block.tensor.name)
            self._hash, self._loss, self._non_finite, self._at = hashlib.sha256(), Loss(), 0, 0
        self._advance(block.tensor, data.nbytes)

    def _advance(self, tensor: PlannedTensor, nbytes: int) -> None:
        self.done_bytes += nbytes
        if self.progress is not None:
            self.progress(tensor.name, self.done_bytes, self.total_bytes)
