"""What a comparison costs, beside one forward of each framework on the same tokens."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import parity
from flax_mixtral import Mixtral
from parity.trace import Batch

__all__ = ["ParityCost", "measure"]


@dataclass(frozen=True)
class ParityCost:
    """Seconds: one forward of each framework, the whole run, and each side's share of it."""

    forwards: dict[str, float]
    whole: float
    sides: dict[str, float]

    @property
    def with_oracle(self) -> float:
        """Give the whole run as a multiple of the two forwards."""
        return self.whole / sum(self.forwards.values())

    @property
    def without_oracle(self) -> float:
        """Give the same less the time inside the oracle; judging what it says stays in."""
        return (self.whole - self.sides["oracle"]) / sum(self.forwards.values())


def measure(path: Path, tokens: int, rounds: int) -> ParityCost:
    """Measure in float32, local and propagated; a first run compiles and is thrown away."""
    ids_BT = np.random.default_rng(1).integers(0, 32000, (1, tokens))
    forwards = {"torch": _torch_forward(path, ids_BT, rounds), "flax": _flax_forward(path, ids_BT, rounds)}
    batch = Batch("prefill", ids_BT)
    parity.run(path, inputs=[batch])
    start = time.perf_counter()
    result = parity.run(path, inputs=[batch])
    whole = time.perf_counter() - start
    return ParityCost(forwards, whole, {name: cost.seconds for name, cost in result.cost.items()})


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
