"""Carry out a plan: stream every tensor into a directory beside the destination, then rename it.

Imports the standard library, NumPy, and convert's plan and writer.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from convert.casting import CASTS, Loss
from convert.checkpoint import Checkpoint
from convert.destination import check_destination, replacing, restore, write_json
from convert.errors import BadDestination, TensorMismatch
from convert.io.files import ORBAX
from convert.io.safetensors import Reader, Writer
from convert.layouts import LAYOUTS
from convert.manifest import MANIFEST, Journal, fingerprint, manifest
from convert.mistral_params import write_params
from convert.plan import MAX_SHARD_BYTES, Plan, PlannedFile, PlannedTensor, make_plan, shard
from convert.share import Share
from convert.stream import Progress, Stream
from convert.verify import is_complete, verify
from flax_mixtral.config import MixtralConfig

__all__ = ["Report", "convert", "save"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was planned and, unless it was a dry run, done."""

    plan: Plan
    destination: Path
    written: bool = False
    seconds: float = 0.0
    verified: bool = False
    losses: dict[str, Loss] = field(default_factory=dict)
    """Tensors that a cast changed."""
    non_finite: dict[str, int] = field(default_factory=dict)
    """Tensors with values that are NaN or infinite, and how many; they are kept."""
    share: Share | None = None
    """What this process did of it; DST is there when every share is done."""

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
            "share": None if self.share is None else str(self.share),
            "verified": self.verified,
            "seconds": round(self.seconds, 3),
            "losses": {name: {key: getattr(loss, key) for key in names} for name, loss in self.losses.items()},
            "non_finite": self.non_finite,
            "plan": self.plan.to_json(),
        }


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str = "flax",
    container: str = "safetensors",
    dtype: str = "keep",
    rope_theta: float | None = None,
    verify_written: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    share: Share | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Write a checkpoint in another layout, bit for bit unless a cast is asked for; DST appears whole or not at all.

    Args:
        src: a directory with config.json or params.json, and weights in any layout and container.
        dst: the directory to make; its parents are made too.
        to: "flax", "hf-legacy", "hf-fused", "mistral" or "mistral-stacked".
        container: "safetensors", or "orbax" for the layout flax.
        dtype: "keep", "bfloat16", "float16" or "float32".
        rope_theta: for a params.json that has none.
        verify_written: read everything back from disk and compare it with the source before DST appears.
        dry_run: check everything and plan, write nothing.
        resume: go on with what the same conversion has left when it was interrupted, however that was.
        overwrite: replace dst if it is a checkpoint and nothing else.
        share: write these of the files alone, beside other processes with the other shares, on this machine or on
            others that see the same directory. The last one to end finishes: dst appears; one that begins after that
            verifies it.
        max_shard_bytes: the most bytes of tensors in one file.
        progress: told of every block written.

    Raises:
        BadInput, ConfigError: see convert.errors; nothing was written.
        Interrupted: by KeyboardInterrupt; `resume` goes on.
        ValueError: `to`, `container` or `dtype` is unknown.
    """
    started = time.monotonic()
    src, dst = Path(src), Path(dst)
    checkpoint = Checkpoint.open(src, rope_theta)
    plan = make_plan(checkpoint, to, dtype, max_shard_bytes, container)
    if not dry_run:
        restore(dst)
    if (resume or share is not None) and is_complete(dst, plan):  # a share may begin when the others have ended
        verify(checkpoint, plan, dst)
        return Report(plan, dst, written=True, seconds=time.monotonic() - started, verified=True)
    check_destination(src, dst, overwrite)
    if dry_run:
        return Report(plan, dst)
    configs = (name for name in ("config.json", "params.json") if (src / name).exists())
    conversion = fingerprint(plan, (src / name for name in (*configs, *checkpoint.files.readers)))
    own = plan.files if share is None else share.of(plan.files)
    with replacing(dst, plan.disk_bytes, conversion, share=share, resume=resume) as journal:
        own_bytes = sum(tensor.nbytes for file in own for tensor in file.tensors)
        stream = Stream(checkpoint.view(to), CASTS.get(dtype), journal, own_bytes, progress)
        _write_files(own, LAYOUTS[to].format, stream)
        if not journal.take_over({file.name for file in plan.files}):
            return Report(plan, dst, seconds=time.monotonic() - started, share=share)
        _write_lists(plan.files, plan.index_name, plan.total_bytes, journal)
        if container == "orbax":
            _repack(plan, journal.directory)
        _write_config(plan, checkpoint, journal.directory)
        for name in plan.side_files:
            shutil.copyfile(src / name, journal.directory / name)
        if verify_written:
            verify(checkpoint, plan, journal.directory)
        losses = {name: written.loss for name, written in journal.written.items() if written.loss.changed}
        non_finite = {name: written.non_finite for name, written in journal.written.items() if written.non_finite}
    return Report(plan, dst, True, time.monotonic() - started, verify_written, losses, non_finite, share)


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Arrays in memory, supplied as they are."""

    arrays: Mapping[str, NDArray[Any]]

    def pieces(self, name: str) -> Iterator[NDArray[Any]]:
        yield self.arrays[name]

    def release(self, name: str, piece: NDArray[Any] | None = None) -> None:
        """They are their owner's."""


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
    total_bytes = sum(tensor.nbytes for tensor in planned)
    with replacing(dst, total_bytes, "save", keep=False) as journal:
        _write_files(files, layout.format, Stream(_Leaves(leaves), None, journal, total_bytes))
        _write_lists(files, index_name, total_bytes, journal)
        dtypes = {tensor.dtype.name for tensor in planned}
        dtype = {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
        write_json(journal.directory / "config.json", {**config.to_hf(), **dtype})


def _write_files(files: Sequence[PlannedFile], file_format: str, stream: Stream) -> None:
    """Write weight files."""
    for file in files:
        specs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in file.tensors]
        with Writer(stream.journal.directory / file.name, specs, file_format) as writer:
            stream.write(writer, file)
        stream.journal.add_file(file.name)


