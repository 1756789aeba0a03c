"""The planted faults against the gates that other projects put before a port, and against ours.

    python -m benchmarks.gates

Every gate but ours looks at the logits of the whole model, in float32 on two inputs: short, as such gates are used (a
model initialised as transformers does it, one prompt of 16 tokens), and long (weights at the scales of a trained model,
two rows of unequal length, longer than the window); in bfloat16 on the long one. Both end in 15 tokens of torch's own
greedy continuation, so that one forward gives the next 16 tokens. Faults, and controls but for the unchanged port, run
op by op: what is planted is what is computed, and nothing has to be compiled for each. Writes
benchmarks/measured/gates.csv and the tables of docs/tolerances.md.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jax
import numpy as np

from benchmarks import tables
from convert import Checkpoint
from flax_mixtral.config import MixtralConfig
from flax_mixtral.tree import slots
from parity.cast import torch_side
from parity.decoding import continued
from parity.drawn import DEFAULT, draw
from parity.inputs import padded, suite
from parity.metrics import Precision
from parity.port import Port
from parity.result import Result
from parity.selftest.controls import CONTROLS
from parity.selftest.faults import FAULTS
from parity.selftest.planting import planted
from parity.selftest.trials import Court
from parity.sides import Side
from parity.trace import Array

Setting = Literal["short", "long"]
PROMPTS: dict[Setting, tuple[int, ...]] = {"short": (16,), "long": (113, 86)}
TRIED: dict[Precision, tuple[Setting, ...]] = {"float32": ("short", "long"), "bfloat16": ("long",)}
NEW = 16
KL_TOKENS = 4
RECORDINGS = ("hidden-state-after-norm", "points-missing", "traces-do-not-overlap")
"""Faults of what a side records: nothing that a gate on logits could see, or would need."""
MODEL, LAYER = replace(DEFAULT, num_hidden_layers=2, sliding_window=37), 0


@dataclass(frozen=True)
class Logits:
    """Of the real tokens, float64 [R, V], and of the last 16 positions of every row [B, 16, V]."""

    torch_RV: Array
    flax_RV: Array
    torch_BXV: Array
    flax_BXV: Array


def _near(torch: Array, flax: Array, tolerance: float) -> bool:
    return bool(np.allclose(flax, torch, rtol=tolerance, atol=tolerance))


def _softmax(logits: Array) -> Array:
    powers: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def _kl(found: Logits) -> bool:
    torch_RV, flax_RV = (_softmax(x_RV[:KL_TOKENS]) for x_RV in (found.torch_RV, found.flax_RV))
    with np.errstate(divide="ignore", invalid="ignore"):
        kl_R = np.where(torch_RV > 0, torch_RV * (np.log(torch_RV) - np.log(flax_RV)), 0).sum(axis=1)
    near = _near(found.torch_RV[:KL_TOKENS], found.flax_RV[:KL_TOKENS], 0.5)
    return bool(kl_R.max() < 0.015) and near


def _most_elements(found: Logits) -> bool:
    return bool((np.abs(found.flax_RV - found.torch_RV) <= 0.125).mean() >= 0.995)


def _cosine(found: Logits) -> bool:
    torch, flax = found.torch_RV.reshape(-1), found.flax_RV.reshape(-1)
    return bool(torch @ flax / (np.linalg.norm(torch) * np.linalg.norm(flax)) > 0.9999)


def _tokens(found: Logits) -> bool:
    return np.array_equal(found.torch_BXV.argmax(axis=-1), found.flax_BXV.argmax(axis=-1))


GATES: dict[str, Callable[[Logits], bool]] = {
    "KL < 0.015 and 0.5 on 4 tokens": _kl,
    "0.125 or 99.5 % of elements": _most_elements,
    "softmax 1e-4": lambda found: _near(_softmax(found.torch_RV), _softmax(found.flax_RV), 1e-4),
    "logits 1e-4": lambda found: _near(found.torch_RV, found.flax_RV, 1e-4),
    "cosine > 0.9999": _cosine,
    "16 greedy tokens": _tokens,
}
"""Whether a port passes."""

OURS = "ours"


def main() -> None:
    """Measure, store and render."""
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as folder:
        sources: dict[Setting, Checkpoint] = {
            "short": _initialised(MODEL),
            "long": Checkpoint.open(draw(Path(folder) / "drawn")),
        }
        for dtype, settings in TRIED.items():
            for setting in settings:
                started = time.perf_counter()
                for kind, slug, passed in Bench(sources[setting], PROMPTS[setting], dtype).rows():
                    found = {gate: str(not passes) for gate, passes in passed.items()}
                    rows.append({"setting": setting, "dtype": dtype, "kind": kind, "slug": slug, **found})
                print(setting, dtype, f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    tables.store("gates", rows)
    tables.put(tables.TOLERANCES, "gates", render(tables.load("gates")))


def _initialised(config: MixtralConfig) -> Checkpoint:
    """Draw weights as transformers initialises them: N(0, 0.02), norms of one."""
    rng = np.random.default_rng(0)
    leaves = {
        slot.path: np.ones(slot.shape, np.float32)
        if slot.path.endswith(".scale")
        else (config.initializer_range * rng.standard_normal(slot.shape)).astype(np.float32)
        for slot in slots(config)
    }
    return Checkpoint.of_arrays(config, leaves, "initialised")


Passed = Mapping[str, bool]
"""By gate."""


class Bench:
    """One model, one input, one dtype: faults and controls before every gate.

    Args:
        source: the model.
        lengths: real tokens of each row of the prompt.
        dtype: what both sides compute in.
    """

    def __init__(self, source: Checkpoint, lengths: Sequence[int], dtype: Precision):
        self.source, self.dtype = source, dtype
        (drawn, *_) = suite("standard", source.config, 0)
        rows = [ids_T[-length:] for ids_T, length in zip(drawn.input_ids, lengths, strict=False)]
        self.prompt = padded("prompt", rows, source.config, side="left")
        self.torch_BX = torch_side(source, dtype, dtype).generate(self.prompt, NEW)
        self.batch = continued(self.prompt, self.torch_BX[:, :-1])
        self.court = Court(source, [self.batch], dtype)

    def rows(self) -> Iterator[tuple[str, str, Passed]]:
        """Try every control and every fault."""
        scene = self.court.scene(LAYER)
        own = self._run(self.court.torch_side())
        for control in CONTROLS:
            if control.lacks(scene) is not None or control.cached:
                continue
            settings = (control.attention, control.experts, control.threads)
            kept = _Kept(control.change)
            with jax.disable_jit(control.slug != "unchanged"):
                result = self.court.examine(kept.change, *settings, named=False)
                torch = self._run(self.court.torch_side(*settings))
                yield "control", control.slug, self._judge(result, torch, self._run(kept.side))
        for fault in FAULTS:
            if self.dtype not in fault.dtypes or fault.slug in RECORDINGS or fault.lacks(scene) is not None:
                continue
            kept = _Kept(planted(fault, LAYER))
            if fault.place == "cache":
                yield "fault", fault.slug, self._continue(kept)
                continue
            result = self.court.examine(kept.change, named=False)
            yield "fault", fault.slug, self._judge(result, own, self._run(kept.side))

    def _continue(self, kept: "_Kept") -> Passed:
        """Judge a fault of the cache: the logits of a prompt are right, whatever the cache holds."""
        result = self.court.continue_prompts(kept.change)
        equal = np.array_equal(kept.side.generate(self.prompt, NEW), self.torch_BX)
        return {**dict.fromkeys(GATES, True), "16 greedy tokens": equal, OURS: result.verdict == "pass"}

    def _run(self, side: Side) -> Array:
        """Give the logits of the whole model, each side by itself."""
        x_BTD = side.embed(self.batch)
        for layer in range(self.source.config.num_hidden_layers):
            x_BTD = side.block(layer, x_BTD, self.batch)["resid_out"]
        logits_BTV: Array = side.head(x_BTD, self.batch)["logits"].astype(np.float64)
        return logits_BTV

    def _judge(self, result: Result, torch_BTV: Array, flax_BTV: Array) -> Passed:
        real_BT = self.batch.real_BT
        found = Logits(torch_BTV[real_BT], flax_BTV[real_BT], torch_BTV[:, -NEW:], flax_BTV[:, -NEW:])
        return {**{name: passes(found) for name, passes in GATES.items()}, OURS: result.verdict == "pass"}


class _Kept:
    """A change to a port whose side is kept after it was built."""

    def __init__(self, change: Callable[[Port], Port]):
        self._change = change
        self.side: Any = None

    def change(self, port: Port) -> Port:
        changed = self._change(port)

        def build(config: MixtralConfig, weights: Mapping[str, Array]) -> Any:
            self.side = changed.side(config, weights)
            return self.side

        return replace(changed, side=build)


def render(rows: Sequence[Mapping[str, str]]) -> str:
    """Lay the tables of docs/tolerances.md out."""
    return "\n\n".join(_table(dtype, [row for row in rows if row["dtype"] == dtype]) for dtype in TRIED)


def _table(dtype: Precision, rows: Sequence[Mapping[str, str]]) -> str:
    gates = [*GATES, OURS]
    by_key = {(row["setting"], row["kind"], row["slug"]): row for row in rows}
    faults = dict.fromkeys(row["slug"] for row in rows if row["kind"] == "fault")

    def stops(slug: str, gate: str) -> str:
        """Say on which inputs a gate stops a fault."""
        tried = {setting: by_key.get((setting, "fault", slug)) for setting in TRIED[dtype]}
        found = [setting for setting, row in tried.items() if row is not None and row[gate] == "True"]
        return "both" if len(found) == 2 else " ".join(found) or "-"

    def count(kind: str, gate: str | None = None) -> str:
        """Count what a gate stops on each input; without a gate, what was tried."""
        of = [[row for row in rows if (row["setting"], row["kind"]) == (setting, kind)] for setting in TRIED[dtype]]
        return " / ".join(str(len([row for row in own if gate is None or row[gate] == "True"])) for own in of)

    lines = [[f"`{slug}`", *(stops(slug, gate) for gate in gates)] for slug in faults]
    inputs = " / ".join(TRIED[dtype])
    lines.append([f"**found**, {inputs}, of {count('fault')}", *(count("fault", gate) for gate in gates)])
    accused = [f"**correct variants rejected**, of {count('control')}", *(count("control", gate) for gate in gates)]
    return tables.markdown([f"in {dtype}", *gates], [*lines, accused])


if __name__ == "__main__":
    main()
