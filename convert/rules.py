"""Rules tie a foreign tensor to a leaf of the Flax tree; a layout is a table of them.

An atom is the smallest thing that moves: a Flax leaf, or one expert of a leaf that is stacked along E. A layout
places every atom in a region of one of its tensors, so any layout converts to any other, atom by atom.
Imports the standard library, convert.patterns and the neutral part of flax_mixtral.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from convert.patterns import Pattern, parse
from flax_mixtral.axes import axis_sizes
from flax_mixtral.config import MixtralConfig
from flax_mixtral.tree import Slot, slots

__all__ = ["Atom", "Layout", "Region", "Rule", "TensorSpec"]


class Atom(NamedTuple):
    """A leaf of the Flax tree, or one expert of it."""

    path: str
    expert: int | None


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a layout's table; how to go back is derived from the pattern.

    `{model}` in a source is "model." where a head holds the decoder, `{L}` the layer and `{E}` the expert number.
    """

    source: str
    target: str
    pattern: str

    def match(self, name: str) -> dict[str, str | None] | None:
        """Read `model`, `L` and `E` out of a tensor's name; None for a name of another rule."""
        expression = re.escape(self.source).replace(r"\{model\}", r"(?P<model>model\.)?")
        for number in "LE":
            expression = expression.replace(rf"\{{{number}\}}", rf"(?P<{number}>0|[1-9]\d{{0,8}})")
        found = re.fullmatch(expression, name)
        return found.groupdict() if found else None


@dataclass(frozen=True, slots=True)
class Region:
    """Where an atom lies in a tensor: what to select (`fixed`), and how its axes become the leaf's."""

    atom: Atom
    pattern: Pattern
    fixed: Mapping[str, int]

    @property
    def restore(self) -> Pattern:
        """Give the pattern from the atom back to the region."""
        pattern = self.pattern.invert()
        for axis in self.fixed:
            pattern = pattern.without(axis)
        return pattern


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a layout: its name, its shape in numbers and letters, and its regions in the order of bytes."""

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to name and shape the tensors of a checkpoint; `stem` names its files, `format` goes into them."""

    name: str
    stem: str
    format: str
    rules: tuple[Rule, ...]
    native: bool = False
    """Mistral's own: one file, a params.json, and the language model alone."""

    def lacks(self, config: MixtralConfig) -> list[str]:
        """List the parameters of a model that have no place in this layout."""
        rows = {rule.target for rule in self.rules}
        bare = config.architecture == "MixtralModel" and self.native
        return [slot.path for slot in slots(config) if bare or slot.leaf.path.removeprefix("model.") not in rows]

    def tensors(self, config: MixtralConfig) -> dict[str, TensorSpec]:
        """List the tensors that a model has in this layout, in the order of the Flax tree."""
        sizes = axis_sizes(config)
        rows = {rule.target: rule for rule in self.rules}
        regions: dict[str, list[Region]] = {}
        for slot in slots(config):
            rule = rows[slot.leaf.path.removeprefix("model.")]
            for name, region in _regions(rule, slot, config):
                regions.setdefault(name, []).append(region)
        return {name: _spec(name, found, sizes) for name, found in regions.items()}


def _regions(rule: Rule, slot: Slot, config: MixtralConfig) -> Iterator[tuple[str, Region]]:
    prefix = "" if config.architecture == "MixtralModel" else "model."
    experts = range(config.num_local_experts) if slot.leaf.axes.startswith("E ") else (None,)
    for expert in experts:
        name = rule.source.format(model=prefix, L=slot.layer, E=expert)
        fixed = {} if expert is None else {"E": expert}
        yield name, Region(Atom(slot.path, expert), parse(rule.pattern), fixed)


def _spec(name: str, regions: list[Region], sizes: Mapping[str, int]) -> TensorSpec:
    ordered = tuple(sorted(regions, key=lambda region: region.pattern.position(region.fixed)))
    assert all(region.pattern.is_contiguous(region.fixed) for region in ordered), name
    pattern = ordered[0].pattern
    return TensorSpec(name, pattern.source_shape(sizes), pattern, ordered)
