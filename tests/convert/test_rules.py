"""The tables of layouts: complete, invertible, and in the order of numbers."""

import json

import pytest

from convert.layouts import LAYOUTS
from convert.rules import Rule
from flax_mixtral.config import MixtralConfig
from flax_mixtral.tree import BASE, HEADS, slots
from tests.checkpoints import SIZES

ARCHITECTURES = sorted(HEADS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_leaf_has_one_row(layout: str) -> None:
    targets = [rule.target for rule in LAYOUTS[layout].rules]
    heads = [HEADS["MixtralForCausalLM"]] if LAYOUTS[layout].native else HEADS.values()
    wanted = {leaf.path for leaf in (*BASE, *(leaf for head in heads for leaf in head))}
    assert set(targets) == wanted
    if layout != "flax":  # there score.kernel stands once for each head that has it
        assert len(targets) == len(wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_regions_tile_tensors_and_cover_the_tree_once(layout: str, architecture: str) -> None:
    config = MixtralConfig.from_hf({**SIZES, "architectures": [architecture]})
    if LAYOUTS[layout].native and architecture != "MixtralForCausalLM":
        assert LAYOUTS[layout].lacks(config)
        return
    assert not LAYOUTS[layout].lacks(config)
    specs = LAYOUTS[layout].tensors(config).values()
    atoms = [region.atom for spec in specs for region in spec.regions]
    assert len(atoms) == len(set(atoms))
    assert {atom.path for atom in atoms} == {slot.path for slot in slots(config)}
    for spec in specs:
        assert len(spec.regions) in (1, 5, 10)
        positions = [region.pattern.position(region.fixed) for region in spec.regions]
        assert positions == sorted(set(positions))


def test_layers_and_experts_are_ordered_as_numbers() -> None:
    config = MixtralConfig.from_hf({**SIZES, "num_hidden_layers": 12, "num_local_experts": 12})
    names = list(LAYOUTS["hf-legacy"].tensors(config))
    experts = [name for name in names if name.startswith("model.layers.11.block_sparse_moe.experts.")]
    assert [name.split(".")[5] for name in experts if ".w2." in name] == [str(e) for e in range(12)]
    routers = [name for name in names if name.endswith("gate.weight")]
    assert [name.split(".")[2] for name in routers] == [str(layer) for layer in range(12)]


def test_match_reads_the_numbers_out_of_a_name() -> None:
    rule = Rule("{model}layers.{L}.experts.{E}.w1.weight", "", "")
    assert rule.match("model.layers.3.experts.10.w1.weight") == {"model": "model.", "L": "3", "E": "10"}
    assert rule.match("layers.3.experts.10.w1.weight") == {"model": None, "L": "3", "E": "10"}
    assert rule.match("model.layers.03.experts.10.w1.weight") is None
    assert rule.match("model.layers.3.experts.10.w1.weight.") is None


def test_layouts_have_the_names_of_the_command_line() -> None:
    assert json.dumps(list(LAYOUTS)) == '["flax", "hf-legacy", "hf-fused", "mistral", "mistral-stacked"]'
