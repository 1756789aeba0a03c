"""Mixtral's configuration: read from Hugging Face's config.json in its 4.x and 5.x spelling, and written as 5.x.

Every key of a config.json is either a field here, or in `WITHOUT_EFFECT`, or refused by name.
Imports the standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from flax_mixtral.rope_config import RopeConfig, read_rope

__all__ = ["HIDDEN_ACTS", "Architecture", "ConfigError", "MixtralConfig"]

Architecture = Literal[
    "MixtralModel",
    "MixtralForCausalLM",
    "MixtralForSequenceClassification",
    "MixtralForTokenClassification",
    "MixtralForQuestionAnswering",
]

HIDDEN_ACTS = frozenset(
    "gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh hardswish laplace "
    "leaky_relu linear mish quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh".split()
)
"""The activations of transformers that are fixed functions; `prelu` and `xielu` hold trained parameters."""

WITHOUT_EFFECT = frozenset(
    # Where the file came from, and how to start transformers' own classes.
    "_name_or_path architectures auto_map transformers_version torch_dtype dtype model_type _commit_hash "
    "_attn_implementation _attn_implementation_autoset _experts_implementation torchscript use_bfloat16 "
    "unsloth_version unsloth_fixed "
    # What a forward returns or keeps, not what it computes.
    "use_cache output_attentions output_hidden_states return_dict return_dict_in_generate output_scores "
    # Labels and tokens that only name things; their number is read by num_labels.
    "id2label label2id num_labels finetuning_task problem_type task_specific_params tokenizer_class prefix "
    "bos_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id "
    # Defaults of generate() that 4.x kept in the same file.
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "bad_words_ids num_return_sequences suppress_tokens begin_suppress_tokens exponential_decay_length_penalty "
    "remove_invalid_values "
    # Memory against time in training; the numbers are the same.
    "chunk_size_feed_forward gradient_checkpointing "
    # Rope's keys and head_dim are read apart from the plain fields.
    "rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings head_dim "
    "classifier_dropout hidden_dropout".split()
)
"""Keys that leave the computation of an inference or training step as it is, or that are read apart."""

ONLY_AT: dict[str, Any] = {
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "tf_legacy_loss": False,
    "is_causal": True,
    "quantization_config": None,
}
"""Keys that change the computation in a way that no Mixtral has: allowed at this value only."""


class ConfigError(ValueError):
    """A configuration that cannot be honoured; the message lists every reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtralConfig:
    """All that decides what a Mixtral computes, under Hugging Face's names.

    Source: transformers 5.23, models/mixtral/configuration_mixtral.py; defaults are those of `MixtralConfig` there.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    """D."""
    intermediate_size: int = 14336
    """F, the hidden width of one expert."""
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    """N."""
    num_key_value_heads: int = 8
    """K; N/K query heads share one."""
    head_dim: int = 128
    """H. Independent of D and N; hidden_size / num_attention_heads where the file has null."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    """Where dynamic rope begins to stretch; no limit by itself."""
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    """A query sees this many keys, itself among them; None for all before it."""
    num_local_experts: int = 8
    """E."""
    num_experts_per_tok: int = 2
    """A."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    output_router_logits: bool = False
    """Whether a forward computes the auxiliary loss unless told otherwise."""
    router_aux_loss_coef: float = 0.001
    attention_dropout: float = 0.0
    """In training only, as `router_jitter_noise`."""
    router_jitter_noise: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    """The sequence-classification head pools at the last token that is not this one."""
    eos_token_id: int | tuple[int, ...] | None = 2
    architecture: Architecture = "MixtralForCausalLM"
    num_labels: int = 2
    """C, the classes of a classification head."""
    token_classification_bias: bool = True

    def __post_init__(self) -> None:
        if problems := _inconsistencies(self):
            raise ConfigError(_listing("configuration", problems))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "MixtralConfig":
        """Read a config.json of transformers, 4.x or 5.x.

        Args:
            config: the parsed file.

        Raises:
            ConfigError: a key is not understood, has a value that no Mixtral can honour, or contradicts another.
        """
        problems = [*_refused_keys(config), *_wrong_types(config)]
        if problems:
            raise ConfigError(_listing("config.json", problems))
        given = {key: value for key, value in config.items() if key in PLAIN and value is not None}
        given["eos_token_id"] = _token_ids(config.get("eos_token_id", 2))
        heads = given.get("num_attention_heads", 32)
        given.setdefault("num_key_value_heads", heads if "num_key_value_heads" in config else 8)
        given["head_dim"] = config.get("head_dim") or given.get("hidden_size", 4096) // max(heads, 1)
        given["num_labels"] = _num_labels(config)
        given["architecture"] = _architecture(config)
        if given["architecture"] == "MixtralForQuestionAnswering":
            given["num_labels"] = 2
        rope, problems = read_rope(config, given.get("max_position_embeddings", 131072), given["head_dim"])
        if problems:
            raise ConfigError(_listing("config.json", problems))
        return cls(**given, rope=rope)

    def to_hf(self) -> dict[str, Any]:
        """Write the configuration as transformers 5.x spells it; `from_hf` gives the same one back."""
        plain = {name: getattr(self, name) for name in sorted(PLAIN | {"head_dim"})}
        if isinstance(plain["eos_token_id"], tuple):
            plain["eos_token_id"] = list(plain["eos_token_id"])
        labels = {str(i): f"LABEL_{i}" for i in range(self.num_labels)}
        return {
            "architectures": [self.architecture],
            "model_type": "mixtral",
            **plain,
            "id2label": labels,
            "label2id": {label: int(i) for i, label in labels.items()},
            "rope_parameters": self.rope.to_hf(),
        }


