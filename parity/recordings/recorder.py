"""Record one side of a walk, for a comparison elsewhere or later; and say beforehand how large that will be."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from convert import BadInput, Checkpoint
from flax_mixtral.axes import axis_sizes
from flax_mixtral.config import MixtralConfig
from parity.cast import WALKS, flax_side, oracle_side, recorded_side, torch_side
from parity.inputs import Suite, suite
from parity.memory import too_large
from parity.metrics import Precision
from parity.points import Point, block_points, head_points, operation_points
from parity.port import FlaxFactory, Port
from parity.provenance import environment, provenance
from parity.read_ahead import ReadAhead
from parity.recordings.detail import ALL, WHOLE, Detail
from parity.recordings.recording import Manifest, Recording
from parity.sides.offered import Nothing
from parity.sides.remembering import Remembering
from parity.steps import Progress, Steps
from parity.trace import Batch
from parity.walk import Sides, Walk
from parity.weights import hash_leaves

__all__ = ["Part", "estimate_bytes", "record"]

Part = Literal["torch", "flax", "oracle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be recorded: fixed by the reference, where there is one."""

    part: Part
    source: Checkpoint
    port: Port
    batches: Sequence[Batch]
    dtype: Precision
    layers: range
    detail: Detail
    seed: int
    reference: Recording | None

    def side(self, walk_dtype: Precision) -> Any:
        """Build the side that is recorded."""
        if self.part == "torch":
            return torch_side(self.source, self.dtype, walk_dtype)
        if self.part == "flax":
            return flax_side(self.port, self.dtype, walk_dtype)
        return oracle_side(self.source, self.dtype)

    def manifest(self, hashes: Mapping[str, str]) -> Manifest:
        """Describe the recording, before anything is in it."""
        return Manifest(
            side=self.part,
            config=self.source.config.to_hf(),
            dtype=self.dtype,
            layers=(self.layers.start, self.layers.stop),
            detail=self.detail,
            reference=self.reference.manifest.fingerprint if self.reference else None,
            batches=[batch.name for batch in self.batches],
            seed=self.seed,
            environment=environment(),
            provenance=provenance(self.source.path, None, self.batches, self.seed, hashes),
        )


def record(
    checkpoint: str | Path,
    out: str | Path,
    part: Part,
    *,
    dtype: Precision = "float32",
    inputs: Suite | Sequence[Batch] = "standard",
    seed: int = 0,
    layers: range | None = None,
    detail: Detail = ALL,
    reference: str | Path | None = None,
    side: FlaxFactory | None = None,
    resume: bool = False,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda step, done, total: None,
) -> Recording:
    """Walk one side alone and write what it answers, call by call.

    Args:
        checkpoint: a Mixtral checkpoint of any layout.
        out: the directory to make.
        part: whose part is played: torch's, Flax's or the oracle's.
        dtype: of the run that it is made for; a bfloat16 recording has the float32 walk, too.
        inputs: a suite's name, or batches.
        seed: of the suite's token ids.
        layers: the blocks to record; the others are run where they come before these, and not kept.
        detail: how much is kept of each point.
        reference: torch's recording: Flax and the oracle are then recorded on torch's own input as well, and dtype,
            inputs, seed, layers and detail are those of the reference. Without it only their own streams are.
        side: builds what is tested in place of flax_mixtral.
        resume: go on with a recording that was interrupted, or that holds the layers before these.
        announce: called with what the recording will take, before it begins.
        progress: called before each step.

    Raises:
        BadInput: out exists, or is no part of the same recording; the disk is too small.
    """
    source, out = Checkpoint.open(checkpoint), Path(out)
    torch = Recording.open(reference) if reference is not None else None
    whole = range(source.config.num_hidden_layers)
    batches = suite(inputs, source.config, seed) if isinstance(inputs, str) else list(inputs)
    job = Job(
        part=part,
        source=source,
        port=Port(source.config, source.view("flax"), *([side] if side else [])),
        batches=torch.batches if torch else batches,
        dtype=torch.manifest.dtype if torch else dtype,
        layers=torch.layers if torch else layers or whole,
        detail=torch.manifest.detail if torch else detail,
        seed=torch.manifest.seed if torch else seed,
        reference=torch,
    )
    if job.layers.start < 0 or job.layers.stop > whole.stop or not job.layers:
        raise BadInput(f"layers {job.layers.start}:{job.layers.stop} are not there: the model has {whole.stop}")
    announce(_check_destination(job, out, resume))
    leaves, steps = source.view("flax"), Steps(progress, 0)
    steps.total = len(leaves) + len(WALKS[job.dtype]) * (job.layers.stop + 3)
    manifest = job.manifest(hash_leaves(leaves, steps.advance))
    begun = resume and out.exists() and not Recording.is_empty(out)
    recording = _resumed(out, manifest) if begun else Recording.create(out, manifest, job.batches)
    return _walk(replace(job, layers=recording.layers), recording, steps)


