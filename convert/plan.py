"""The plan of a conversion: every file and tensor it will write, known before a byte of data is read.

Imports the standard library, NumPy and convert's tables and checkpoint.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from convert.casting import CASTS
from convert.checkpoint import Checkpoint
from convert.errors import TensorMismatch
from convert.io.files import inside
from convert.layouts import LAYOUTS
from convert.mistral_params import write_params
from convert.transpose import BLOCK_BYTES

__all__ = ["Plan", "PlannedFile", "PlannedTensor", "make_plan", "shard"]

MAX_SHARD_BYTES = 5_000_000_000

CONTAINERS = ("safetensors", "orbax")

WORKERS = 3
"""Threads that move tensors: while one waits for the disk, two compute."""

HELD_BLOCKS = 8 * WORKERS
"""A block, its copies, and room for what a memory allocator keeps."""

SIDE_FILES = (
    "tokenizer*", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "*.model",
)  # fmt: skip
"""Carried along as they are: what a model needs to be used, beside weights and config.json."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor to write and the stored tensors it is made of."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    nbytes: int
    piece_bytes: int
    """The most that is held in memory at a time."""

    def to_json(self) -> dict[str, Any]:
        """Give the tensor as JSON holds it."""
        shape, sources = list(self.shape), list(self.sources)
        return {"name": self.name, "dtype": self.dtype.name, "shape": shape, "bytes": self.nbytes, "sources": sources}


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One weight file to write."""

    name: str
    tensors: tuple[PlannedTensor, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion does."""

    source: Path
    from_layout: str
    to_layout: str
    dtype: str
    container: str
    """"safetensors" or "orbax"; for the latter, the files listed are written first and removed at the end."""
    files: tuple[PlannedFile, ...]
    index_name: str | None
    """None for a single file."""
    side_files: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """Walk the tensors of all files in the order of the layout."""
        return (tensor for file in self.files for tensor in file.tensors)

    @property
    def total_bytes(self) -> int:
        """Give the bytes of all tensors: the disk needed, but for headers and side files."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def disk_bytes(self) -> int:
        """Give the disk needed on the way."""
        return self.total_bytes * (2 if self.container == "orbax" else 1)

    @property
    def peak_bytes(self) -> int:
        """Bound the memory that moving takes: what each thread's piece shows of its file, and its blocks."""
        pieces = heapq.nlargest(WORKERS, (tensor.piece_bytes for tensor in self.tensors))
        return sum(pieces) + HELD_BLOCKS * BLOCK_BYTES

    def to_json(self) -> dict[str, Any]:
        """Give the plan as JSON holds it."""
        return {
            "source": str(self.source),
            "from": self.from_layout,
            "to": self.to_layout,
            "dtype": self.dtype,
            "container": self.container,
            "total_bytes": self.total_bytes,
            "peak_bytes": self.peak_bytes,
            "files": [{"name": f.name, "tensors": [tensor.to_json() for tensor in f.tensors]} for f in self.files],
            "side_files": list(self.side_files),
            "notes": list(self.notes),
        }


def make_plan(
    checkpoint: Checkpoint,
    to: str,
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    container: str = "safetensors",
) -> Plan:
    """Plan a conversion from headers alone.

    Args:
        checkpoint: what to convert.
        to: the layout to write.
        dtype: "keep", or one of CASTS.
        max_shard_bytes: start a new file before one exceeds this; a larger tensor has a file of its own.
        container: "safetensors", or "orbax" for the layout flax.

    Raises:
        ValueError: an argument has an unknown value.
        TensorMismatch: a target tensor would be made of several dtypes, and no cast was asked for.
        ConfigError: the layout is Mistral's, and its params.json cannot hold the configuration.
        UnreadableCheckpoint: a side file leads out of the directory.
    """
    if dtype != "keep" and dtype not in CASTS:
        raise ValueError(f"no dtype {dtype!r}: expected one of keep, {', '.join(CASTS)}")
    if container not in CONTAINERS or (container == "orbax" and to != "flax"):
        raise ValueError(f"container {container!r}: expected safetensors, or orbax for the layout flax (not {to})")
    tensors = _tensors(checkpoint, to, CASTS.get(dtype))
    if LAYOUTS[to].native:
        write_params(checkpoint.config)  # refuses what it cannot hold
        max_shard_bytes = sum(tensor.nbytes for tensor in tensors)  # mistral-inference reads one file
    files, index_name = shard(tensors, LAYOUTS[to].stem, max_shard_bytes)
    return Plan(
        source=checkpoint.path,
        from_layout=checkpoint.layout,
        to_layout=to,
        dtype=dtype,
        container=container,
        files=files,
        index_name=index_name,
        side_files=tuple(_side_files(checkpoint.path)),
        notes=checkpoint.notes,
    )


def shard(
    tensors: Iterable[PlannedTensor], stem: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[tuple[PlannedFile, ...], str | None]:
    """Lay tensors out in files, in order, and name the files and their index (None for a single file)."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return (PlannedFile(f"{stem}.safetensors", tuple(shards[0])),), None
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    return tuple(map(PlannedFile, names, map(tuple, shards))), f"{stem}.safetensors.index.json"


def _tensors(checkpoint: Checkpoint, to: str, cast: np.dtype[Any] | None) -> list[PlannedTensor]:
    view, planned, refused = checkpoint.view(to), [], []
    for name, spec in view.specs.items():
        try:
            dtype = cast or view.dtype(name)
        except TensorMismatch as error:
            refused.append(str(error))
            continue
        nbytes = int(np.prod(spec.shape, dtype=object)) * dtype.itemsize
        sources = tuple(view.sources(name))
        planned.append(PlannedTensor(name, dtype, spec.shape, sources, nbytes, nbytes // len(spec.regions)))
    if refused:
        more = [f"... and {len(refused) - 8} more"] if len(refused) > 8 else []
        raise TensorMismatch("\n  ".join([f"{checkpoint.path}: cannot be written as {to}:", *refused[:8], *more]))
    return planned


def _side_files(root: Path) -> Iterator[str]:
    for path in sorted(root.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SIDE_FILES):
            yield inside(root, path.name).name
