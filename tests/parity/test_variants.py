"""Over the configurations that change the computation: Flax is as close to the exact answer as torch."""

from pathlib import Path
from typing import Any

import pytest

from convert import convert
from parity.runner import run
from tests.checkpoints import write_checkpoint

LONGROPE = {"short_factor": [1 + 0.1 * i for i in range(5)], "long_factor": [2 + 0.3 * i for i in range(5)]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hf-fused": {"layout": "hf-fused"},
    "sharded": {"max_shard_size": "20KB"},
    "bfloat16-weights": {"dtype": "bfloat16"},
    "head-dim-derived": {"hidden_size": 48, "head_dim": None},
    "head-dim-large": {"head_dim": 34},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 6},
    "three-kv-heads": {"num_key_value_heads": 3},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "window": {"sliding_window": 9},
    "window-of-one": {"sliding_window": 1},
    "window-beyond-input": {"sliding_window": 4096},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "rope-linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
    "rope-dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 32,
    },
    "rope-yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    "rope-longrope-short": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONGROPE}},
    "rope-longrope-long": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
            **LONGROPE,
        }
    },
    "rope-llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}},
    "one-expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "eleven-experts-top-four": {"num_local_experts": 11, "num_experts_per_tok": 4},
    "every-expert": {"num_experts_per_tok": 5},
    "top-one": {"num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
    "quick-gelu": {"hidden_act": "quick_gelu"},
    "norm-eps": {"rms_norm_eps": 1e-3},
    "twelve-layers": {"num_hidden_layers": 12},
    "bare": {"architecture": "MixtralModel"},
    "sequence-classes": {"architecture": "MixtralForSequenceClassification", "num_labels": 7, "pad_token_id": 0},
    "token-classes": {"architecture": "MixtralForTokenClassification", "num_labels": 7},
    "question-answering": {"architecture": "MixtralForQuestionAnswering"},
    "window-tied-fused": {"sliding_window": 9, "tie_word_embeddings": True, "layout": "hf-fused"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_flax_is_as_close_to_the_oracle_as_torch(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "torch", **{"num_hidden_layers": 2, **VARIANTS[name]})
    convert(tmp_path / "torch", tmp_path / "flax")
    result = run(tmp_path / "torch", tmp_path / "flax", inputs="quick")
    assert result.verdict == "pass", [finding for finding in result.findings if finding.verdict != "pass"]
    assert result.weights_compared > 0
    checked = {finding.point for finding in result.findings}
    bare = VARIANTS[name].get("architecture") == "MixtralModel"
    assert ("logits" in checked) is not bare
