"""Small Mixtral checkpoints for the tests, written by transformers itself, in either of Hugging Face's layouts."""

from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file

from scripts import make_checkpoint

__all__ = ["SIZES", "make_model", "write_checkpoint"]

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
}
"""Smaller than the demo's, and every axis again of a size of its own."""


def make_model(**overrides: Any) -> transformers.PreTrainedModel:
    """Build a random Mixtral; see `scripts.make_checkpoint.make_model`."""
    return make_checkpoint.make_model(**{**SIZES, **overrides})


def write_checkpoint(
    path: Path, *, layout: str = "hf-legacy", max_shard_size: str = "5GB", **overrides: Any
) -> transformers.PreTrainedModel:
    """Write a random Mixtral as a checkpoint and return the model.

    Args:
        path: the directory to make.
        layout: "hf-legacy", which `save_pretrained` writes, or "hf-fused", the model's tensors as they are in memory.
        max_shard_size: as `save_pretrained` has it, for hf-legacy.
        overrides: see `make_model`.
    """
    model = make_model(**overrides)
    if layout == "hf-legacy":
        model.save_pretrained(path, max_shard_size=max_shard_size)
        return model
    assert layout == "hf-fused", layout
    path.mkdir(parents=True)
    model.config.save_pretrained(path)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return model