def _walk(job: Job, recording: Recording, steps: Steps) -> Recording:
    """Run the walk with one live side: what there is nothing to compare with is not judged."""
    not_whole = {}
    with ReadAhead([job.source.view("flax")]) as read_ahead:
        for dtype in WALKS[job.dtype]:
            live = Remembering(job.side(dtype), recording.answers(dtype))
            torch = recorded_side(job.reference, dtype) if job.reference else Nothing("torch")
            sides = {"torch": torch, "flax": Nothing("flax"), "oracle": Nothing("oracle"), job.part: live}
            walk = Walk(
                job.source.config,
                Sides(**sides),
                job.batches,
                dtype=dtype,
                layers=job.layers,
                detail=job.detail,
                advance=steps.advance,
                read_ahead=read_ahead,
            )
            for _ in walk.run():
                pass  # the findings are those of a comparison with nothing
            steps.advance("whole model")
            if dtype == job.dtype and job.part != "oracle" and job.layers == range(job.source.config.num_hidden_layers):
                reason = too_large(job.source.config, dtype)
                if reason is not None:
                    not_whole[dtype] = reason
                for batch in job.batches if reason is None else ():
                    live.whole(batch)
    return recording.continued(complete=True, whole=not_whole)


def _check_destination(job: Job, out: Path, resume: bool) -> str:
    """Refuse to write over anything, or onto a disk that is too small; say what it will take."""
    if out.exists() and not resume:
        raise BadInput(f"{out}: exists already; choose another directory, or --resume a recording that was interrupted")
    needed = estimate_bytes(job.source.config, job.batches, job.dtype, job.layers, job.detail, job.part)
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed > free and not resume:
        raise BadInput(
            f"{out}: the recording will take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; record "
            "fewer tokens (--tokens), in less precision (--precision bfloat16) or fewer layers (--layers)"
        )
    return f"{out}: about {needed / 1e6:,.0f} MB, of {free / 1e9:,.1f} GB that are free"


def _resumed(out: Path, wanted: Manifest) -> Recording:
    """Open what there is, and refuse to go on with something else."""
    recording = Recording.open(out)
    there = recording.manifest
    differs = [
        name
        for name in ("side", "config", "dtype", "detail", "reference", "batches", "seed")
        if getattr(there, name) != getattr(wanted, name)
    ]
    differs += [] if there.fingerprint == wanted.fingerprint else ["weights, inputs or versions"]
    if differs:
        raise BadInput(f"{out}: recorded with another {', another '.join(differs)}: it cannot be resumed with this one")
    first, last = there.layers
    if not first <= wanted.layers[0] <= last:
        raise BadInput(
            f"{out}: holds layers {first}:{last}; layers {wanted.layers[0]}:{wanted.layers[1]} do not follow"
        )
    return recording.continued(layers=(first, max(last, wanted.layers[1])), complete=False)


def estimate_bytes(
    config: MixtralConfig, batches: Sequence[Batch], dtype: Precision, layers: range, detail: Detail, part: Part
) -> int:
    """Say how large a recording will be, from the table of points; rerouted blocks come on top."""
    total = 0
    for walk_dtype in WALKS[dtype]:
        width = 8 if part == "oracle" else 2 if walk_dtype == "bfloat16" else 4
        for batch in batches:
            sizes = _Sizes(config, batch, detail)
            operations = sum(sizes.bytes_of(name, point, width) for name, point in operation_points(config))
            block = sum(sizes.bytes_of(name, point, width) for name, point in block_points(config))
            if walk_dtype == "bfloat16" and part == "torch":
                inside = (pair for pair in operation_points(config) if pair[1].place == "operation")
                block += sum(sizes.bytes_of(name, point, width) for name, point in inside)
            head = sum(sizes.bytes_of(name, point, width) for name, point in head_points(config))
            alone = operations if walk_dtype == "bfloat16" and part != "torch" and detail == ALL else 0
            streams = 1 if part == "torch" else 2
            total += len(layers) * (streams * block + alone) + 2 * head
    return total


class _Sizes:
    """How many bytes a point of one batch takes."""

    def __init__(self, config: MixtralConfig, batch: Batch, detail: Detail):
        B, T = batch.input_ids.shape
        E, A, real = config.num_local_experts, config.num_experts_per_tok, int(batch.real_M.sum())
        self._axes = {**axis_sizes(config), "B": B, "T": T, "S": T, "M": B * T, "R": -(-real * A // E)}
        self._real, self._detail = real, detail

    def bytes_of(self, name: str, point: Point, width: int) -> int:
        """Give a point's bytes, thinned and rounded as the detail says."""
        axes = dict(self._axes)
        if name not in WHOLE and self._detail.tokens is not None:
            axes |= {"B": 1, "T": min(self._detail.tokens, self._real), "R": min(self._detail.tokens, axes["R"])}
        rounded = self._detail.bfloat16 and name not in WHOLE
        count: int = math.prod(axes[letter] for letter in point.axes.split())
        return count * (max(width // 2, 2) if rounded else width)
