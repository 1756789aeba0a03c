"""Carry out a plan: stream every tensor into a directory beside the destination, then rename it.

Imports the standard library, NumPy, and convert's plan and writer.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from convert.casting import CASTS, Loss, cast
from convert.checkpoint import Checkpoint, View
from convert.errors import BadDestination, TensorMismatch
from convert.io.safetensors import Writer
from convert.layouts import LAYOUTS
from convert.plan import MAX_SHARD_BYTES, SIDE_FILES, Plan, PlannedFile, PlannedTensor, make_plan, shard
from flax_mixtral.config import MixtralConfig

__all__ = ["Progress", "Report", "convert", "save"]

Progress = Callable[[str, int, int], None]
"""Called after each piece with the tensor's name, the bytes written so far and the bytes in all."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was planned and, unless it was a dry run, done."""

    plan: Plan
    destination: Path
    written: bool = False
    seconds: float = 0.0
    losses: dict[str, Loss] = field(default_factory=dict)
    """Tensors that a cast changed."""

    @property
    def loss(self) -> Loss:
        """Sum the losses of all tensors that changed."""
        return sum(self.losses.values(), Loss())

    def to_json(self) -> dict[str, Any]:
        """Give the report as JSON holds it."""
        names = ("values", "changed", "to_infinity", "to_zero")
        return {
            "destination": str(self.destination),
            "written": self.written,
            "seconds": round(self.seconds, 3),
            "losses": {name: {key: getattr(loss, key) for key in names} for name, loss in self.losses.items()},
            "plan": self.plan.to_json(),
        }


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str = "flax",
    dtype: str = "keep",
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Write a checkpoint in another layout, bit for bit unless a cast is asked for; DST appears whole or not at all.

    Args:
        src: a directory with config.json and safetensors.
        dst: the directory to make; its parents are made too.
        to: "flax", "hf-legacy" or "hf-fused".
        dtype: "keep", "bfloat16", "float16" or "float32".
        dry_run: check everything and plan, write nothing.
        overwrite: replace dst if it is a checkpoint and nothing else.
        max_shard_bytes: the most bytes of tensors in one file.
        progress: told of every piece written.

    Raises:
        BadInput, ConfigError: see convert.errors; nothing was written.
        ValueError: `to` or `dtype` is unknown.
    """
    started = time.monotonic()
    src, dst = Path(src), Path(dst)
    checkpoint = Checkpoint.open(src)
    plan = make_plan(checkpoint, to, dtype, max_shard_bytes)
    _check_destination(src, dst, overwrite)
    if dry_run:
        return Report(plan, dst)
    with _replacing(dst, plan.total_bytes) as partial:
        losses = _write_weights(plan, checkpoint.view(to), partial, progress)
        _write_config(plan, checkpoint, partial)
        for name in plan.side_files:
            shutil.copyfile(src / name, partial / name)
    return Report(plan, dst, True, time.monotonic() - started, losses)


def save(dst: str | Path, leaves: Mapping[str, NDArray[Any]], config: MixtralConfig) -> None:
    """Write the leaves of a Flax model as a checkpoint directory; DST appears whole or not at all.

    Args:
        dst: the directory to make; an existing one is refused.
        leaves: every parameter by its dotted path.
        config: written as config.json, in transformers' 5.x spelling.

    Raises:
        BadDestination: dst exists or cannot be written.
        TensorMismatch: the leaves are not those of the configuration.
    """
    dst, layout = Path(dst), LAYOUTS["flax"]
    specs = layout.tensors(config)
    wrong = sorted(specs.keys() ^ leaves.keys())
    wrong += [name for name in specs.keys() & leaves.keys() if leaves[name].shape != specs[name].shape]
    if wrong:
        raise TensorMismatch(f"{dst}: missing, unexpected or misshaped for this configuration: {', '.join(wrong)}")
    if os.path.lexists(dst):
        raise BadDestination(f"{dst}: exists already; choose another directory")
    planned = [
        PlannedTensor(n, leaves[n].dtype, leaves[n].shape, (n,), leaves[n].nbytes, leaves[n].nbytes) for n in specs
    ]
    files, index_name = shard(planned, layout.stem)
    with _replacing(dst, sum(tensor.nbytes for tensor in planned)) as partial:
        _write_files(files, index_name, layout.format, lambda tensor: [leaves[tensor.name]], partial)
        dtypes = {tensor.dtype.name for tensor in planned}
        dtype = {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
        (partial / "config.json").write_text(json.dumps({**config.to_hf(), **dtype}, indent=2) + "\n")


def _check_destination(src: Path, dst: Path, overwrite: bool) -> None:
    real_src, real_dst = src.resolve(), dst.resolve()
    if real_dst == real_src or real_src in real_dst.parents or real_dst in real_src.parents:
        raise BadDestination(f"{dst}: DST must lie apart from SRC ({src}), neither inside it nor around it")
    if not os.path.lexists(dst):
        return
    if not overwrite:
        raise BadDestination(f"{dst}: exists already; choose another DST, or allow to overwrite it")
    if dst.is_symlink() or not dst.is_dir():
        raise BadDestination(f"{dst}: is no directory; only a checkpoint's directory is overwritten")
    known = ("config.json", "*.safetensors", "*.safetensors.index.json", *SIDE_FILES)
    others = [p.name for p in dst.iterdir() if p.is_dir() or not any(fnmatch(p.name, k) for k in known)]
    if others:
        raise BadDestination(f"{dst}: holds {sorted(others)[0]!r}, which is no part of a checkpoint: not overwritten")


@contextmanager
def _replacing(dst: Path, nbytes: int) -> Iterator[Path]:
    """Give a new directory beside DST that takes its place at the end, or vanishes if anything fails."""
    partial = dst.parent / f".{dst.name}.{os.getpid()}.partial"
    replaced = dst.parent / f".{dst.name}.{os.getpid()}.replaced"
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(dst.parent).free) < nbytes:
            raise BadDestination(f"{dst}: needs {nbytes:,} bytes, {free:,} are free")
        partial.mkdir()
        yield partial
        if os.path.lexists(dst):
            dst.rename(replaced)
        partial.rename(dst)
        _sync_directory(dst.parent)
    except OSError as error:
        raise BadDestination(f"{dst}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if os.path.lexists(replaced) and not os.path.lexists(dst):
            replaced.rename(dst)
        shutil.rmtree(replaced, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_weights(plan: Plan, view: View, directory: Path, progress: Progress | None) -> dict[str, Loss]:
    losses: dict[str, Loss] = {}
    done = 0

    def pieces(tensor: PlannedTensor) -> Iterator[NDArray[Any]]:
        nonlocal done
        loss = Loss()
        for piece in view.pieces(tensor.name):
            result, lost = cast(piece, CASTS[plan.dtype]) if plan.dtype in CASTS else (piece, Loss())
            yield result
            loss += lost
            done += result.nbytes
            if progress is not None:
                progress(tensor.name, done, plan.total_bytes)
        if loss.changed:
            losses[tensor.name] = loss

    _write_files(plan.files, plan.index_name, LAYOUTS[plan.to_layout].format, pieces, directory)
    return losses


def _write_files(
    files: Sequence[PlannedFile],
    index_name: str | None,
    file_format: str,
    pieces: Callable[[PlannedTensor], Iterable[NDArray[Any]]],
    directory: Path,
) -> None:
    for file in files:
        specs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors]
        with Writer(directory / file.name, specs, file_format) as writer:
            for tensor in file.tensors:
                writer.write(tensor.name, pieces(tensor))
    if index_name is not None:
        tensors = [(tensor, file) for file in files for tensor in file.tensors]
        weight_map = {tensor.name: file.name for tensor, file in tensors}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor, _ in tensors)}, "weight_map": weight_map}
        (directory / index_name).write_text(json.dumps(index, indent=2) + "\n")


def _write_config(plan: Plan, checkpoint: Checkpoint, directory: Path) -> None:
    """Copy config.json as it is; a cast changes the one key that names the dtype."""
    if plan.dtype == "keep":
        shutil.copyfile(checkpoint.path / "config.json", directory / "config.json")
        return
    key = "torch_dtype" if "torch_dtype" in checkpoint.raw_config else "dtype"
    config = {**checkpoint.raw_config, key: plan.dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
