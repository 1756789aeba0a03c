"""HF -> Flax -> HF gives identical bytes, and transformers loads the result without a missing or unexpected key."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert import Checkpoint, convert
from tests.checkpoints import write_checkpoint
from tests.convert.edit import edit_tensors, split, stored

HF = ("hf-legacy", "hf-fused")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "tied": {"tie_word_embeddings": True},
    "twelve experts and layers": {"num_local_experts": 12, "num_hidden_layers": 11},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "one key head": {"num_key_value_heads": 1},
    "window": {"sliding_window": 7},
    "bare": {"architecture": "MixtralModel"},
    "sequence head": {"architecture": "MixtralForSequenceClassification", "num_labels": 7, "pad_token_id": 0},
    "token head": {"architecture": "MixtralForTokenClassification", "num_labels": 7},
    "answering head": {"architecture": "MixtralForQuestionAnswering"},
}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(x.dtype), tuple(x.shape), x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, x in tensors.items()
    }


def load(kind: Any, path: Path) -> Any:
    """Load with transformers, which must find every tensor and no other."""
    model, info = kind.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert info.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    assert {key: problems for key, problems in info.items() if problems} == {}
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", HF)
def test_there_and_back_is_bit_for_bit(layout: str, case: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf", layout=layout, **CASES[case])
    convert(tmp_path / "hf", tmp_path / "flax")
    convert(tmp_path / "flax", tmp_path / "back", to=layout)
    assert bits(stored(tmp_path / "back")) == bits(stored(tmp_path / "hf"))
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()

    assert bits(load(type(model), tmp_path / "back").state_dict()) == bits(model.state_dict())


@pytest.mark.parametrize(("layout", "other"), [HF, HF[::-1]])
def test_the_two_hf_layouts_convert_directly(layout: str, other: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf", layout=layout)
    write_checkpoint(tmp_path / "wanted", layout=other)
    convert(tmp_path / "hf", tmp_path / "other", to=other)
    assert bits(stored(tmp_path / "other")) == bits(stored(tmp_path / "wanted"))
    load(type(model), tmp_path / "other")


def test_both_layouts_give_the_same_flax_file(tmp_path: Path) -> None:
    for layout in HF:
        write_checkpoint(tmp_path / layout, layout=layout)
        convert(tmp_path / layout, tmp_path / f"flax-{layout}")
    files = [(tmp_path / f"flax-{layout}" / "flax_model.safetensors").read_bytes() for layout in HF]
    assert files[0] == files[1]


def test_nan_payloads_survive(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", dtype="bfloat16", vocab_size=2048, hidden_size=32)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(2048, 32)
    edit_tensors(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": every}))
    convert(tmp_path / "hf", tmp_path / "flax")
    convert(tmp_path / "flax", tmp_path / "back", to="hf-legacy")
    assert bits(stored(tmp_path / "back")) == bits(stored(tmp_path / "hf"))


def test_flax_leaves_hold_what_their_axes_say(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "flax")
    flax = {name: x.numpy() for name, x in stored(tmp_path / "flax").items()}
    torch_ = {name: x.numpy() for name, x in model.state_dict().items()}
    for name, heads in (("q", 6), ("k", 2), ("v", 2)):
        kernel = torch_[f"model.layers.1.self_attn.{name}_proj.weight"].T.reshape(24, heads, 10)
        np.testing.assert_array_equal(flax[f"model.layers.1.attention.{name}.kernel"], kernel)
    o = torch_["model.layers.1.self_attn.o_proj.weight"].T.reshape(6, 10, 24)
    np.testing.assert_array_equal(flax["model.layers.1.attention.o.kernel"], o)
    np.testing.assert_array_equal(flax["model.layers.1.moe.router.kernel"], torch_["model.layers.1.mlp.gate.weight"].T)
    gate_up = torch_["model.layers.1.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(flax["model.layers.1.moe.experts.gate"], gate_up[:, :40].transpose(0, 2, 1))
    np.testing.assert_array_equal(flax["model.layers.1.moe.experts.up"], gate_up[:, 40:].transpose(0, 2, 1))
    down = torch_["model.layers.1.mlp.experts.down_proj"]
    np.testing.assert_array_equal(flax["model.layers.1.moe.experts.down"], down.transpose(0, 2, 1))
    np.testing.assert_array_equal(flax["lm_head.kernel"], torch_["lm_head.weight"].T)


@pytest.mark.parametrize("to", ["flax", *HF])
def test_shards_and_index_are_written_and_read(to: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hf", max_shard_size="60KB", num_hidden_layers=11)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 10
    convert(tmp_path / "hf", tmp_path / "to", to=to, max_shard_bytes=50_000)
    assert len(list((tmp_path / "to").glob("*-of-*.safetensors"))) > 10
    if to != "flax":
        load(type(model), tmp_path / "to")
    convert(tmp_path / "to", tmp_path / "back", to="hf-legacy")
    assert bits(stored(tmp_path / "back")) == bits(stored(tmp_path / "hf"))


def test_layouts_may_be_mixed_between_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    write_checkpoint(tmp_path / "fused", layout="hf-fused")
    convert(tmp_path / "hf", tmp_path / "flax")
    fused, flax = (stored(tmp_path / name) for name in ("fused", "flax"))

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for layer, other in ((1, fused), (2, flax)):
            prefix = f"model.layers.{layer}."
            for name in [name for name in tensors if name.startswith(prefix)]:
                del tensors[name]
            tensors.update({name: x for name, x in other.items() if name.startswith(prefix)})

    (tmp_path / "mixed").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "mixed" / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    edit_tensors(tmp_path / "mixed", mix)
    split(tmp_path / "mixed", lambda name: int("layers.1." in name))
    assert Checkpoint.open(tmp_path / "mixed").layout == "mixed"
    convert(tmp_path / "mixed", tmp_path / "back", to="hf-legacy")
    assert bits(stored(tmp_path / "back")) == bits(stored(tmp_path / "hf"))


def test_dtypes_may_differ_between_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", dtype="bfloat16")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "norm" in name or name.endswith("block_sparse_moe.gate.weight"):
                tensors[name] = tensors[name].float()

    edit_tensors(tmp_path / "hf", widen)
    for to in ("flax", "hf-fused"):
        convert(tmp_path / "hf", tmp_path / to, to=to)
        convert(tmp_path / to, tmp_path / f"{to}-back", to="hf-legacy")
        assert bits(stored(tmp_path / f"{to}-back")) == bits(stored(tmp_path / "hf"))


def test_side_files_are_carried_along(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md", "optimizer.bin"):
        (tmp_path / "hf" / name).write_text(name)
    convert(tmp_path / "hf", tmp_path / "flax")
    names = {path.name for path in (tmp_path / "flax").iterdir()}
    assert names == {
        "config.json", "flax_model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer.model",
        "chat_template.jinja", "manifest.json",
    }  # fmt: skip


def test_a_tied_head_that_is_stored_too_is_dropped_and_said(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tie_word_embeddings=True)
    edit_tensors(tmp_path / "hf", lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"]}))
    report = convert(tmp_path / "hf", tmp_path / "flax")
    assert [note for note in report.plan.notes if note.startswith("lm_head.weight")]
    assert "lm_head.kernel" not in load_file(tmp_path / "flax" / "flax_model.safetensors")


def test_rotary_buffers_of_old_files_are_dropped_and_said(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path / "hf", lambda x: x.update({buffer: torch.ones(5)}))
    report = convert(tmp_path / "hf", tmp_path / "flax")
    assert [note for note in report.plan.notes if note.startswith(buffer)]
