"""Margins of an earlier run, and the ones that have grown since by more than their measured noise.

Two correct implementations differ by rounding, and so do their margins: `measure_noise` says by how much, from benign
variants of the Flax side on the same inputs. A margin that grows beyond that has a cause, also where it still passes.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from convert import BadInput
from parity.metrics import Precision
from parity.points import kind_of
from parity.verdict import Finding, Mode

__all__ = ["Baseline", "BaselineDiff", "Key", "Kind", "Regression"]

BASELINE_VERSION = 1


class Key(NamedTuple):
    """What tells one comparison from the others of a run."""

    layer: int | None
    point: str
    mode: Mode
    batch: str
    dtype: Precision

    @property
    def kind(self) -> "Kind":
        """What remains without the layer, the expert and the batch."""
        return kind_of(self.point), self.mode, self.dtype


Kind = tuple[str, Mode, Precision]
"""A point without its layer, expert and batch: noise is measured over all of these."""


@dataclass(frozen=True, slots=True)
class Regression:
    """A margin that has grown, or is gone.

    Args:
        layer: 0-based; None outside the blocks.
        point: the comparison point.
        mode: how Flax came by its input.
        batch: the batch's name.
        dtype: what both sides computed in.
        was: the margin in the baseline.
        now: the margin of this run; None where there is none any more.
        allowed: the largest that noise explains.
    """

    layer: int | None
    point: str
    mode: Mode
    batch: str
    dtype: Precision
    was: float
    now: float | None
    allowed: float

    def __str__(self) -> str:
        where = self.point if self.layer is None else f"layer {self.layer}, {self.point}"
        now = "not compared any more" if self.now is None else f"{self.was:.3g} -> {self.now:.3g}"
        return f"{where} ({self.mode}, {self.batch}, {self.dtype}): {now}; noise explains {self.allowed:.3g}"


@dataclass(frozen=True, slots=True)
class BaselineDiff:
    """A run beside its baseline.

    Args:
        path: the baseline's file.
        compared: how many margins both have.
        regressions: by layer and point, in the order of computation.
        changed: what is installed in another version: name to (then, now).
    """

    path: str
    compared: int
    regressions: Sequence[Regression]
    changed: Mapping[str, tuple[str | None, str | None]]

    @property
    def failed(self) -> bool:
        """Whether any margin has grown beyond noise, or is gone."""
        return bool(self.regressions)

    @property
    def lines(self) -> list[str]:
        """The diff, a line for each point."""
        return [str(regression) for regression in self.regressions]

    @property
    def changes(self) -> list[str]:
        """What is installed in another version, a line for each package."""
        return [
            f"{name}: {was or 'not installed'} -> {now or 'not installed'}" for name, (was, now) in self.changed.items()
        ]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a baseline's file holds.

    Args:
        dtype: of the run.
        config_sha256: of the checkpoint's config.json.
        inputs: SHA-256 of each batch's ids, by name.
        versions: of what was installed.
        margins: of every comparison that decides.
        noise: for each kind of point, the largest ratio between two benign margins at one place.
    """

    dtype: Precision
    config_sha256: str
    inputs: Mapping[str, str]
    versions: Mapping[str, str | None]
    margins: Mapping[Key, float]
    noise: Mapping[Kind, float]

    @classmethod
    def of(
        cls,
        dtype: Precision,
        findings: Sequence[Finding],
        benign: Sequence[Sequence[Finding]],
        versions: Mapping[str, str | None],
        provenance: Mapping[str, Any],
    ) -> "Baseline":
        """Make the baseline of a run.

        Args:
            dtype: of the run.
            findings: of the run.
            benign: findings of correct variants of Flax on the same inputs.
            versions: of what is installed, by package.
            provenance: of the run.
        """
        margins = _margins(findings)
        return cls(
            dtype,
            provenance["config_sha256"],
            _input_hashes(provenance),
            versions,
            margins,
            measure_noise([margins, *map(_margins, benign)]),
        )

    @classmethod
    def read(cls, path: Path) -> "Baseline":
        """Read a file that `write` wrote.

        Raises:
            BadInput: it cannot be read, or is no baseline of this version.
        """
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read the baseline {path}: {error}") from error
        version = content.get("baseline_version") if isinstance(content, dict) else None
        if version != BASELINE_VERSION:
            raise BadInput(
                f"{path}: expected a baseline of version {BASELINE_VERSION}, got {version}; "
                "delete the file and run again to write a new one"
            )
        try:
            return cls(
                content["dtype"],
                content["config_sha256"],
                content["inputs"],
                content["versions"],
                {Key(*row[:-1]): float(row[-1]) for row in content["margins"]},
                {(row[0], row[1], row[2]): float(row[3]) for row in content["noise"]},
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BadInput(f"{path}: is no baseline: {error!r}; delete the file and run again") from error

    def write(self, path: Path) -> None:
        """Write the file, one comparison on a line, so that a diff of two of them can be read."""
        margins = ",\n".join(f"  {json.dumps([*key, _rounded(margin)])}" for key, margin in self.margins.items())
        noise = ",\n".join(f"  {json.dumps([*kind, _rounded(ratio)])}" for kind, ratio in self.noise.items())
        head = {
            "baseline_version": BASELINE_VERSION,
            "dtype": self.dtype,
            "config_sha256": self.config_sha256,
            "inputs": dict(self.inputs),
            "versions": dict(self.versions),
        }
        text = json.dumps(head, indent=1)[:-2] + f',\n "noise": [\n{noise}\n ],\n "margins": [\n{margins}\n ]\n}}\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def compare(
        self,
        path: Path,
        dtype: Precision,
        findings: Sequence[Finding],
        versions: Mapping[str, str | None],
        provenance: Mapping[str, Any],
    ) -> BaselineDiff:
        """Hold a run against the baseline.

        Raises:
            BadInput: the run is of another model, other inputs or another dtype.
        """
        self._refuse_others(path, dtype, provenance)
        now = _margins(findings)
        changed = {
            name: (self.versions.get(name), versions.get(name))
            for name in sorted({*self.versions, *versions})
            if self.versions.get(name) != versions.get(name)
        }
        compared = sum(key in now for key in self.margins)
        return BaselineDiff(str(path), compared, list(self._regressions(now)), changed)

    def _regressions(self, now: Mapping[Key, float]) -> Iterator[Regression]:
        for key, was in self.margins.items():
            allowed = max(was, NEGLIGIBLE) * self.noise.get(key.kind, 1.0)
            margin = now.get(key)
            if margin is None or not margin <= allowed * (1 + ROUNDED):
                yield Regression(*key, was, margin, allowed)

    def _refuse_others(self, path: Path, dtype: Precision, provenance: Mapping[str, Any]) -> None:
        others = [
            f"  - {what}: the baseline has {was}, this run {now}"
            for what, was, now in (
                ("dtype", self.dtype, dtype),
                ("config.json's SHA-256", self.config_sha256, provenance["config_sha256"]),
                ("inputs", dict(self.inputs), _input_hashes(provenance)),
            )
            if was != now
        ]
        if others:
            listed = "\n".join(others)
            raise BadInput(
                f"{path} is the baseline of another comparison:\n{listed}\nName another file with --baseline"
            )


ROUNDED = 1e-5
"""Margins are written with six digits."""

NEGLIGIBLE = 0.1
"""Margins below a tenth of torch's error, zero among them, count as that: their ratios say nothing."""


def measure_noise(runs: Sequence[Mapping[Key, float]]) -> dict[Kind, float]:
    """Give for each kind of point the largest ratio between two runs' margins at the same place.

    Args:
        runs: the margins of equally correct runs.
    """
    noise: dict[Kind, float] = {}
    for key in runs[0]:
        margins = [max(run[key], NEGLIGIBLE) for run in runs if key in run]
        ratio = max(margins) / min(margins)
        noise[key.kind] = max(noise.get(key.kind, 1.0), ratio)
    return noise


def _margins(findings: Sequence[Finding]) -> dict[Key, float]:
    return {
        Key(f.layer, f.point, f.mode, f.batch, f.dtype): f.margin
        for f in findings
        if f.margin is not None and f.decides and math.isfinite(f.margin)
    }


def _input_hashes(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {each["name"]: each["input_ids_sha256"] for each in provenance["inputs"]}


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")
