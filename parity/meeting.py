"""Several processes walk one model, each a range of its layers, and meet in a directory: the last one has the result.

No process waits for another one. Each takes every side's stream past the layers before its own without comparing them,
so that what it finds in its own is what a walk through all of them finds there.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import TextIOBase
from pathlib import Path
from typing import Any

from convert import BadInput, Checkpoint
from convert.share import Share
from flax_mixtral.tree import slots
from parity.cast import WALKS
from parity.comparison import Outcome
from parity.diagnosis.cause import Cause
from parity.drift import Drift, WorstToken
from parity.metrics import Precision
from parity.router import Flip, LayerRouting
from parity.sides.timed import Cost
from parity.verdict import Finding
from parity.weights import Difference

__all__ = ["Meeting", "Part", "meeting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one process found, or all of them.

    Args:
        outcome: of its layers.
        hashes: SHA-256 of the leaves that it compared.
        differences: of configuration, and of those leaves.
        causes: what explains its first suspect.
        suspected: which walk that suspect is of; None without one.
        cache_causes: what explains a cache that failed.
    """

    outcome: Outcome
    hashes: Mapping[str, str]
    differences: Sequence[Difference]
    causes: Sequence[Cause]
    suspected: Precision | None
    cache_causes: Sequence[Cause]


@dataclass(slots=True)
class Meeting:
    """Where the processes of one run put what they found.

    Args:
        folder: the directory, the same for all of them.
        share: this process's.
        lock: a file in it.
        missing: the shares that had no part of this run there when this process ended; None before that.
    """

    folder: Path
    share: Share
    lock: TextIOBase
    missing: Sequence[int] | None = None

    def layers(self, count: int) -> range:
        """Give this process's range of a model's layers.

        Raises:
            BadInput: there are more processes than layers.
        """
        if self.share.count > count:
            raise BadInput(f"share {self.share}: the model has {count} layers; take at most as many shares")
        return range(*(count * ended // self.share.count for ended in (self.share.number - 1, self.share.number)))

    def leaves(self, checkpoint: Checkpoint) -> list[str]:
        """List the leaves of this process's layers; the first process also has those outside of layers."""
        layers, outside = self.layers(checkpoint.config.num_hidden_layers), self.share.number == 1
        return [s.path for s in slots(checkpoint.config) if (outside if s.layer is None else s.layer in layers)]

    def hand_in(self, run: Sequence[Any], part: Part) -> Part:
        """Put this process's part down; give all parts in one if they are there, else this one as it is.

        Of processes that end at once, one after the other looks.

        Args:
            run: everything that a part depends on, as JSON; parts of another run count as missing.
            part: this process's.
        """
        identity = hashlib.sha256(json.dumps([*run, self.share.count], sort_keys=True).encode()).hexdigest()
        begun = self._path(self.share.number).with_suffix(".begun")
        begun.write_text(json.dumps({"run": identity, **_to_json(part)}))
        begun.replace(self._path(self.share.number))
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        numbers = range(1, self.share.count + 1)
        parts = {number: _read(self._path(number), identity) for number in numbers}
        self.missing = [number for number in numbers if parts[number] is None]
        if self.missing:
            fcntl.flock(self.lock, fcntl.LOCK_UN)
            return part
        return _merged([found for found in parts.values() if found is not None])

    def notes(self) -> list[str]:
        """Say what is still missing."""
        if not self.missing:
            return []
        shares = ", ".join(f"{number}/{self.share.count}" for number in self.missing)
        return [f"share {self.share} alone: the last share to end has the result of all; still missing: {shares}"]

    def _path(self, number: int) -> Path:
        return self.folder / f"{Share(number, self.share.count).stem}.json"


@contextmanager
def meeting(folder: Path, share: Share) -> Iterator[Meeting]:
    """Open a meeting; within it, the process that has the result of all is the only one to write it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        yield Meeting(folder, share, lock)


def _merged(parts: Sequence[Part]) -> Part:
    """Put parts into the order of a single walk: one dtype after the other, each from the first layer to the last."""
    walks = list(WALKS["bfloat16"])

    def in_order(items: list[Any], dtype: Any) -> list[Any]:
        return sorted(items, key=lambda item: walks.index(dtype(item)))

    outcomes = [part.outcome for part in parts]
    costs = [(name, cost) for outcome in outcomes for name, cost in outcome.cost.items()]
    routing = [pair for outcome in outcomes for pair in outcome.routing.items()]
    suspects = in_order([part for part in parts if part.suspected], lambda part: part.suspected)
    return Part(
        outcome=Outcome(
            in_order([finding for outcome in outcomes for finding in outcome.findings], lambda f: f.dtype),
            dict(in_order(routing, lambda pair: pair[0][-1])),
            in_order([drift for outcome in outcomes for drift in outcome.drift], lambda d: d.dtype),
            {side: sum((cost for name, cost in costs if name == side), Cost()) for side, _ in costs},
        ),
        hashes={name: value for part in parts for name, value in part.hashes.items()},
        differences=list(dict.fromkeys(difference for part in parts for difference in part.differences)),
        causes=suspects[0].causes if suspects else [],
        suspected=suspects[0].suspected if suspects else None,
        cache_causes=[cause for part in parts for cause in part.cache_causes],
    )


def _to_json(part: Part) -> dict[str, Any]:
    outcome = part.outcome
    return {
        "findings": [asdict(finding) for finding in outcome.findings],
        "routing": [[key, asdict(routing)] for key, routing in outcome.routing.items()],
        "drift": [asdict(drift) for drift in outcome.drift],
        "cost": {side: asdict(cost) for side, cost in outcome.cost.items()},
        "hashes": dict(part.hashes),
        "differences": [asdict(difference) for difference in part.differences],
        "causes": [asdict(cause) for cause in part.causes],
        "suspected": part.suspected,
        "cache_causes": [asdict(cause) for cause in part.cache_causes],
    }


def _read(path: Path, identity: str) -> Part | None:
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path}: damaged ({error}); remove it and start share {path.stem} again") from error
    if raw["run"] != identity:
        return None
    return Part(
        outcome=Outcome(
            [Finding(**row) for row in raw["findings"]],
            {tuple(key): _routing(row) for key, row in raw["routing"]},
            [Drift(**{**row, "worst": tuple(WorstToken(**token) for token in row["worst"])}) for row in raw["drift"]],
            {side: Cost(**cost) for side, cost in raw["cost"].items()},
        ),
        hashes=raw["hashes"],
        differences=[Difference(**row) for row in raw["differences"]],
        causes=[Cause(**row) for row in raw["causes"]],
        suspected=raw["suspected"],
        cache_causes=[Cause(**row) for row in raw["cache_causes"]],
    )


def _routing(row: dict[str, Any]) -> LayerRouting:
    flips = tuple(
        Flip(**{**flip, "torch_ids": tuple(flip["torch_ids"]), "flax_ids": tuple(flip["flax_ids"])})
        for flip in row["flips"]
    )
    return LayerRouting(**{**row, "flips": flips, "load": tuple(row["load"]), "misbroken": tuple(row["misbroken"])})