def _write_lists(files: Sequence[PlannedFile], index_name: str | None, total_bytes: int, journal: Journal) -> None:
    """Write the index of the weight files and the manifest."""
    if index_name is not None:
        weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
        write_json(journal.directory / index_name, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    write_json(journal.directory / MANIFEST, manifest(files, journal.written))


def _repack(plan: Plan, directory: Path) -> None:
    """Put the tensors that have been written into an Orbax directory, and take their files away."""
    from convert.io.orbax import write as write_orbax  # needs JAX

    readers = {file.name: Reader.open(directory / file.name) for file in plan.files}
    leaves = {tensor.name: readers[file.name][tensor.name] for file in plan.files for tensor in file.tensors}
    shutil.rmtree(directory / ORBAX, ignore_errors=True)
    write_orbax(directory / ORBAX, leaves)
    for file in plan.files:
        (directory / file.name).unlink()
    if plan.index_name is not None:
        (directory / plan.index_name).unlink()


def _write_config(plan: Plan, checkpoint: Checkpoint, directory: Path) -> None:
    """Copy config.json as it is; a cast changes the one key that names the dtype. Mistral's has params.json too."""
    source = checkpoint.path / "config.json"
    if plan.dtype == "keep" and source.exists():
        shutil.copyfile(source, directory / "config.json")
    else:
        key = "torch_dtype" if "torch_dtype" in checkpoint.raw_config else "dtype"
        dtypes = {tensor.dtype.name for tensor in plan.tensors}
        dtype = {key: dtypes.pop()} if len(dtypes) == 1 else {}
        write_json(directory / "config.json", {**checkpoint.raw_config, **dtype})
    if LAYOUTS[plan.to_layout].native:
        write_json(directory / "params.json", write_params(checkpoint.config))
