"""Mistral's params.json, to and from the keys of config.json.

Imports the standard library and flax_mixtral.config.
"""

from collections.abc import Mapping
from typing import Any

from convert.errors import ConfigError
from flax_mixtral.config import MixtralConfig
from flax_mixtral.rope_config import RopeConfig

__all__ = ["read_params", "write_params"]

KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "rope_theta": "rope_theta",
}
"""The first release has the keys of config.json instead: those are read as they are."""

MOE_KEYS = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}

OPTIONAL = {"head_dim", "sliding_window", "rope_theta"}

WITHOUT_EFFECT = frozenset({"max_batch_size", "max_seq_len", "model_type"})


def read_params(params: Mapping[str, Any], rope_theta: float | None = None) -> dict[str, Any]:
    """Give a config.json that says what a params.json says.

    Args:
        params: the parsed file.
        rope_theta: where the file has none.

    Raises:
        ConfigError: a size is missing, or rope_theta is missing or given twice.
    """
    given = {key: value for key, value in params.items() if key not in WITHOUT_EFFECT}
    moe = given.pop("moe", {})
    if not isinstance(moe, Mapping) or moe.keys() - MOE_KEYS.keys():
        raise ConfigError(f"params.json: moe = {str(moe)[:100]}: expected {' and '.join(MOE_KEYS)}")
    config = {KEYS.get(key, key): value for key, value in given.items()}
    config |= {MOE_KEYS[key]: value for key, value in moe.items()}
    if missing := sorted(({*KEYS.values(), *MOE_KEYS.values()} - OPTIONAL) - config.keys()):
        raise ConfigError(f"params.json: {', '.join(missing)} missing (or under Mistral's own name)")
    window = config.get("sliding_window")
    if isinstance(window, str) and window.isascii() and window.isdigit() and len(window) < 10:
        config["sliding_window"] = int(window)  # the first release has a string there
    config["rope_theta"] = _rope_theta(config.get("rope_theta"), rope_theta)
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "tie_word_embeddings": False, **config}


def _rope_theta(there: Any, given: float | None) -> Any:
    if there is None and given is None:
        raise ConfigError(
            "params.json has no rope_theta, and it decides what the model computes: mistral-inference takes 1e6 then, "
            "Hugging Face's conversion script took 1e4, Mixtral 8x7B and 8x22B were trained with 1e6; name one with "
            "--rope-theta (rope_theta= in Python), or write it into params.json"
        )
    if there is not None and given is not None and there != given:
        raise ConfigError(f"params.json says rope_theta = {there!r}, but {given!r} was asked for")
    return given if there is None else there


def write_params(config: MixtralConfig) -> dict[str, Any]:
    """Give the params.json of a configuration.

    Raises:
        ConfigError: the configuration has something that Mistral's own code does not compute.
    """
    only = {
        "architecture": "MixtralForCausalLM",
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rope": RopeConfig(rope_theta=config.rope.rope_theta),
    }
    wrong = [
        f"{key} = {getattr(config, key)!r}: only {value!r} can be said there"
        for key, value in only.items()
        if getattr(config, key) != value
    ]
    if wrong:
        raise ConfigError("\n  - ".join(["Mistral's params.json cannot hold this configuration:", *wrong]))
    hf = {**config.to_hf(), "rope_theta": config.rope.rope_theta}
    params = {key: hf[name] for key, name in KEYS.items() if hf.get(name) is not None}
    return {**params, "moe": {key: hf[name] for key, name in MOE_KEYS.items()}}
