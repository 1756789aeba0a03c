"""Several processes compare one model, each a range of its layers: one result, that of a single process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert import BadInput, convert
from convert.share import Share
from parity.meeting import meeting
from parity.result import Result
from parity.runner import run
from parity.sides.flax import FlaxSide
from parity.trace import Array, Batch, Trace
from tests.checkpoints import write_checkpoint
from tests.convert.edit import edit_tensors
from tests.parity.recordings.test_recordings import said

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shares") / "mixtral"
    write_checkpoint(path, num_hidden_layers=LAYERS)
    return path


class LateFault(FlaxSide):
    """A port that is wrong in one layer, so that some tokens are routed otherwise from there on."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        return super().block(layer, x_BTD * (1.001 if layer == 1 else 1), batch, routing)


def share_of(folder: Path, number: int, count: int, *args: Any, **options: Any) -> tuple[Result, bool]:
    with meeting(folder, Share(number, count)) as met:
        result = run(*args, inputs="quick", meeting=met, **options)
        return result, not met.missing


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {}),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(2, {"side": LateFault}, marks=pytest.mark.slow),
        pytest.param(4, {"side": LateFault}, marks=pytest.mark.slow),
        pytest.param(2, {"dtype": "bfloat16", "generate": 3, "grad": True}, marks=pytest.mark.slow),
        pytest.param(3, {"dtype": "bfloat16", "side": LateFault}, marks=pytest.mark.slow),
    ],
)
def test_the_shares_say_what_a_single_process_says(
    checkpoint: Path, tmp_path: Path, count: int, options: dict[str, Any]
) -> None:
    numbers = [*range(2, count + 1), 1]
    results = [share_of(tmp_path, number, count, checkpoint, **options) for number in numbers]
    assert [over for _, over in results] == [False] * (count - 1) + [True]
    assert any("still missing: 1/" in note for note in results[-2][0].notes)
    assert said(results[-1][0]) == said(run(checkpoint, inputs="quick", **options))


def test_a_range_alone_would_say_something_else(checkpoint: Path) -> None:
    alone, whole = (run(checkpoint, inputs="quick", layers=layers).findings for layers in (range(2, LAYERS), None))
    drifted = [finding for finding in whole if finding.layer == 3 and finding.mode == "propagated"]
    assert drifted != [finding for finding in alone if finding.layer == 3 and finding.mode == "propagated"]


@pytest.mark.slow
def test_each_share_compares_the_weights_of_its_layers(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "flax")
    whole = run(checkpoint, tmp_path / "flax", inputs="quick")
    first, _ = share_of(tmp_path / "met", 1, 2, checkpoint, tmp_path / "flax")
    last, over = share_of(tmp_path / "met", 2, 2, checkpoint, tmp_path / "flax")
    assert over
    assert 0 < first.weights_compared < last.weights_compared == whole.weights_compared
    assert last.provenance["weights_sha256"] == whole.provenance["weights_sha256"]
    edit_tensors(
        tmp_path / "flax",
        lambda x: x.update({"model.layers.1.moe.experts.up": x["model.layers.1.moe.experts.gate"]}),
        "flax_model.safetensors",
    )
    whole = run(checkpoint, tmp_path / "flax", inputs="quick")
    share_of(tmp_path / "met", 2, 2, checkpoint, tmp_path / "flax")
    last, over = share_of(tmp_path / "met", 1, 2, checkpoint, tmp_path / "flax")
    assert over
    assert said(last) == said(whole)
    assert last.causes == whole.causes
    assert last.causes


def start(checkpoint: Path, report: Path, number: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "parity", "run", str(checkpoint), "--suite", "quick", "--json"]
    command += ["--report", str(report), "--share", f"{number}/{count}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_at_once_one_of_them_killed(checkpoint: Path, tmp_path: Path, count: int) -> None:
    running = [start(checkpoint, tmp_path, number, count) for number in range(1, count + 1)]
    killed = running.pop()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for process in running:
        own = json.loads(process.communicate(timeout=300)[0])
        assert process.returncode == 0
        assert any(f"{count}/{count}" in note for note in own["notes"] if "still missing" in note)
    assert not (tmp_path / "result.json").exists()
    again = start(checkpoint, tmp_path, count, count)
    again.communicate(timeout=300)
    assert again.returncode == 0
    whole = run(checkpoint, inputs="quick").to_json()
    found = json.loads((tmp_path / "result.json").read_text())
    for key in ("verdict", "first_divergence", "causes", "points", "router", "drift", "notes"):
        assert found[key] == json.loads(json.dumps(whole[key])), key


def test_parts_of_another_run_count_as_missing(checkpoint: Path, tmp_path: Path) -> None:
    first, _ = share_of(tmp_path, 1, 2, checkpoint, seed=1)
    assert first.verdict == "pass"
    _, over = share_of(tmp_path, 2, 2, checkpoint, seed=2)
    assert not over


def test_wrong_shares_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"share 1/5: the model has 4 layers"):
        share_of(tmp_path, 1, 5, checkpoint)
    with pytest.raises(BadInput, match=r"share 1/2: shares are of all layers, not of 1:2"):
        share_of(tmp_path, 1, 2, checkpoint, layers=range(1, 2))
