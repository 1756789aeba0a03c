"""Rotary embedding's configuration: one table of the parameters that each rope type takes.

Read from the 4.x spelling (top-level rope_theta, rope_scaling) and the 5.x one (rope_parameters).
Imports the standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ROPE_TYPES", "RopeConfig", "RopeType", "read_rope"]


@dataclass(frozen=True, slots=True)
class RopeType:
    """The parameters of one rope type, beside rope_theta."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    needs_original_length: bool = False


def _rope_type(required: str = "", optional: str = "", original: bool = False) -> RopeType:
    return RopeType(frozenset(required.split()), frozenset(optional.split()), original)


ROPE_TYPES: dict[str, RopeType] = {
    "default": _rope_type(),
    "linear": _rope_type("factor"),
    "dynamic": _rope_type("factor"),
    "yarn": _rope_type("factor", "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate", original=True),
    "longrope": _rope_type("short_factor long_factor", "factor attention_factor", original=True),
    "llama3": _rope_type("factor low_freq_factor high_freq_factor", original=True),
    "proportional": _rope_type("", "factor partial_rotary_factor"),
}
"""Source: transformers 5.23, modeling_rope_utils.py, `_validate_*_rope_parameters`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """How positions become rotations; a field that the type does not take is None.

    Source: transformers 5.23, modeling_rope_utils.py, `RopeParameters`.
    """

    rope_type: str = "default"
    rope_theta: float = 1e6
    """The base: the slowest pair turns about once in 2 pi * rope_theta positions."""
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    """The length the model was trained with, where a type stretches beyond it."""
    attention_factor: float | None = None
    """Multiplies cos and sin; derived from factor where None."""
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    """[P], one divisor per rotary pair, up to the original length."""
    long_factor: tuple[float, ...] | None = None
    """[P], beyond it."""
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    partial_rotary_factor: float | None = None

    def to_hf(self) -> dict[str, Any]:
        """Write the parameters as transformers 5.x spells them, without those that are None."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None}


def read_rope(config: Mapping[str, Any], max_positions: int, head_dim: int) -> tuple[RopeConfig, list[str]]:
    """Read rope's parameters from a config.json.

    Args:
        config: the parsed file.
        max_positions: max_position_embeddings; the original length where none is given.
        head_dim: H.

    Returns:
        The parameters, and what is wrong with them (then the parameters are the default ones).

    Source: transformers 5.23, `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict` and
        `standardize_rope_params`: rope_scaling wins over rope_parameters, and a top-level original length over a
        nested one.
    """
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    old_spelling = given.pop("type", "default")
    name = given.pop("rope_type", old_spelling)
    if not isinstance(name, str) or name not in ROPE_TYPES:
        return RopeConfig(), [f"rope_type = {name!r}: expected one of {', '.join(ROPE_TYPES)}"]
    kind = ROPE_TYPES[name]
    given.setdefault("rope_theta", config.get("rope_theta", 1e6))  # transformers' default_theta of Mixtral
    if config.get("partial_rotary_factor") is not None:
        given.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if kind.needs_original_length:
        given.setdefault("original_max_position_embeddings", max_positions)
        if config.get("original_max_position_embeddings") is not None:
            given["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    given = {key: value for key, value in given.items() if value is not None}
    if kind.optional.isdisjoint({"partial_rotary_factor"}) and given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]  # turns every lane, as without it
    problems = _problems(name, kind, given, head_dim)
    if problems:
        return RopeConfig(), problems
    parameters: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return RopeConfig(rope_type=name, **parameters), []


def _problems(name: str, kind: RopeType, given: Mapping[str, Any], head_dim: int) -> list[str]:
    known = kind.required | kind.optional | {"rope_theta"}
    if kind.needs_original_length:
        known |= {"original_max_position_embeddings"}
    problems = [f"rope_type {name!r} needs {key}" for key in sorted(kind.required - given.keys())]
    problems += [
        f"rope parameter {key} = {given[key]!r}: rope_type {name!r} has no such parameter"
        for key in sorted(given.keys() - known)
    ]
    for key in sorted(given.keys() & known):
        value = given[key]
        if key in ("short_factor", "long_factor"):
            if not isinstance(value, list | tuple) or len(value) != head_dim // 2 or not all(map(_is_number, value)):
                problems.append(f"rope parameter {key}: expected a list of {head_dim // 2} numbers, head_dim / 2")
        elif key == "truncate":
            if not isinstance(value, bool):
                problems.append(f"rope parameter truncate = {value!r}: expected true or false")
        elif not _is_number(value) or value <= 0:
            problems.append(f"rope parameter {key} = {value!r}: expected a number above 0")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
