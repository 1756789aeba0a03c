"""The checkpoint that the benchmarks share, written without either framework."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.io.safetensors import Writer
from convert.layouts import LAYOUTS
from flax_mixtral.config import MixtralConfig

__all__ = ["CONFIG", "write"]

CONFIG = MixtralConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    num_local_experts=8,
    num_experts_per_tok=2,
)


def write(path: Path, config: MixtralConfig = CONFIG) -> None:
    """Write hf-legacy in bfloat16: norms of 1, everything else drawn with a standard deviation of 0.02."""
    layout, dtype = LAYOUTS["hf-legacy"], np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)
    specs = layout.tensors(config)
    path.mkdir(parents=True)
    with Writer(path / "model.safetensors", [(n, dtype, s.shape) for n, s in specs.items()], layout.format) as writer:
        for name, spec in specs.items():
            drawn = np.ones(spec.shape) if "norm" in name else rng.standard_normal(spec.shape, np.float32) * 0.02
            writer.write(name, 0, drawn.astype(dtype).reshape(-1).view(np.uint8))
    (path / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "bfloat16"}))
