"""Mistral's own layouts and params.json, against the permutation written out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from convert import Checkpoint, ConfigError, TensorMismatch, convert
from convert.__main__ import cli
from convert.mistral_params import read_params, write_params
from flax_mixtral.config import MixtralConfig
from tests.checkpoints import SIZES, write_checkpoint
from tests.convert.edit import Tensors, stored

NATIVE = ("mistral", "mistral-stacked")
RENAMED = {
    "model.embed_tokens.": "tok_embeddings.", "model.norm.": "norm.", "lm_head.": "output.", "model.": "",
    "self_attn.": "attention.", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def natively(hf: Tensors, stacked: bool) -> Tensors:
    """Rename and permute as Mistral has it: the inverse of transformers' conversion script."""
    native = {}
    for name, x in hf.items():
        if any(part in name for part in ("q_proj", "k_proj")):
            x = x.reshape(-1, 2, 5, 24).transpose(1, 2).reshape(x.shape)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        native[name if stacked else name.replace("block_sparse_moe", "feed_forward")] = x.contiguous()
    if stacked:
        for layer in range(3):
            for w in ("w1", "w2", "w3"):
                moe = f"layers.{layer}.block_sparse_moe."
                experts = [native.pop(f"{moe}experts.{e}.{w}.weight") for e in range(5)]
                native[moe + w] = torch.cat([x.T if w == "w2" else x for x in experts]).contiguous()
    return native


def write_native(path: Path, hf: Path, stacked: bool, container: str = "safetensors", **params: Any) -> None:
    path.mkdir()
    tensors = natively(stored(hf), stacked)
    if container == "safetensors":
        save_file(tensors, path / "consolidated.safetensors")
    else:  # files that hold different keys
        for i in range(3):
            part = {name: x for k, (name, x) in enumerate(tensors.items()) if k % 3 == i}
            torch.save(part, path / f"consolidated.{i:02}.{container}")
    config = MixtralConfig.from_hf(json.loads((hf / "config.json").read_text()))
    (path / "params.json").write_text(json.dumps({**write_params(config), **params}))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("container", ["safetensors", "pth", "pt"])
@pytest.mark.parametrize("layout", NATIVE)
def test_native_is_read(layout: str, container: str, hf: Path) -> None:
    write_native(hf.parent / "native", hf, layout == "mistral-stacked", container)
    assert Checkpoint.open(hf.parent / "native").layout == layout
    convert(hf, hf.parent / "wanted")
    convert(hf.parent / "native", hf.parent / "flax")
    file = "flax_model.safetensors"
    assert (hf.parent / "flax" / file).read_bytes() == (hf.parent / "wanted" / file).read_bytes()
    configs = [Checkpoint.open(hf.parent / name).config for name in ("flax", "native")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("layout", NATIVE)
def test_native_is_written(layout: str, hf: Path) -> None:
    report = convert(hf, hf.parent / "native", to=layout, max_shard_bytes=1000)
    wanted = natively(stored(hf), layout == "mistral-stacked")
    got = stored(hf.parent / "native")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert len(report.plan.files) == 1
    params = json.loads((hf.parent / "native" / "params.json").read_text())
    assert (params["dim"], params["moe"]) == (24, {"num_experts": 5, "num_experts_per_tok": 2})
    assert params["rope_theta"] == 1e6
    (hf.parent / "native" / "config.json").unlink()
    convert(hf.parent / "native", hf.parent / "back", to="hf-legacy")
    assert (hf.parent / "back" / "model.safetensors").read_bytes() == reordered(hf, hf.parent / "back")


def reordered(hf: Path, back: Path) -> bytes:
    """The file that holds the first's tensors in our order."""
    convert(hf, back.parent / "ordered", to="hf-legacy")
    return (back.parent / "ordered" / "model.safetensors").read_bytes()


def test_rope_theta_is_not_guessed(hf: Path) -> None:
    native = hf.parent / "native"
    write_native(native, hf, stacked=False)
    params = json.loads((native / "params.json").read_text())
    del params["rope_theta"]
    (native / "params.json").write_text(json.dumps(params))
    with pytest.raises(ConfigError, match=r"1e6 then.*1e4.*--rope-theta"):
        Checkpoint.open(native)
    refused = CliRunner().invoke(cli, [str(native), str(hf.parent / "flax")])
    assert refused.exit_code == 3
    done = CliRunner().invoke(cli, [str(native), str(hf.parent / "flax"), "--rope-theta", "1e4"])
    assert done.exit_code == 0
    assert Checkpoint.open(hf.parent / "flax").config.rope.rope_theta == 1e4
    with pytest.raises(ConfigError, match=r"config\.json has its own"):
        Checkpoint.open(hf, rope_theta=1e4)


NATIVE_PARAMS: dict[str, Any] = {
    "dim": 24, "n_layers": 3, "head_dim": 10, "hidden_dim": 40, "n_heads": 6, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": 101, "rope_theta": 1e6, "moe": {"num_experts": 5, "num_experts_per_tok": 2},
}  # fmt: skip
FIRST_RELEASE = {**{k: v for k, v in SIZES.items() if "max" not in k}, "rms_norm_eps": 1e-5, "rope_theta": 1e6}


def test_both_spellings_of_params() -> None:
    first, native = (MixtralConfig.from_hf(read_params(params)) for params in (FIRST_RELEASE, NATIVE_PARAMS))
    assert first == native
    windowed = MixtralConfig.from_hf(read_params({**FIRST_RELEASE, "sliding_window": "4096"}))
    assert windowed.sliding_window == 4096
    assert write_params(windowed)["sliding_window"] == 4096


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dim": None, "n_layers": "3"}, "n"),
        ({"moe": {"num_experts": 5}}, "num_experts_per_tok missing"),
        ({"moe": {"shared": 1}}, "expected num_experts and"),
        ({"moe": 3}, "moe = 3"),
        ({"lora": {"rank": 3}}, "lora"),
        ({"sliding_window": "x"}, "sliding_window"),
        ({"rope_theta": "1e6"}, "rope_theta"),
    ],
)
def test_params_that_cannot_be_honoured(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        MixtralConfig.from_hf(read_params({**NATIVE_PARAMS, **change}))


@pytest.mark.parametrize("params", [{"rope_theta": 1e5}])
def test_rope_theta_given_twice(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="asked for"):
        read_params({**NATIVE_PARAMS, **params}, rope_theta=1e4)


def test_what_native_cannot_hold_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        convert(tmp_path / "tied", tmp_path / "native", to="mistral")
    write_checkpoint(tmp_path / "head", architecture="MixtralForTokenClassification")
    with pytest.raises(TensorMismatch, match=r"mistral has no place for score\.kernel"):
        convert(tmp_path / "head", tmp_path / "native", to="mistral")
    assert not (tmp_path / "native").exists()


def test_other_copies_are_passed_over_and_said(hf: Path) -> None:
    write_native(hf.parent / "native", hf, stacked=True, container="pt")
    for file in (hf.parent / "native").glob("*.pt"):
        (hf / file.name).write_bytes(file.read_bytes())
    report = convert(hf, hf.parent / "flax")
    assert [note for note in report.plan.notes if note.startswith("consolidated.00.pt")]


def test_a_wrong_row_count_is_explained(hf: Path) -> None:
    write_native(hf.parent / "native", hf, stacked=False, n_heads=4)
    with pytest.raises(TensorMismatch, match=r"attention\.wq\.weight.*expected \[40, 24\] = \(N P 2\) D"):
        Checkpoint.open(hf.parent / "native")
    assert np.prod([4, 10]) == 40
