"""Match the tensors of a checkpoint with the atoms of its model, from headers alone, and find every mismatch at once.

Imports the standard library and convert's tables.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from convert.io.safetensors import Header
from convert.layouts import LAYOUTS
from convert.rules import Atom, Layout, Region, TensorSpec
from flax_mixtral.config import MixtralConfig

__all__ = ["DERIVED_BUFFERS", "Mismatches", "Recognised", "recognise"]

DERIVED_BUFFERS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq)")
"""Not parameters: old files hold them, and every framework computes them from config.json."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """Which tensor holds each atom, and what else the checkpoint holds."""

    atoms: dict[Atom, tuple[str, Region]] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    layouts: set[str] = field(default_factory=lambda: set(LAYOUTS))
    """The layouts that have every one of those tensors; none if they are mixed."""
    buffers: list[str] = field(default_factory=list)
    tied_copies: dict[str, TensorSpec] = field(default_factory=dict)
    """Heads stored although config.json ties them to the embedding."""


@dataclass(frozen=True, slots=True)
class Mismatches:
    """All that keeps tensors and configuration apart; empty when they fit."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, TensorSpec] = field(default_factory=dict)
    twice: list[tuple[str, str]] = field(default_factory=list)
    """Two tensors that hold the same parameter."""
    not_floating: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any((self.missing, self.unexpected, self.misshaped, self.twice, self.not_floating))


def recognise(config: MixtralConfig, headers: Mapping[str, Header]) -> tuple[Recognised, Mismatches]:
    """Match tensors with atoms; layouts may differ from tensor to tensor.

    Args:
        config: what the model must have.
        headers: every tensor of the checkpoint.
    """
    layouts = {name: layout for name, layout in LAYOUTS.items() if not layout.lacks(config)}
    tables = {name: layout.tensors(config) for name, layout in layouts.items()}
    untied = replace(config, tie_word_embeddings=False)
    heads = {n: spec for layout in layouts.values() for n, spec in layout.tensors(untied).items()}
    found, wrong = Recognised(), Mismatches()
    for name, header in headers.items():
        homes = [layout for layout, table in tables.items() if name in table]
        spec = tables[homes[0]][name] if homes else heads.get(name)
        if spec is None:
            (found.buffers if DERIVED_BUFFERS.fullmatch(name) else wrong.unexpected).append(name)
            continue
        if header.shape != spec.shape:
            wrong.misshaped[name] = spec
        if header.dtype.kind in "biu":
            wrong.not_floating.append(name)
        if not homes:
            found.tied_copies[name] = spec
            continue
        found.specs[name] = spec
        found.layouts.intersection_update(homes)
        for region in spec.regions:
            if region.atom in found.atoms:
                wrong.twice.append((found.atoms[region.atom][0], name))
            found.atoms[region.atom] = (name, region)
    wrong.missing.extend(_missing(config, headers, found))
    return found, wrong


def _missing(config: MixtralConfig, names: Iterable[str], found: Recognised) -> list[str]:
    """Name absent tensors as that layout names them whose rules match most of the checkpoint."""

    def tensors(layout: Layout) -> list[str]:
        specs = layout.tensors(config).values()
        return [spec.name for spec in specs if any(region.atom not in found.atoms for region in spec.regions)]

    if not tensors(LAYOUTS["flax"]):
        return []
    matches = {
        name: sum(any(rule.match(n) for rule in layout.rules) for n in names)
        for name, layout in LAYOUTS.items()
        if not layout.lacks(config)
    }
    return tensors(LAYOUTS[max(matches, key=matches.__getitem__)])
