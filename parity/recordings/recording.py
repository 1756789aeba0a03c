"""A recording: what one side answered in a walk, on disk as safetensors, written as the walk goes.

`manifest.json` says whose answers they are and on what; `inputs.safetensors` holds the token ids; each line of
`answers.jsonl` names one call and the file with its arrays. Readable without torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import BadInput
from convert.io.json_strict import read_object
from convert.io.safetensors import Reader, Writer
from flax_mixtral.config import MixtralConfig
from parity.metrics import Precision
from parity.recordings.detail import ALL, WHOLE, Detail
from parity.sides.remembering import Answers, Call
from parity.trace import Array, Batch, Trace

__all__ = ["FORMAT", "Manifest", "Recording"]

FORMAT = 1
MANIFEST, INPUTS, INDEX = "manifest.json", "inputs.safetensors", "answers.jsonl"
BEGUN = ".begun"
"""Ends the name of a file until it is whole."""

IDS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a recording holds.

    Args:
        side: whose answers: torch, flax or oracle.
        config: the model's, as config.json.
        dtype: of the run that it was made for; a bfloat16 recording holds the float32 walk, too.
        layers: the first block and the one after the last.
        detail: how much is kept of each point.
        reference: the fingerprint of the torch recording that it goes with; None for torch itself, or without one.
        batches: the names of the inputs, in order.
        seed: of the suite's token ids.
        whole: why the model was not run whole, by dtype; empty where it was.
        environment: versions and machine.
        provenance: checkpoint and the SHA-256 of every leaf.
        complete: whether the walk came to its end.
    """

    side: str
    config: Mapping[str, Any]
    dtype: Precision
    layers: tuple[int, int]
    detail: Detail
    reference: str | None
    batches: Sequence[str]
    seed: int
    environment: Mapping[str, Any]
    provenance: Mapping[str, Any]
    whole: Mapping[str, str] = field(default_factory=dict)
    complete: bool = False

    @property
    def fingerprint(self) -> str:
        """Identify what a walk on the other sides depends on: the answers must not come from another model or input."""
        fixed = [self.side, dict(self.config), self.dtype, asdict(self.detail), self.provenance["inputs"]]
        fixed += [self.provenance["weights_sha256"], self.environment["packages"]]
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Put it in place at once."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        _replace(folder / MANIFEST, text.encode())


@dataclass(frozen=True)
class Recording:
    """A recording's directory. `answers(dtype)` are the answers of one walk, to be read and added to."""

    path: Path
    manifest: Manifest
    batches: Sequence[Batch]

    @classmethod
    def create(cls, path: Path, manifest: Manifest, batches: Sequence[Batch]) -> "Recording":
        """Begin a recording in a new directory, or in one where that was interrupted."""
        path.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{number}.{name}": getattr(batch, name)
            for number, batch in enumerate(batches)
            for name in IDS
            if getattr(batch, name) is not None
        }
        _write(path / INPUTS, arrays)
        manifest.write(path)
        return cls(path, manifest, batches)

    @staticmethod
    def is_empty(path: Path) -> bool:
        """Say whether a directory holds no more than `create` puts there before it ends."""
        names = {file.name.removesuffix(BEGUN) for file in path.iterdir()} if path.is_dir() else {path.name}
        return names <= {INPUTS, MANIFEST} and not (path / MANIFEST).exists()

    @classmethod
    def open(cls, path: str | Path) -> "Recording":
        """Open a recording, whole or begun.

        Raises:
            BadInput: it is none, or of another format.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise BadInput(f"{path}: no recording: it has no {MANIFEST}; mixtral-parity record makes one")
        raw = read_object(path / MANIFEST)
        if raw.pop("format", None) != FORMAT:
            raise BadInput(f"{path / MANIFEST}: expected format {FORMAT}; record it again with this version")
        try:
            manifest = Manifest(**{**raw, "detail": Detail(**raw["detail"]), "layers": tuple(raw["layers"])})
            MixtralConfig.from_hf(manifest.config)
        except (KeyError, TypeError) as error:
            raise BadInput(f"{path / MANIFEST}: not what this version writes: {error}") from error
        reader = Reader.open(path / INPUTS)
        batches = [
            Batch(name, **{ids: reader[key] for ids in IDS if (key := f"{number}.{ids}") in reader.headers})
            for number, name in enumerate(manifest.batches)
        ]
        return cls(path, manifest, batches)

    def continued(self, **changes: Any) -> "Recording":
        """Change the manifest, on disk as well."""
        manifest = replace(self.manifest, **changes)
        manifest.write(self.path)
        return Recording(self.path, manifest, self.batches)

    @property
    def config(self) -> MixtralConfig:
        """The model's."""
        return MixtralConfig.from_hf(dict(self.manifest.config))

    @property
    def layers(self) -> range:
        """The blocks that it holds, or is to hold."""
        return range(*self.manifest.layers)

    def answers(self, dtype: Precision) -> Answers:
        """Give the answers of the walk in one dtype."""
        return _Answers(self, dtype)


