"""A random Mixtral on disk, at the scales of a trained one: what the selftest runs on where no checkpoint is given."""

import math
from pathlib import Path

import numpy as np

from convert import save
from flax_mixtral.config import MixtralConfig
from flax_mixtral.tree import Slot, slots
from parity.trace import Array

__all__ = ["DEFAULT", "draw"]

DEFAULT = MixtralConfig(
    vocab_size=331,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
    sliding_window=200,
)
"""All axis sizes differ, N*H is not D, and the standard suite is longer than the window."""

NORM_SIGMA = 0.25
"""Spread of the norms' logarithm: one that is skipped, swapped or applied twice shows."""

GAINS = {"lm_head": 2.5, "score": 2.5, "qa_outputs": 2.5, "q": 1.3, "k": 1.3}
"""Standard deviation of a projection's output for an input of unit scale, where it is not 1: logits of 2 to 3, and
scores of about 1.5, so that attention selects and still looks at many positions."""


def draw(path: Path, config: MixtralConfig = DEFAULT, *, seed: int = 0, tied_routers: bool = False) -> Path:
    """Write a random checkpoint in the Flax layout.

    Args:
        path: the directory to make.
        config: the model.
        seed: decides every weight.
        tied_routers: give neighbouring experts equal router columns, so that the router's choices tie exactly.

    Returns:
        path.
    """
    rng = np.random.default_rng(seed)
    leaves = {slot.path: _values(slot, rng) for slot in slots(config)}
    if tied_routers:
        for name in leaves:
            if name.endswith("router.kernel"):
                leaves[name][:, 1::2] = leaves[name][:, : 2 * (config.num_local_experts // 2) : 2]
    save(path, leaves, config)
    return path


def _values(slot: Slot, rng: np.random.Generator) -> Array:
    noise = rng.standard_normal(slot.shape, np.float32)
    parts = slot.path.split(".")
    if parts[-1] == "scale":
        scale: Array = np.exp(NORM_SIGMA * noise)
        return scale
    if parts[-1] in ("bias", "embedding"):
        return noise
    axes = slot.leaf.axes.split()
    # The axes that a product sums over: D, or for o the heads (N, H), or for down F.
    inputs = {"N": 2, "E": 2}.get(axes[0], 1)
    fan_in = math.prod(slot.shape[:inputs]) if axes[0] == "N" else slot.shape[inputs - 1]
    gain = next((GAINS[part] for part in parts if part in GAINS), 1.0)
    return noise * np.float32(gain / math.sqrt(fan_in))
