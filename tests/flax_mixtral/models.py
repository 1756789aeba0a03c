"""The Flax model of a transformers model, through the converter, for the tests here."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers

from flax_mixtral import MODELS, Mixtral, MixtralConfig, MixtralOutput
from flax_mixtral.arrays import Mould
from flax_mixtral.experts import Choice
from flax_mixtral.heads import Model
from flax_mixtral.tree import slots
from tests.checkpoints import write_checkpoint

__all__ = ["both", "drawn", "forward", "ids_and_mask"]


@jax.jit
def forward(model: Model, *inputs: Any, **named: Any) -> MixtralOutput:
    """Call the model under jit: op by op, most of a small model's time is compiling single operations."""
    return model(*inputs, **named)


def both(path: Path, **overrides: Any) -> tuple[transformers.PreTrainedModel, Model]:
    """Write a checkpoint, and give transformers' model and ours of it."""
    torch_model = write_checkpoint(path, **overrides)
    config = MixtralConfig.from_hf(torch_model.config.to_dict() | {"architectures": [type(torch_model).__name__]})
    return torch_model, MODELS[config.architecture].from_pretrained(path)


def ids_and_mask(padding: str = "left", vocabulary: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Give three rows of 17 tokens, two of them padded with 0, and their mask."""
    mask = np.ones((3, 17), np.int64)
    if padding == "left":
        mask[0, :4] = mask[1, :11] = 0
    elif padding == "right":
        mask[0, -4:] = mask[1, -11:] = 0
    ids = np.random.default_rng(5).integers(1, vocabulary, mask.shape)
    return ids * mask, mask


def drawn(config: MixtralConfig, seed: int = 0, experts: Choice = "auto") -> Mixtral:
    """Build a model with NumPy's random numbers: compiling JAX's, one program per shape, takes many seconds."""
    rng = np.random.default_rng(seed)
    arrays = {slot.path: rng.normal(0, 0.3, slot.shape).astype(np.float32) for slot in slots(config)}
    return Mould(lambda rngs: Mixtral(config, rngs=rngs, experts=experts)).fill(arrays)
