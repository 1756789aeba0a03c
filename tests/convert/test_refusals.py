"""What does not fit is refused: one message that names the tensor and the likely cause, and nothing is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from convert import BadInput, Checkpoint, ConfigError, convert
from tests.checkpoints import write_checkpoint
from tests.convert.edit import Tensors, edit_config, edit_tensors, split

MOE = "model.layers.2.block_sparse_moe."


def drop(*parts: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def add(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


Q = "model.layers.0.self_attn.q_proj.weight"
TENSORS: dict[str, tuple[Callable[[Tensors], None], list[str]]] = {
    "missing expert": (
        drop(MOE + "experts.3."),
        [f"missing:\n    {MOE}experts.3.w1.weight (and 2 more like it)", "layer 2 has no expert 3: 4 of 5 are present"],
    ),
    "missing expert of all layers": (drop("experts.4."), ["layer 0 has no expert 4", "num_local_experts is wrong"]),
    "missing part of an expert": (drop(MOE + "experts.3.w2"), [f"{MOE}experts.3.w2.weight"]),
    "missing norm": (drop("model.norm"), ["missing:\n    model.norm.weight"]),
    "missing head": (drop("lm_head"), ["lm_head.weight", "set tie_word_embeddings to true"]),
    "missing layer": (drop("layers.1."), ["nothing of layer 1 is present", "num_hidden_layers"]),
    "extra tensor": (add("model.layers.0.mlp.bias", 60), ["unexpected:\n    model.layers.0.mlp.bias"]),
    "extra expert": (add(MOE + "experts.5.w1.weight", 40, 24), ["has experts 0 to 5", "num_local_experts = 5"]),
    "extra layer": (add("model.layers.3.input_layernorm.weight", 24), ["has layers 0 to 3", "num_hidden_layers = 3"]),
    "another head": (add("score.weight", 2, 24), ["score.weight is of another head"]),
    "transposed": (replace(Q, torch.t), [f"{Q}: shape [24, 60], expected [60, 24] = (N H) D: transposed"]),
    "wrong vocabulary": (replace("lm_head.weight", lambda x: x[:100]), ["vocab_size = 101 in config.json, 100"]),
    "wrong heads": (replace(Q, lambda x: x[:50]), ["num_attention_heads = 6, head_dim = 10 in config.json, 50"]),
    "another rank": (replace(Q, torch.flatten), [Q, "shape [1440], expected [60, 24]"]),
    "quantized": (replace(Q, lambda x: x.to(torch.int8)), [f"not floating point:\n    {Q}: int8"]),
    "no prefix": (rename("model.", ""), ["names lack 'model.'", "MixtralForCausalLM"]),
    "two layouts of one": (
        add("model.final_norm.scale", 24),
        ["twice:\n    model.final_norm.scale and model.norm.weight hold the same"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refusals") / "hf"
    write_checkpoint(path)
    return path


@pytest.fixture
def hf(pristine: Path, tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    for file in pristine.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "hf"


def refusal(hf: Path) -> str:
    """Convert, and give the message; nothing may be left behind."""
    before = set(hf.parent.iterdir())
    with pytest.raises((BadInput, ConfigError)) as caught:
        convert(hf, hf.parent / "flax")
    assert set(hf.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str, hf: Path) -> None:
    change, complaints = TENSORS[case]
    edit_tensors(hf, change)
    message = refusal(hf)
    for complaint in complaints:
        assert complaint in message
    assert len(message.splitlines()) < 30


def test_everything_is_listed_at_once(hf: Path) -> None:
    for case in ("missing expert", "extra tensor", "transposed"):
        edit_tensors(hf, TENSORS[case][0])
    message = refusal(hf)
    for case in ("missing expert", "extra tensor", "transposed"):
        for complaint in TENSORS[case][1]:
            assert complaint in message


def test_stacked_experts_of_another_number_are_explained(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", layout="hf-fused")
    edit_config(tmp_path / "hf", num_local_experts=4)
    assert "num_local_experts = 4 in config.json, 5 in the tensors" in refusal(tmp_path / "hf")


def test_half_of_gate_up_is_explained_by_its_axis(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", layout="hf-fused")
    edit_config(tmp_path / "hf", intermediate_size=41)
    assert "intermediate_size = 41 in config.json, 40 in the tensors" in refusal(tmp_path / "hf")


def test_prefix_of_a_bare_model(hf: Path) -> None:
    edit_config(hf, architectures=["MixtralModel"])
    assert "names start with 'model.'" in refusal(hf)


def test_a_tied_head_that_differs(hf: Path) -> None:
    edit_config(hf, tie_word_embeddings=True)
    message = refusal(hf)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings should be false" in message


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"shared_experts": 3}, "shared_experts"),
    "more layers than tensors": ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
    "more experts than there can be": ({"num_local_experts": 10**9}, "num_local_experts = 1000000000"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_cannot_be_honoured(case: str, hf: Path) -> None:
    keys, complaint = CONFIGS[case]
    edit_config(hf, **keys)
    assert complaint in refusal(hf)


def test_truncated_file_names_the_tensor(hf: Path) -> None:
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refusal(hf)
    assert "truncated inside tensor" in message
    assert "model.safetensors" in message


def test_truncated_shard_names_the_tensor(hf: Path) -> None:
    split(hf, lambda name: int("layers.1." in name))
    shard = hf / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "model-00002-of-00002.safetensors: truncated inside tensor 'model.layers.1." in refusal(hf)


def test_missing_shard_names_a_tensor(hf: Path) -> None:
    split(hf, lambda name: int(name == "model.norm.weight"))
    (hf / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors, which holds model.norm.weight and 0 more" in refusal(hf)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\\y", "\0", "\x1b[2J", "\ud800", "x" * 300],
)
def test_index_that_points_outside(name: str, hf: Path) -> None:
    split(hf, lambda tensor: int(tensor == "model.norm.weight"))
    index = hf / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    message = refusal(hf)
    assert "is not the name of a file in this directory" in message
    message.encode()


def test_link_that_leads_outside(hf: Path) -> None:
    outside = hf.parent / "elsewhere.safetensors"
    (hf / "model.safetensors").rename(outside)
    (hf / "model.safetensors").symlink_to(outside)
    assert "a link that leads out of the checkpoint" in refusal(hf)


def test_links_of_the_hub_cache_are_followed(hf: Path) -> None:
    cache = hf.parent / "models--x"
    (cache / "snapshots" / "1234").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted(hf.iterdir())):
        (cache / "blobs" / str(i)).write_bytes(file.read_bytes())
        (cache / "snapshots" / "1234" / file.name).symlink_to(f"../../blobs/{i}")
    Checkpoint.open(cache / "snapshots" / "1234")


def test_pipe_in_place_of_a_file_does_not_hang(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    os.mkfifo(hf / "model.safetensors")
    assert "expected a regular file" in refusal(hf)


def test_index_and_shards_that_disagree(hf: Path) -> None:
    split(hf, lambda name: int(name == "model.norm.weight"))
    save_file({"model.stray.weight": torch.ones(1)}, hf / "model-00002-of-00002.safetensors")
    message = refusal(hf)
    assert "model.norm.weight: the index says model-00002-of-00002.safetensors, found in no file" in message
    assert "model.stray.weight: the index says nothing" in message


def test_tensor_in_two_shards(hf: Path) -> None:
    split(hf, lambda name: int(name == "model.norm.weight"))
    both = {name: torch.ones(24) for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight")}
    save_file(both, hf / "model-00002-of-00002.safetensors")
    assert "present twice:\n    model.layers.0.input_layernorm.weight in" in refusal(hf)


def test_two_sets_of_weights(hf: Path) -> None:
    (hf / "flax_model.safetensors").write_bytes((hf / "model.safetensors").read_bytes())
    assert "found flax_model.safetensors and model.safetensors" in refusal(hf)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file(file: str, hf: Path) -> None:
    (hf / file).unlink()
    assert file in refusal(hf)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff", b"[" * 10**5])
def test_config_that_is_no_json_object(content: bytes, hf: Path) -> None:
    (hf / "config.json").write_bytes(content)
    assert "config.json" in refusal(hf)


def test_missing_directory(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere")
