"""Orbax and back, bit for bit; Orbax's own StandardCheckpointer reads what is written, and its own is read."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from click.testing import CliRunner

from convert import Checkpoint, UnreadableCheckpoint, convert
from convert.__main__ import cli
from convert.io.files import ORBAX
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize("case", [{"dtype": "bfloat16"}, {"architecture": "MixtralModel"}])
def test_there_and_back(case: dict[str, str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", **case)
    report = convert(
        tmp_path / "hf", tmp_path / "orbax", container="orbax", verify_written=True, max_shard_bytes=50_000
    )
    assert report.verified
    assert {path.name for path in (tmp_path / "orbax").iterdir()} >= {ORBAX, "config.json", "manifest.json"}
    assert not list((tmp_path / "orbax").glob("*.safetensors*"))
    assert Checkpoint.open(tmp_path / "orbax").layout == "flax"
    convert(tmp_path / "orbax", tmp_path / "flax")
    convert(tmp_path / "hf", tmp_path / "wanted")
    file = "flax_model.safetensors"
    assert (tmp_path / "flax" / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()


def test_standard_checkpointer_reads_and_writes_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "orbax", container="orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((tmp_path / "orbax" / ORBAX).absolute())
    gate = np.asarray(tree["model"]["layers"]["1"]["moe"]["experts"]["gate"])
    assert (gate.dtype, gate.shape) == (ml_dtypes.bfloat16, (5, 24, 40))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "theirs" / ORBAX).absolute(), tree)
        checkpointer.wait_until_finished()
    convert(tmp_path / "theirs", tmp_path / "back", to="hf-legacy")
    convert(tmp_path / "hf", tmp_path / "wanted", to="hf-legacy")
    file = "model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()


def test_what_is_no_orbax_checkpoint_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / ORBAX).mkdir()
    (tmp_path / "hf" / ORBAX / "_METADATA").write_text(json.dumps({"tree_metadata": 3}))
    with pytest.raises(UnreadableCheckpoint, match="no readable Orbax checkpoint"):
        Checkpoint.open(tmp_path / "hf")


def test_orbax_is_for_flax_alone() -> None:
    done = CliRunner().invoke(cli, ["x", "y", "--to", "hf-legacy", "--container", "orbax"])
    assert done.exit_code == 2
    assert "for --to flax" in done.stderr
