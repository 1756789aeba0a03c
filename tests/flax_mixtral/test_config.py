"""config.json in both spellings, and refusal by name of what is not understood."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig as HFConfig

from flax_mixtral import ConfigError, MixtralConfig, RopeConfig
from flax_mixtral.activations import ACTIVATIONS
from flax_mixtral.axes import axis_sizes
from flax_mixtral.config import HIDDEN_ACTS, ONLY_AT, PLAIN, WITHOUT_EFFECT

OLD_8X7B = {  # as transformers 4.36 wrote it
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_the_published_8x7b_config_is_read() -> None:
    config = MixtralConfig.from_hf(OLD_8X7B)
    assert config.head_dim == 128
    assert config.rope == RopeConfig(rope_theta=1e6)
    assert config.router_aux_loss_coef == 0.02
    assert axis_sizes(config)["G"] == 4


def test_defaults_are_those_of_transformers() -> None:
    written = json.loads(HFConfig(architectures=["MixtralForCausalLM"]).to_json_string(use_diff=False))
    written = {key: value for key, value in written.items() if value is not None}
    assert MixtralConfig.from_hf(written) == MixtralConfig()
    assert MixtralConfig.from_hf({}) == MixtralConfig()


def test_every_key_that_transformers_writes_is_known() -> None:
    written = HFConfig().to_dict()
    assert set(written) <= PLAIN | WITHOUT_EFFECT | set(ONLY_AT)


@pytest.mark.parametrize(
    "new",
    [
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e4},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e4},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e4,
            "beta_fast": 16,
        },
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 5,
            "long_factor": [2.0] * 5,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e4,
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e4,
        },
        {"rope_type": "proportional", "partial_rotary_factor": 0.4, "rope_theta": 5e4},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_both_spellings_of_rope_mean_the_same(new: dict[str, Any]) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
    scaling = {key: value for key, value in new.items() if key != "rope_theta"}
    old = {**sizes, "rope_theta": new["rope_theta"], "rope_scaling": scaling}
    older = {**sizes, "rope_theta": new["rope_theta"], "rope_scaling": {**scaling, "type": scaling["rope_type"]}}
    del older["rope_scaling"]["rope_type"]
    expected = MixtralConfig.from_hf({**sizes, "rope_parameters": new})
    assert expected.rope.rope_type == new["rope_type"]
    assert MixtralConfig.from_hf(old) == expected
    assert MixtralConfig.from_hf(older) == expected


@given(
    st.builds(
        MixtralConfig,
        vocab_size=st.integers(1, 500),
        head_dim=st.integers(1, 40).map(lambda half: 2 * half),
        num_key_value_heads=st.sampled_from([1, 2, 4, 8, 16, 32]),
        sliding_window=st.none() | st.integers(1, 100),
        num_local_experts=st.integers(4, 20),
        num_experts_per_tok=st.integers(1, 4),
        hidden_act=st.sampled_from(sorted(HIDDEN_ACTS)),
        tie_word_embeddings=st.booleans(),
        eos_token_id=st.none() | st.integers(0, 9) | st.tuples(st.integers(0, 9), st.integers(0, 9)),
        num_labels=st.integers(1, 9),
        rope=st.sampled_from([RopeConfig(), RopeConfig(rope_type="linear", factor=2.0)]),
        architecture=st.sampled_from(["MixtralModel", "MixtralForCausalLM", "MixtralForTokenClassification"]),
    )
)
def test_written_and_read_again_is_the_same(config: MixtralConfig) -> None:
    assert MixtralConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hidden_act": "prelu"}, "hidden_act = 'prelu'"),
        ({"hidden_act": "xielu"}, "hidden_act = 'xielu'"),
        ({"attention_sink": True}, "attention_sink"),
        ({"quantization_config": {"bits": 4}}, "dequantize"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"is_causal": False}, "is_causal"),
        ({"hidden_size": "24"}, "hidden_size = '24': expected int"),
        ({"hidden_size": True}, "hidden_size = True: expected int"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"head_dim": "10"}, "head_dim = '10': expected int"),
        ({"head_dim": 10.0}, "head_dim = 10.0: expected int"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"id2label": 5}, "id2label = 5: expected dict"),
        ({"num_labels": "x"}, "num_labels = 'x': expected int"),
        ({"eos_token_id": 1.5}, "eos_token_id = 1.5: expected int"),
        ({"rope_scaling": 5}, "rope_scaling = 5: expected dict"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default': expected dict"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope_type = ['x']"),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"num_key_value_heads": 5}, "not a multiple"),
        ({"num_experts_per_tok": 9}, "exceeds num_local_experts"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_type = 'mrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "64 numbers"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="cannot be honoured") as refusal:
        MixtralConfig.from_hf({**OLD_8X7B, **changed})
    assert named in str(refusal.value)


def test_all_unknown_keys_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        MixtralConfig.from_hf({**OLD_8X7B, "first_unknown": 1, "second_unknown": 2})
    assert "first_unknown" in str(refusal.value)
    assert "second_unknown" in str(refusal.value)


def test_every_accepted_activation_has_an_implementation() -> None:
    assert set(ACTIVATIONS) == HIDDEN_ACTS
