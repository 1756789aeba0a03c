"""Frequencies of every rope type against transformers', on both sides of the length where a type stretches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MixtralConfig as HFConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from flax_mixtral import MixtralConfig
from flax_mixtral.rope import rotary
from flax_mixtral.rope_config import ROPE_TYPES

H = 14
ORIGINAL = 32
TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False},
    "yarn-given-attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 8},
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(H // 2)],
        "long_factor": [2.0 + 0.3 * i for i in range(H // 2)],
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1, 5 * ORIGINAL])
@pytest.mark.parametrize("name", TYPES)
def test_cos_and_sin_are_those_of_transformers(name: str, length: int) -> None:
    rope = {"rope_type": name, "rope_theta": 5e3, **TYPES[name]}
    sizes: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": H}
    longest = ORIGINAL if name == "dynamic" else 4 * ORIGINAL
    hf = HFConfig(**sizes, max_position_embeddings=longest, rope_parameters=dict(rope))
    config = MixtralConfig.from_hf(hf.to_dict() | {"architectures": ["MixtralForCausalLM"]})
    position_BT = np.stack([np.arange(length), np.maximum(np.arange(length) - 5, 0)])
    expected = MixtralRotaryEmbedding(hf)(torch.zeros(1), torch.from_numpy(position_BT))
    found = jax.jit(lambda p: rotary(config, p, jnp.float32))(position_BT)
    for ours, theirs in zip(found, expected, strict=True):
        # An angle of up to 160 is itself only known to 160 float32 roundings, on both sides.
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=4 * length * float(np.finfo(np.float32).eps))


def test_every_rope_type_is_covered() -> None:
    assert {rope.get("rope_type", name) for name, rope in TYPES.items()} == set(ROPE_TYPES)


def test_the_longest_row_decides_for_the_whole_batch() -> None:
    config = MixtralConfig.from_hf({"head_dim": H, "rope_parameters": {"rope_type": "longrope", **TYPES["longrope"]}})
    alone = rotary(config, jnp.arange(5)[None], jnp.float32)
    beside_long = rotary(config, jnp.stack([jnp.arange(5), jnp.arange(5) + 100]), jnp.float32)
    assert not np.allclose(alone.cos_BTH[0], beside_long.cos_BTH[0])
