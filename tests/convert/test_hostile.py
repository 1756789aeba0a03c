"""Damaged checkpoints: each is read or refused with one message, within a second, and no other file is opened."""

import builtins
import io
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import BadInput, Checkpoint, ConfigError
from convert.errors import printable
from tests.checkpoints import write_checkpoint
from tests.convert.edit import split, stored
from tests.convert.mutations import damage, damage_json, damage_zip

SECONDS = 1.0
"""Of this process, as the machine may be busy with others; most cases take some milliseconds."""

TARGETS = (
    "model-00001-of-00002.safetensors",
    "model-00001-of-00002.safetensors: header",
    "model.safetensors.index.json",
    "config.json",
    "pytorch_model.bin",
    "pytorch_model.bin: pickle",
    "params.json",
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Files of three small checkpoints, by the target that is to be damaged."""
    root = tmp_path_factory.mktemp("hostile")
    write_checkpoint(root / "hf", num_hidden_layers=1, num_local_experts=2, vocab_size=11)
    (root / "bin").mkdir()
    (root / "bin" / "config.json").write_bytes((root / "hf" / "config.json").read_bytes())
    torch.save(stored(root / "hf"), root / "bin" / "pytorch_model.bin")
    from convert import convert

    convert(root / "hf", root / "mistral", to="mistral")
    (root / "mistral" / "config.json").unlink()
    split(root / "hf", lambda name: int("layers" in name))
    folders = {"pytorch_model.bin": "bin", "pytorch_model.bin: pickle": "bin", "params.json": "mistral"}
    contents = {name: {f.name: f.read_bytes() for f in (root / name).iterdir()} for name in ("hf", "bin", "mistral")}
    return {target: contents[folders.get(target, "hf")] for target in TARGETS}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every path that is opened by Python code."""
    paths: set[str] = set()
    for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
        honest = getattr(module, name)

        def watching(path: Any, *args: Any, honest: Any = honest, **kwargs: Any) -> Any:
            paths.add(os.fspath(path) if not isinstance(path, int) else "")
            return honest(path, *args, **kwargs)

        monkeypatch.setattr(module, name, watching)
    return paths


def damaged(target: str, files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    name, _, part = target.partition(": ")
    data = files[name]
    if part == "header":
        length = int.from_bytes(data[:8], "little")
        header = damage_json(data[8 : 8 + length], rng)
        new = len(header).to_bytes(8, "little") + header + data[8 + length :]
    elif part == "pickle":
        new = damage_zip(data, rng)
    elif name.endswith(".json") and rng.random() < 0.8:
        new = damage_json(data, rng)
    else:
        new = damage(data, rng, 4000 if name.endswith(".safetensors") else len(data))
    return {**files, name: new}


def refusal(folder: Path, case: str) -> str:
    """Read every tensor; give the message if that is refused, and fail on anything but a refusal."""
    try:
        for tensor in Checkpoint.open(folder).view("flax").values():
            tensor.tobytes()
    except (BadInput, ConfigError) as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    return ""


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damage_is_refused_or_harmless(
    cases: int, pristine: dict[str, dict[str, bytes]], tmp_path: Path, opened: set[str]
) -> None:
    refused = 0
    for case in range(cases):
        rng = random.Random(case)
        target = TARGETS[case % len(TARGETS)]
        files = damaged(target, pristine[target], rng)
        folder = tmp_path / "x"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        opened.clear()
        started = time.process_time()
        message = refusal(folder, f"case {case}, {target}")
        assert time.process_time() - started < SECONDS, (case, target)
        assert {Path(path).parent for path in opened} <= {folder}, (case, target, opened)
        assert len(printable(message).encode()) < 10_000, (case, target)
        refused += bool(message)
    assert refused > cases / 2


def test_the_watch_sees_what_is_opened(opened: set[str], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    os.close(os.open(tmp_path / "x", os.O_RDONLY))
    assert opened == {str(tmp_path / "x")}


@pytest.mark.parametrize("header", [b'{"__metadata__":' + b"[" * 3_000_000, b'{"a":0,' * 1_000_000, b" " * 10_000_001])
def test_huge_headers_are_refused_within_a_second(header: bytes, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    started = time.process_time()
    with pytest.raises(BadInput):
        Checkpoint.open(tmp_path / "hf")
    assert time.process_time() - started < SECONDS
