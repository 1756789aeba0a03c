"""Ids of repositories: a directory always wins, and what cannot be fetched is said."""

import sys
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner

from convert.__main__ import cli
from convert.errors import UnreadableCheckpoint
from convert.hub import resolve
from tests.checkpoints import write_checkpoint

ID = "mistralai/Mixtral-8x7B-v0.1"


def test_a_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistralai" / "Mixtral-8x7B-v0.1").mkdir(parents=True)
    assert resolve(ID) == Path(ID)


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "/a/b", "../a", "a/..", "a/b\n", ""])
def test_what_is_no_id_is_a_path(path: str) -> None:
    assert resolve(path) == Path(path)


def test_offline_is_bad_input_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["inspect", "nobody/nothing-of-this-name"])
    assert done.exit_code == 3
    assert "cannot be fetched" in done.stderr
    assert "hf download" in done.stderr


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnreadableCheckpoint, match="pip install huggingface_hub"):
        resolve(ID)


@pytest.mark.parametrize(
    ("names", "fetched"),
    [
        (["model-00001-of-00002.safetensors", "pytorch_model.bin", "consolidated.00.pt"], "model*.safetensors"),
        (["pytorch_model.bin", "consolidated.00.pt", "config.json"], "pytorch_model*"),
        (["consolidated.safetensors", "params.json"], "*.safetensors"),
        (["consolidated.00.pth", "params.json"], "consolidated*.pth"),
    ],
)
def test_one_copy_of_the_weights_is_fetched(
    names: list[str], fetched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "cache")
    asked: list[str] = []

    def download(source: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, source: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    done = CliRunner().invoke(cli, [ID, str(tmp_path / "flax")])
    assert done.exit_code == 0, done.output
    assert fetched in asked
    assert sum(pattern in asked for pattern in ("model*.safetensors", "pytorch_model*", "consolidated*.pt")) <= 1
