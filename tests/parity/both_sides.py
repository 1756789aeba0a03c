"""One random Mixtral as transformers runs it and as the oracle does, and the batches that both are fed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from flax_mixtral.config import MixtralConfig
from parity.oracle.model import Oracle
from parity.sides.torch_hf import TorchSide
from parity.trace import Array, Batch
from tests.checkpoints import SIZES, write_checkpoint

__all__ = ["BATCHES", "ROPE", "Both", "both_sides"]

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e4},
    "linear": {"rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_theta": 1e4, "factor": 2.5},
    "yarn": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "beta_fast": 6.0,
        "beta_slow": 0.5,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "longrope": {
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": 24,
    },
    "longrope-factor": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0],
        "factor": 3.0,
        "original_max_position_embeddings": 24,
    },
    "llama3": {
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "proportional": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "factor": 2.0},
}
"""Rope parameters by type; a variant names its type itself. The trained length is 24 (dynamic: 32)."""


def _batches() -> dict[str, Batch]:
    B, T = 2, 37
    ids_BT = np.random.default_rng(7).integers(3, SIZES["vocab_size"], (B, T))
    left_BT, right_BT = np.ones((B, T), np.int64), np.ones((B, T), np.int64)
    left_BT[1, :9] = 0
    right_BT[0, -6:] = 0
    packed_BT = np.stack([np.r_[0:14, 0:23], np.r_[0:5, 0:20, 0:12]])
    counted_BT = np.maximum(left_BT.cumsum(axis=1) - 1, 0)
    return {
        "plain": Batch("plain", ids_BT),
        "short": Batch("short", ids_BT[:, :19]),
        "left": Batch("left", np.where(left_BT, ids_BT, 0), left_BT),
        "left-counted": Batch("left-counted", np.where(left_BT, ids_BT, 0), left_BT, counted_BT),
        "right": Batch("right", np.where(right_BT, ids_BT, 0), right_BT),
        "packed": Batch("packed", ids_BT, position_ids=packed_BT),
        "late": Batch("late", ids_BT, position_ids=np.tile(np.arange(50, 50 + T), (B, 1))),
    }


BATCHES = _batches()


@dataclass(frozen=True)
class Both:
    """A checkpoint on disk, the model that wrote it, and what the sides are made from."""

    path: Path
    model: transformers.PreTrainedModel
    config: MixtralConfig
    raw: dict[str, Any]
    legacy: dict[str, Array]
    fused: dict[str, Array]

    def oracle(self, **options: Any) -> Oracle:
        return Oracle(self.config, self.legacy, **options)

    def torch(self, **options: Any) -> TorchSide:
        return TorchSide(self.config, self.raw, self.fused, **options)


def both_sides(path: Path, **overrides: Any) -> Both:
    """Write a checkpoint and read it back; arguments as `write_checkpoint`, `rope` names a row of ROPE."""
    if rope := overrides.pop("rope", None):
        overrides["rope_parameters"] = {"rope_type": rope, **ROPE[rope]}
    model = write_checkpoint(path, **overrides)
    raw = json.loads((path / "config.json").read_text())
    legacy = {name: _numpy(tensor) for name, tensor in load_file(path / "model.safetensors").items()}
    fused = {name: _numpy(tensor) for name, tensor in model.state_dict().items()}
    return Both(path, model, MixtralConfig.from_hf(raw), raw, legacy, fused)


def _numpy(tensor: Any) -> Array:
    """Give a read-only array, as a memory-mapped checkpoint does."""
    if str(tensor.dtype) == "torch.bfloat16":
        array = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()
    array.flags.writeable = False
    return array
