"""The proof of power: each planted fault is found, at its layer and at its point; no fault, no alarm."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import convert
from parity.faults import FAULTS, Fault, planted
from parity.result import Divergence
from parity.runner import run
from tests.checkpoints import write_checkpoint

LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "torch"
    write_checkpoint(path, num_hidden_layers=LAYERS, sliding_window=37)
    return path


def test_without_a_fault_there_is_no_alarm(checkpoint: Path) -> None:
    result = run(checkpoint, inputs="quick")
    assert result.verdict == "pass", [finding for finding in result.findings if finding.verdict != "pass"]
    assert result.first_divergence is None
    assert result.exit_code == 0


@pytest.mark.parametrize("layer", [0, LAYERS - 2])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.slug)
def test_each_fault_is_found_where_it_was_planted(checkpoint: Path, fault: Fault, layer: int) -> None:
    result = run(checkpoint, inputs="quick", flax_side=planted(fault, layer))
    assert result.exit_code == 1
    assert result.first_divergence == Divergence(layer, fault.point)
    local = {finding.layer for finding in result.findings if finding.mode == "local" and finding.verdict == "fail"}
    assert local == {layer}, "a local comparison blames the block at fault and no other"


def test_a_fault_in_the_converted_file_ends_with_exit_1(checkpoint: Path, tmp_path: Path) -> None:
    flax = tmp_path / "flax"
    convert(checkpoint, flax)
    weights = load_file(flax / "flax_model.safetensors")
    stem = "model.layers.2.moe.experts."
    weights[stem + "gate"], weights[stem + "up"] = weights[stem + "up"], weights[stem + "gate"]
    save_file(weights, flax / "flax_model.safetensors")
    command = [sys.executable, "-m", "parity", "run", str(checkpoint), str(flax), "--suite", "quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "first divergence: layer 2, expert.0.gate" in done.stdout
    assert "model.layers.2.moe.experts.gate" in done.stdout, "the weights that differ are listed"


def test_one_flipped_bit_fails_although_no_output_shows_it(checkpoint: Path, tmp_path: Path) -> None:
    flax = tmp_path / "flax"
    convert(checkpoint, flax)
    weights = load_file(flax / "flax_model.safetensors")
    kernel = weights["model.layers.1.attention.o.kernel"]
    kernel.reshape(-1)[5] = np.nextafter(kernel.reshape(-1)[5], np.float32(9))
    save_file(weights, flax / "flax_model.safetensors")
    result = run(checkpoint, flax, inputs="quick")
    assert result.exit_code == 1
    assert [difference.name for difference in result.differences] == ["model.layers.1.attention.o.kernel"]
    assert result.first_divergence == Divergence(1, "model.layers.1.attention.o.kernel")
