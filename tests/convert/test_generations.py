"""A checkpoint as transformers 4.57 writes it and one of 5.x convert to identical bytes.

Checked with transformers 4.57.1 itself on 2026-11-24: its save_pretrained, as safetensors and as .bin, of the weights
that 5.23 had saved. The directory here is spelled as that one: the keys of its config.json are below, as it wrote them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import Checkpoint, convert
from tests.checkpoints import write_checkpoint

CONFIG_OF_4_57 = """{
  "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16",
  "eos_token_id": 2, "head_dim": 10, "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02,
  "intermediate_size": 40, "max_position_embeddings": 256, "model_type": "mixtral", "num_attention_heads": 6,
  "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_key_value_heads": 2, "num_local_experts": 5,
  "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
  "router_jitter_noise": 0.0, "sliding_window": null, "tie_word_embeddings": false,
  "transformers_version": "4.57.1", "use_cache": true, "vocab_size": 101
}"""


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_both_generations_give_the_same_bytes(container: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "five", dtype="bfloat16")
    tensors = load_file(tmp_path / "five" / "model.safetensors")
    (tmp_path / "four").mkdir()
    (tmp_path / "four" / "config.json").write_text(CONFIG_OF_4_57)
    if container == "model.safetensors":
        save_file(dict(reversed(tensors.items())), tmp_path / "four" / container, metadata={"format": "pt"})
    else:
        torch.save(tensors, tmp_path / "four" / container)
    for to in ("flax", "hf-fused", "mistral"):
        for generation in ("four", "five"):
            convert(tmp_path / generation, tmp_path / to / generation, to=to)
        one, other = (
            {f.name: f.read_bytes() for f in (tmp_path / to / generation).iterdir() if "config" not in f.name}
            for generation in ("four", "five")
        )
        assert one == other
        assert "manifest.json" in one
    four, five = (Checkpoint.open(tmp_path / "flax" / generation).config for generation in ("four", "five"))
    assert four == five
    assert "rope_theta" in json.loads((tmp_path / "flax" / "four" / "config.json").read_text())
