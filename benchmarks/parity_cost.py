"""What a comparison costs, beside one forward of each framework on the same tokens."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import parity
from flax_mixtral import Mixtral
from parity.sides.timed import Timed
from parity.trace import Batch

__all__ = ["ParityCost", "measure"]


CALLS = {"block": "blocks", "head": "lens and head", "whole": "the model whole"}
"""Where a side's seconds go, beside embedding and losses."""


@dataclass(frozen=True)
class ParityCost:
    """Seconds: one forward of each framework, the whole run, and of it each side's by what it was asked for."""

    forwards: dict[str, float]
    whole: float
    sides: dict[str, dict[str, float]]

    @property
    def with_oracle(self) -> float:
        """Give the whole run as a multiple of the two forwards."""
        return self.whole / sum(self.forwards.values())

    @property
    def without_oracle(self) -> float:
        """Give the same less the time inside the oracle; judging what it says stays in."""
        return (self.whole - sum(self.sides["oracle"].values())) / sum(self.forwards.values())

    @property
    def rest(self) -> float:
        """Give the seconds outside the sides: comparing, judging, and setting up."""
        return self.whole - sum(sum(calls.values()) for calls in self.sides.values())


def measure(path: Path, tokens: int, rounds: int) -> ParityCost:
    """Measure in float32, local and propagated; a first run compiles and is thrown away."""
    ids_BT = np.random.default_rng(1).integers(0, 32000, (1, tokens))
    forwards = {"torch": _torch_forward(path, ids_BT, rounds), "flax": _flax_forward(path, ids_BT, rounds)}
    batch = Batch("prefill", ids_BT)
    parity.run(path, inputs=[batch])
    with _timed_calls() as seconds:
        start = time.perf_counter()
        result = parity.run(path, inputs=[batch])
        whole = time.perf_counter() - start
    for side, calls in seconds.items():
        calls["other"] = result.cost[side].seconds - sum(calls.values())
    return ParityCost(forwards, whole, seconds)


@contextmanager
def _timed_calls() -> Iterator[dict[str, dict[str, float]]]:
    """Time the sides' calls one by one, by side and kind."""
    seconds = {side: dict.fromkeys(CALLS.values(), 0.0) for side in ("torch", "flax", "oracle")}

    def timed(call: str) -> Callable[..., Any]:
        original = getattr(Timed, call)

        def run(side: Timed, *args: Any) -> Any:
            start = time.perf_counter()
            found = original(side, *args)
            seconds[side.name][CALLS[call]] += time.perf_counter() - start
            return found

        return run

    with ExitStack() as stack:
        for call in CALLS:
            stack.enter_context(patch.object(Timed, call, timed(call)))
        yield seconds


def _median(run: Callable[[], object], rounds: int) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@torch.inference_mode()
def _torch_forward(path: Path, ids_BT: np.ndarray, rounds: int) -> float:
    model = transformers.MixtralForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.from_numpy(ids_BT).long()
    return _median(lambda: model(ids), rounds)


def _flax_forward(path: Path, ids_BT: np.ndarray, rounds: int) -> float:
    model = Mixtral.from_pretrained(path, dtype=jnp.float32)
    logits = jax.jit(lambda model, ids_BT: model(ids_BT).logits)
    return _median(lambda: jax.block_until_ready(logits(model, ids_BT)), rounds)
