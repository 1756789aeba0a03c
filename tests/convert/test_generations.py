"""A checkpoint that transformers 4.57 wrote and one of 5.x, of the same weights, convert to identical bytes.

Those of 4.57 are in transformers_4_57, as scripts/write_with_4_57.py wrote them there.
"""

import json
from pathlib import Path

import pytest
import transformers

from convert import Checkpoint, convert

OLD = Path(__file__).parent / "transformers_4_57"


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, read and written again by the transformers that is installed."""
    path = tmp_path_factory.mktemp("five") / "hf"
    transformers.MixtralForCausalLM.from_pretrained(OLD / "safetensors", dtype="auto").save_pretrained(path)
    return path


def weights(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if "config" not in file.name}


@pytest.mark.parametrize("to", ["flax", "hf-legacy", "hf-fused", "mistral"])
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_both_generations_give_the_same_bytes(container: str, to: str, new: Path, tmp_path: Path) -> None:
    convert(OLD / container, tmp_path / "four", to=to)
    convert(new, tmp_path / "five", to=to)
    assert weights(tmp_path / "four") == weights(tmp_path / "five")
    assert "manifest.json" in weights(tmp_path / "four")
    assert Checkpoint.open(tmp_path / "four").config == Checkpoint.open(tmp_path / "five").config


def test_they_were_written_by_two_generations(new: Path) -> None:
    old, newer = (json.loads((path / "config.json").read_text()) for path in (OLD / "safetensors", new))
    assert old["transformers_version"].startswith("4.57.")
    assert newer["transformers_version"].startswith("5.")
    assert "rope_theta" in old
    assert "rope_parameters" in newer
