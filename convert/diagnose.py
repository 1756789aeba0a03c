"""Say in one message what keeps a checkpoint's tensors and its config.json apart, and why that may be.

Imports the standard library and convert's tables.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from convert.io.safetensors import Header
from convert.layouts import LAYOUTS
from convert.patterns import Factor
from convert.recognise import Mismatches
from convert.rules import TensorSpec
from flax_mixtral.axes import axis_sizes
from flax_mixtral.config import MixtralConfig

__all__ = ["explain", "letters"]

MOST_LINES = 8
"""Per group; the rest is counted."""

FIELDS = {
    "V": "vocab_size",
    "D": "hidden_size",
    "F": "intermediate_size",
    "N": "num_attention_heads",
    "K": "num_key_value_heads",
    "H": "head_dim",
    "P": "head_dim / 2",
    "E": "num_local_experts",
    "C": "id2label",
}
"""The key of config.json that fixes each axis."""


@dataclass(frozen=True, slots=True)
class _Case:
    config: MixtralConfig
    wrong: Mismatches
    headers: Mapping[str, Header]
    read: dict[str, dict[str, str | None]]
    """What the rules read out of the names, whatever config.json says."""

    def numbers(self, field: str) -> set[int]:
        return {int(number) for fields in self.read.values() if (number := fields.get(field))}


def explain(config: MixtralConfig, wrong: Mismatches, headers: Mapping[str, Header], where: str) -> str:
    """Write the message: what is wrong, grouped and abbreviated, then the likely causes.

    Args:
        config: what the model must have.
        wrong: what was found.
        headers: every tensor of the checkpoint.
        where: the checkpoint, to open the message.
    """
    case = _Case(config, wrong, headers, _read(headers))
    groups = (
        ("missing", _alike(wrong.missing)),
        ("unexpected", _alike(wrong.unexpected)),
        ("misshaped", [_misshaped(name, spec, headers[name]) for name, spec in wrong.misshaped.items()]),
        ("present twice", [f"{one} and {other} hold the same parameter" for one, other in wrong.twice]),
        ("not floating point", [f"{name}: {headers[name].dtype}; dequantize it first" for name in wrong.not_floating]),
        ("likely cause", [cause for find in CAUSES for cause in find(case)]),
    )
    lines = [f"{where}: the tensors do not fit config.json"]
    for title, found in groups:
        if found:
            rest = [f"    ... and {len(found) - MOST_LINES} more"] if len(found) > MOST_LINES else []
            lines += [f"  {title}:", *(f"    {line}" for line in found[:MOST_LINES]), *rest]
    return "\n".join(lines)


def _read(names: Iterable[str]) -> dict[str, dict[str, str | None]]:
    rules = {rule.source: rule for layout in LAYOUTS.values() for rule in layout.rules}.values()
    return {name: found for name in names for rule in rules if (found := rule.match(name)) is not None}


def _alike(names: Iterable[str]) -> list[str]:
    """Write one line for all names that differ in numbers only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name[:200])
    return [first + (f" (and {len(rest)} more like it)" if rest else "") for first, *rest in groups.values()]


def letters(spec: TensorSpec) -> str:
    """Write a tensor's axes as its pattern does: "(N H) D"."""
    dims = [" ".join(factor.name for factor in dim) for dim in spec.pattern.source]
    return " ".join(dim if len(dim.split()) == 1 else f"({re.sub(r'[0-9]+/', '', dim)})" for dim in dims)


def _misshaped(name: str, spec: TensorSpec, header: Header) -> str:
    turned = ": transposed" if header.shape == spec.shape[::-1] else ""
    return f"{name}: shape {list(header.shape)}, expected {list(spec.shape)} = {letters(spec)}{turned}"


def _experts(case: _Case) -> Iterator[str]:
    count = case.config.num_local_experts
    present: dict[int, set[int]] = {}
    for fields in case.read.values():
        if fields.get("E"):
            present.setdefault(int(fields["L"] or 0), set()).add(int(fields["E"] or 0))
    if (top := max(case.numbers("E"), default=0)) >= count:
        yield f"num_local_experts = {count}, but the checkpoint has experts 0 to {top}"
    lacking = {layer: sorted(set(range(count)) - experts) for layer, experts in sorted(present.items())}
    for layer, experts in list(lacking.items())[:MOST_LINES]:
        if experts:
            yield (
                f"layer {layer} has no expert {_ranges(experts)}: {count - len(experts)} of {count} are present; "
                "a shard is missing, or num_local_experts is wrong"
            )


def _layers(case: _Case) -> Iterator[str]:
    count, present = case.config.num_hidden_layers, case.numbers("L")
    if present and max(present) >= count:
        yield f"num_hidden_layers = {count}, but the checkpoint has layers 0 to {max(present)}"
    if present and (absent := sorted(set(range(count)) - present)):
        yield f"nothing of layer {_ranges(absent)} is present: a shard is missing, or num_hidden_layers is wrong"


def _prefix(case: _Case) -> Iterator[str]:
    inner = [name for name in case.wrong.unexpected if "model" in case.read.get(name, {})]
    prefixed = sum(name.startswith("model.") for name in inner)
    if case.config.architecture == "MixtralModel" and prefixed:
        yield "names start with 'model.', as in a model with a head, but architectures says MixtralModel"
    if case.config.architecture != "MixtralModel" and prefixed < len(inner):
        yield f"names lack 'model.', as in the bare MixtralModel, but architectures says {case.config.architecture}"


def _head(case: _Case) -> Iterator[str]:
    for name in case.wrong.missing:
        if name.startswith("lm_head."):
            yield f"no {name}: if the head is the embedding, set tie_word_embeddings to true in config.json"
    for name in case.wrong.unexpected:
        if name.startswith(("lm_head.", "score.", "qa_outputs.")):
            yield f"{name} is of another head than architectures = {case.config.architecture}"


def _axes(case: _Case) -> Iterator[str]:
    """Infer the axes' sizes from the shapes that are off, where one axis alone explains a dimension."""
    found: dict[str, None] = {}
    sizes = axis_sizes(case.config)
    for name, spec in case.wrong.misshaped.items():
        shape = case.headers[name].shape
        if len(shape) != len(spec.shape) or shape == spec.shape[::-1]:
            continue
        for dim, got, expected in zip(spec.pattern.source, shape, spec.shape, strict=True):
            if got != expected:
                found[_size(dim, got, sizes)] = None
    yield from found


def _size(dim: tuple[Factor, ...], got: int, sizes: Mapping[str, int]) -> str:
    axes = [factor.name for factor in dim if factor.name in FIELDS]
    given = ", ".join(f"{FIELDS[axis]} = {sizes[axis]}" for axis in axes)
    parts = [factor.parts for factor in dim if factor.part is not None]
    if len(axes) == 1 and not (parts and got % parts[0]):
        return f"{given} in config.json, {got // parts[0] if parts else got} in the tensors"
    return f"{given} in config.json, {got} for their product in the tensors"


def _ranges(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:MOST_LINES]))
    return text + (f" and {len(numbers) - MOST_LINES} more" if len(numbers) > MOST_LINES else "")


CAUSES: tuple[Callable[[_Case], Iterator[str]], ...] = (_experts, _layers, _prefix, _head, _axes)
