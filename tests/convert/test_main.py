"""The command line: arguments, exit codes, one message and no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from convert import execute
from convert.__main__ import cli
from tests.checkpoints import write_checkpoint
from tests.convert.edit import edit_tensors, split, stored

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "hf")
    return tmp_path / "hf"


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def command(*args: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "convert", *map(str, args)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)


def test_converts_in_a_process(hf: Path) -> None:
    done = command(hf, hf.parent / "flax")
    assert (done.returncode, done.stderr) == (0, "")
    assert "hf-legacy -> flax: 33 tensors, 240,384 bytes in 1 file written" in done.stdout
    assert (hf.parent / "flax" / "flax_model.safetensors").exists()


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [("missing expert", "experts.2.w1.weight"), ("truncated", "truncated inside tensor 'model.layers.1.")],
)
def test_bad_input_in_a_process(fault: str, complaint: str, hf: Path) -> None:
    if fault == "missing expert":
        edit_tensors(hf, lambda x: [x.pop(f"model.layers.1.block_sparse_moe.experts.2.w{i}.weight") for i in (1, 2, 3)])
    else:
        split(hf, lambda name: int("layers.1." in name))
        shard = hf / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
    done = command(hf, hf.parent / "flax")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("mixtral-convert: ")
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]


def test_back_to_hf_with_json(hf: Path) -> None:
    assert invoke(hf, hf.parent / "flax").exit_code == 0
    done = invoke(hf.parent / "flax", hf.parent / "back", "--to", "hf-legacy", "--json")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["written"] is True
    assert (report["plan"]["from"], report["plan"]["to"]) == ("flax", "hf-legacy")
    assert stored(hf.parent / "back").keys() == stored(hf).keys()


def test_dry_run_prints_the_plan(hf: Path) -> None:
    done = invoke(hf, hf.parent / "flax", "--dry-run")
    assert done.exit_code == 0
    assert "lm_head.kernel  float32 [24, 101]  from lm_head.weight" in done.stdout
    assert not (hf.parent / "flax").exists()


def test_losses_are_printed(hf: Path) -> None:
    edit_tensors(hf, lambda x: x.update({"model.norm.weight": x["model.norm.weight"] * 1e30}))
    done = invoke(hf, hf.parent / "flax", "--dtype", "float16")
    assert "model.final_norm.scale: 24 of 24 values became infinite" in done.stdout
    assert "values rounded" in done.stdout


def test_inspect(hf: Path) -> None:
    text = invoke("inspect", hf)
    assert text.exit_code == 0
    for fact in ("MixtralForCausalLM", "hf-legacy", "float32 (69 tensors)", "60,096", "model.safetensors"):
        assert fact in text.stdout
    facts = json.loads(invoke("inspect", hf, "--json").stdout)
    assert facts["tensors"]["lm_head.weight"] == {"dtype": "float32", "shape": [101, 24], "file": "model.safetensors"}


def test_inspect_refuses_as_convert_does(tmp_path: Path) -> None:
    done = invoke("inspect", tmp_path)
    assert done.exit_code == 3
    assert "config.json" in done.stderr


def test_config_error_is_bad_input(hf: Path) -> None:
    (hf / "config.json").write_text('{"model_type": "llama"}')
    done = invoke(hf, hf.parent / "flax")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "llama" in done.stderr


def test_interruption_exits_5(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "_write_config", interrupt)
    done = invoke(hf, hf.parent / "flax")
    assert done.exit_code == 5
    assert "interrupted" in done.stderr
    assert "--resume" in done.stderr
    assert not (hf.parent / "flax").exists()
    monkeypatch.undo()
    assert invoke(hf, hf.parent / "flax", "--resume", "--verify").exit_code == 0
    assert {path.name for path in hf.parent.iterdir()} == {"hf", "flax"}


@pytest.mark.parametrize(
    "args",
    [["x"], ["x", "y", "z"], ["x", "y", "--to", "gguf"], ["x", "y", "--dtype", "int8"], ["x", "y", "--really"]],
)
def test_wrong_usage_exits_2(args: list[str]) -> None:
    assert invoke(*args).exit_code == 2


def test_help_shows_examples_and_loads_no_numpy() -> None:
    assert "mixtral-convert inspect Mixtral-8x7B" in invoke("--help").stdout
    assert "--dry-run" in invoke("convert", "--help").stdout
    probe = "import sys, convert, convert.__main__; print([m for m in ('numpy', 'jax', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