class _Answers(Answers):
    """One walk's part of a recording."""

    def __init__(self, recording: Recording, dtype: Precision):
        self._recording, self._dtype = recording, dtype
        self._batches = {batch.name: (number, batch) for number, batch in enumerate(recording.batches)}
        self._lines = {call: line for call, line in _index(recording.path) if line["walk"] == dtype}

    def __getitem__(self, call: Call) -> Trace:
        line = self._lines[call]
        path = self._recording.path / line["file"]
        try:
            intact = _sha256(path) == line["sha256"]
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}; the recording is damaged") from error
        if not intact:
            raise BadInput(f"{path}: its SHA-256 is not the recorded one; the recording is damaged")
        reader = Reader.open(path)
        arrays = {name: reader[name].astype(_named(dtype), copy=False) for name, dtype in line["dtypes"].items()}
        rows = {int(name.split(".")[1]): reader[name] for name in reader.headers if name.startswith("rows.")}
        return Trace(arrays, rows, line["thinned"])

    def __setitem__(self, call: Call, trace: Trace) -> None:
        if call.layer is not None and call.layer not in self._recording.layers:
            return
        number, batch = self._batches[call.batch]
        lens = call.kind == "head" and call.layer not in (None, self._recording.config.num_hidden_layers - 1)
        detail = self._recording.manifest.detail if lens or call.kind == "block" else ALL
        kept, folder = _kept(trace, batch, detail, lens), f"{self._dtype}/batch-{number}"
        if self._dtype == "float32":  # single operations are compared in bfloat16 alone
            kept = replace(
                kept, arrays={n: a for n, a in kept.arrays.items() if n not in ("attn_scores", "attn_probs")}
            )
        stem = call.kind if call.layer is None else f"{call.kind}-{call.layer:03d}"
        same = sum(other[:3] == call[:3] for other in self._lines)
        file = f"{folder}/{stem}{f'.{same + 1}' if same else ''}.safetensors"
        (self._recording.path / folder).mkdir(parents=True, exist_ok=True)
        rows = {f"rows.{expert}": held for expert, held in kept.rows.items()}
        _write(self._recording.path / file, {**_rounded(kept, detail, lens), **rows})
        line = {
            "walk": self._dtype,
            **call._asdict(),
            "file": file,
            "sha256": _sha256(self._recording.path / file),
            "dtypes": {name: array.dtype.name for name, array in kept.arrays.items()},
            "thinned": kept.thinned,
        }
        with (self._recording.path / INDEX).open("a+") as index:
            index.write("\n" + json.dumps(line))  # the break first: an interruption may have torn the last line
            index.flush()
            os.fsync(index.fileno())
        self._lines[call] = line

    def __delitem__(self, call: Call) -> None:
        raise TypeError("a recording keeps what it has")

    def __iter__(self) -> Iterator[Call]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


def _kept(trace: Trace, batch: Batch, detail: Detail, lens: bool) -> Trace:
    """Take what the detail asks for; of the head under a block's output, the logits are that block's lens."""
    if not lens:
        return detail.thin(trace, batch)
    if "logits" not in trace.arrays:
        return Trace()
    found = detail.thin(Trace({"lens": trace["logits"]}), batch)
    return Trace({"logits": found["lens"]}, thinned=found.thinned)


def _rounded(kept: Trace, detail: Detail, lens: bool) -> dict[str, Array]:
    """Round as the detail says; the exact answer to float32, so that it stays the better one."""
    if not detail.bfloat16:
        return kept.arrays
    narrow = {np.dtype(np.float64): np.dtype(np.float32), np.dtype(np.float32): np.dtype(ml_dtypes.bfloat16)}
    return {
        name: array if name in WHOLE and not lens else array.astype(narrow.get(array.dtype, array.dtype), copy=False)
        for name, array in kept.arrays.items()
    }


def _index(path: Path) -> Iterator[tuple[Call, dict[str, Any]]]:
    """Read the calls that were answered; a last line that an interruption tore is as good as none."""
    if not (path / INDEX).exists():
        return
    for line in (path / INDEX).read_text().splitlines():
        try:
            entry = json.loads(line)
            yield Call(entry["kind"], entry["layer"], entry["batch"], tuple(entry["inputs"])), entry
        except (ValueError, KeyError):
            continue


def _write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write a safetensors file; it is there whole or not at all."""
    begun = path.with_name(path.name + BEGUN)
    begun.unlink(missing_ok=True)
    with Writer(begun, [(name, array.dtype, array.shape) for name, array in arrays.items()], "np") as writer:
        for name, array in arrays.items():
            writer.write(name, 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    begun.replace(path)


def _replace(path: Path, content: bytes) -> None:
    begun = path.with_name(path.name + BEGUN)
    begun.write_bytes(content)
    begun.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(dtype: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
