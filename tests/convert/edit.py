"""Rewrite checkpoints on disk, so that a test can plant what it wants refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["edit_config", "edit_tensors", "split", "stored"]

Tensors = dict[str, torch.Tensor]


def stored(path: Path) -> Tensors:
    """Every tensor of every safetensors file in a directory, as the safetensors library reads them."""
    return {name: x for file in sorted(path.glob("*.safetensors")) for name, x in load_file(file).items()}


def edit_tensors(path: Path, change: Callable[[Tensors], Any], file: str = "model.safetensors") -> None:
    tensors = load_file(path / file)
    change(tensors)
    save_file({name: x.clone().contiguous() for name, x in tensors.items()}, path / file, metadata={"format": "pt"})


def edit_config(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **keys}))


def split(path: Path, home: Callable[[str], int], files: int = 2) -> None:
    """Turn model.safetensors into shards with an index; `home` gives the number of a tensor's shard."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    for i, name in enumerate(names):
        save_file({n: x for n, x in tensors.items() if home(n) == i}, path / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: names[home(n)] for n in tensors}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