PLAIN = frozenset(f.name for f in fields(MixtralConfig)) - {"rope", "head_dim", "architecture", "num_labels"}
"""The fields that are copied from the key of the same name."""

READ_AS: dict[str, type] = {
    **{f.name: type(f.default) for f in fields(MixtralConfig) if f.name in PLAIN and f.default is not None},
    **dict.fromkeys(("head_dim", "sliding_window", "pad_token_id", "num_labels"), int),
    **dict.fromkeys(("rope_parameters", "rope_scaling", "id2label"), dict),
    "architectures": list,
}
"""The JSON type of every key that is read; null stands for the default."""


def _refused_keys(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("model_type", "mixtral") != "mixtral":
        problems.append(f"model_type is {config['model_type']!r}; only 'mixtral' is understood")
    for key, value in sorted(config.items()):
        if key in ONLY_AT:
            if value != ONLY_AT[key] and value is not None:
                problems.append(f"{key} = {_short(value)}: only {ONLY_AT[key]!r} is understood{_WHY.get(key, '')}")
        elif key not in PLAIN and key not in WITHOUT_EFFECT:
            problems.append(
                f"{key} = {_short(value)}: this key is not understood, and ignoring it could change the "
                "computation; remove it from config.json if you know that it does not"
            )
    return problems


_WHY = {"quantization_config": " (load it in transformers, dequantize and save it first)"}


def _wrong_types(config: Mapping[str, Any]) -> list[str]:
    """Compare each value with its field's type: JSON's true is no number, and 1.5 is no count."""
    problems = []
    for key, value in sorted(config.items()):
        wanted = READ_AS.get(key)
        if value is None or wanted is None:
            continue
        values = value if key == "eos_token_id" and isinstance(value, list) else [value]
        allowed = (int, float) if wanted is float else wanted
        if not all(isinstance(v, allowed) and (wanted is bool or not isinstance(v, bool)) for v in values):
            problems.append(f"{key} = {_short(value)}: expected {wanted.__name__}")
    return problems


def _inconsistencies(config: MixtralConfig) -> list[str]:
    problems = []
    for name in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings num_local_experts num_experts_per_tok num_labels"
    ).split():
        if getattr(config, name) < 1:
            problems.append(f"{name} = {getattr(config, name)}: expected at least 1")
    if problems:
        return problems
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append(
            f"num_attention_heads = {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads = {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        problems.append(f"head_dim = {config.head_dim}: rotary embedding needs an even one")
    if config.num_experts_per_tok > config.num_local_experts:
        problems.append(
            f"num_experts_per_tok = {config.num_experts_per_tok} exceeds num_local_experts = {config.num_local_experts}"
        )
    if config.sliding_window is not None and config.sliding_window < 1:
        problems.append(f"sliding_window = {config.sliding_window}: expected null or at least 1")
    if not config.rms_norm_eps > 0:  # nor not-a-number
        problems.append(f"rms_norm_eps = {config.rms_norm_eps}: expected more than 0")
    if config.hidden_act not in HIDDEN_ACTS:
        problems.append(f"hidden_act = {config.hidden_act!r}: expected one of {', '.join(sorted(HIDDEN_ACTS))}")
    return problems


def _architecture(config: Mapping[str, Any]) -> Architecture:
    names = config.get("architectures") or ["MixtralForCausalLM"]
    for known in get_args(Architecture):
        if names == [known]:
            return known  # type: ignore[no-any-return]  # get_args is untyped; the loop runs over the Literal
    raise ConfigError(_listing("config.json", [f"architectures = {names}: expected one of {get_args(Architecture)}"]))


def _num_labels(config: Mapping[str, Any]) -> int:
    if config.get("id2label") is not None:
        return len(config["id2label"])
    return int(config.get("num_labels") or 2)


def _token_ids(ids: Any) -> Any:
    return tuple(ids) if isinstance(ids, list) else ids


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listing(where: str, problems: list[str]) -> str:
    return "\n".join([f"{where} cannot be honoured:", *(f"  - {problem}" for problem in problems)])
