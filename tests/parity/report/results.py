"""Results written by hand, one of each kind, whose reports are the same on every machine."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from parity.baseline import BaselineDiff, Regression
from parity.diagnosis.cause import Cause
from parity.drift import Drift, WorstToken
from parity.metrics import Precision
from parity.result import Result
from parity.router import Flip, LayerRouting
from parity.sides.timed import Cost
from parity.verdict import Finding, Mode, Verdict

__all__ = ["CRASH", "FAIL", "PASS", "RESULTS", "UNCHECKED", "finding", "findings", "large"]

BLOCK = (
    "input_norm q attn_context resid_mid router_logits router_ids expert.0.gate expert.1.down resid_out lens".split()
)

ENVIRONMENT = {
    "packages": {"flax-mixtral": "0.1.0", "jax": "0.10.2", "torch": "2.13.0"},
    "python": "3.11.9",
    "platform": "Linux-6.1-x86_64",
    "machine": "x86_64",
    "cpus": 2,
}

PROVENANCE: dict[str, Any] = {
    "command": ["/bin/mixtral-parity", "run", "the model/", "--report", "report/"],
    "torch_checkpoint": "the model/",
    "flax_checkpoint": None,
    "config_sha256": "a" * 64,
    "weights_sha256": {},
    "inputs": [{"name": "text", "shape": [1, 5], "real_tokens": 5, "input_ids_sha256": "b" * 64}],
    "seed": 0,
}

WORDS = {1: "<s>", 7: "\nTo", 8: " be", 9: ", | or", 10: " <not>"}


def finding(layer: int | None, point: str, mode: Mode, verdict: Verdict = "pass", **changed: Any) -> Finding:
    found = Finding(layer, point, mode, "text", verdict)
    if point not in ("router_ids", "embed"):
        found = replace(found, margin=1.25, statistic="pooled", torch_error=2e-7, flax_error=2.5e-7)
    return replace(found, **changed)


def findings(layers: int, broken: tuple[int, str] | None = None) -> Iterator[Finding]:
    """Walk the findings of a model in the order of computation; from the broken point on, everything fails."""
    failed = False
    modes: tuple[Mode, ...] = ("local", "propagated", "whole")
    yield finding(None, "embed", "local")
    for layer in range(layers):
        inherited = failed
        for point in BLOCK:
            failed = failed or (layer, point) == broken
            for mode in modes[:2]:
                wrong = failed and (mode == "propagated" or not inherited)
                yield _wrong(layer, point, mode) if wrong else finding(layer, point, mode)
    for mode in modes:
        wrong = failed and mode != "local"
        yield _wrong(None, "logits", mode) if wrong else finding(None, "logits", mode)


def _wrong(layer: int | None, point: str, mode: Mode) -> Finding:
    if point == "router_ids":
        return finding(layer, point, mode, "fail", reason="2 of 5 tokens go to other experts")
    reason = "pooled: Flax is 2.5e+04 x as far from the exact answer as torch; limit 10"
    return finding(layer, point, mode, "fail", margin=2.5e4, flax_error=5e-3, reason=reason)


def routing(layers: int, flips: tuple[Flip, ...] = ()) -> dict[tuple[int, Mode, str, Any], LayerRouting]:
    return {
        (layer, "propagated", "text", "float32"): LayerRouting(5, flips if layer else (), 0.004, 0.25, (3, 2, 4, 1))
        for layer in range(layers)
    }


def drift(layers: int, kl: float) -> list[Drift]:
    worst = (WorstToken(3, 2 * kl, 8, 10), WorstToken(1, kl, 9, 9))
    return [Drift(layer, "text", "float32", 5, kl, 2 * kl, 0.8, worst) for layer in (*range(layers), None)]


PASS = Result(
    findings=list(findings(2)),
    routing=routing(2),
    differences=[],
    weights_compared=43,
    notes=["no token is masked by the window: its 200 positions are longer than the input"],
    dtype="float32",
    environment=ENVIRONMENT,
    provenance=PROVENANCE,
    cost={"torch": Cost(1.5, 512_000_000), "flax": Cost(2.5, 640_000_000)},
    drift=drift(2, 1e-12),
    tokens={"text": [1, 7, 8, 9, 10]},
    words=WORDS,
)

FAIL = replace(
    PASS,
    findings=list(findings(2, (1, "attn_context"))),
    routing=routing(2, (Flip(3, (0, 2), (1, 2), 0.3, 1e-6, tie=False), Flip(4, (0, 1), (1, 3), 1e-6, 1e-6, tie=False))),
    causes=[Cause("attention-scale", 1, "attn_context", "with scores times 1/H, the error falls from 0.005 to 2e-07")],
    drift=drift(2, 0.5),
    notes=[],
    baseline=BaselineDiff(
        "margins.json",
        40,
        [Regression(1, "attn_context", "local", "text", "float32", 1.25, 2.5e4, 1.9)],
        {"jax": ("0.10.1", "0.10.2"), "torch": ("2.13.0", None)},
    ),
)

UNCHECKED = replace(
    PASS,
    findings=[
        replace(each, verdict="unchecked", margin=None, torch_error=None, flax_error=None, reason="flax gives nothing")
        if (each.layer, each.point) == (1, "q")
        else each
        for each in PASS.findings
    ],
)

CRASH = replace(
    Result.stopped(
        'Traceback (most recent call last):\n  File "port.py", line 7\nZeroDivisionError: division by zero\n'
    ),
    environment=ENVIRONMENT,
    provenance={"command": PROVENANCE["command"]},
)

RESULTS = {"pass": PASS, "fail": FAIL, "unchecked": UNCHECKED, "crash": CRASH}


def large() -> Result:
    """Give a result as 8x22B has: 56 layers of 8 experts, three batches, two dtypes, and a fault in the middle."""
    experts = [f"expert.{expert}.{part}" for expert in range(8) for part in ("gate", "up", "act", "down")]
    block = [point for point in BLOCK if not point.startswith("expert")]
    places = [(layer, point) for layer in range(56) for point in [*block, *experts]]
    reason = "worst_channel: Flax is 2.5e+04 x as far from the exact answer as torch; limit 10"
    dtypes: tuple[Precision, ...] = ("float32", "bfloat16")
    modes: tuple[Mode, ...] = ("local", "operation", "propagated")
    found = []
    for dtype, mode, batch, (layer, point) in product(dtypes, modes, ("short", "left-padded", "long"), places):
        each = Finding(layer, point, mode, batch, "pass", 1.2345678901, "worst_channel", 1.23456789e-7, 2.3456789e-7)
        each = replace(each, dtype=dtype)
        found.append(replace(each, verdict="fail", reason=reason) if layer >= 28 else each)
    return replace(PASS, findings=found, routing=routing(56), drift=drift(56, 0.5))
