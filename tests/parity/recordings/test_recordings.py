"""Two machines that never meet: recorded, compared, interrupted and resumed as if both sides had run at once."""

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

from convert import BadInput
from parity.__main__ import cli
from parity.baseline import Baseline
from parity.metrics import Precision
from parity.recordings.compare import compare
from parity.recordings.detail import Detail
from parity.recordings.recorder import estimate_bytes, record
from parity.recordings.recording import Recording
from parity.result import Result
from parity.runner import run
from parity.sides.flax import FlaxSide
from parity.trace import Array, Batch, Trace
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[3]

LAYERS = 3


class NormTwice(FlaxSide):
    """A port that rounds one norm's output in one layer, and so routes some tokens otherwise."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        return super().block(layer, x_BTD * (1.001 if layer == 1 else 1), batch, routing)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recordings") / "mixtral"
    write_checkpoint(path, num_hidden_layers=LAYERS)
    return path


@pytest.fixture(scope="module")
def torch(checkpoint: Path) -> Path:
    return record(checkpoint, checkpoint.parent / "torch.trace", "torch", inputs="quick").path


@pytest.fixture(scope="module")
def torch_bfloat16(checkpoint: Path) -> Path:
    return record(checkpoint, checkpoint.parent / "torch-bf16.trace", "torch", inputs="quick", dtype="bfloat16").path


def said(result: Result) -> dict[str, Any]:
    """Everything that does not name machine, files or time."""
    raw = result.to_json()
    for key in ("environment", "provenance", "cost", "weights"):
        raw.pop(key)
    return raw


@pytest.mark.parametrize("side", [FlaxSide, NormTwice])
def test_compared_recordings_say_what_the_live_run_says(
    checkpoint: Path, torch: Path, tmp_path: Path, side: type[FlaxSide]
) -> None:
    live = run(checkpoint, inputs="quick", side=side)
    assert live.verdict == ("pass" if side is FlaxSide else "fail")
    flax = record(checkpoint, tmp_path / "flax.trace", "flax", reference=torch, side=side).path
    oracle = record(checkpoint, tmp_path / "oracle.trace", "oracle", reference=torch).path
    for compared in (
        compare(torch, flax, oracle),
        compare(torch, flax),
        run(checkpoint, inputs="quick", reference=torch, side=side),
    ):
        assert said(compared) == said(live)


def test_recordings_are_held_to_the_baseline_of_a_run(checkpoint: Path, torch: Path, tmp_path: Path) -> None:
    live = run(checkpoint, reference=torch)
    baseline = Baseline.of(live.dtype, live.findings, [], live.packages, live.provenance)
    record(checkpoint, tmp_path / "flax.trace", "flax", reference=torch)
    shrunk = replace(baseline, margins={key: margin / 2 for key, margin in baseline.margins.items()})
    for name, earlier in {"margins.json": baseline, "shrunk.json": shrunk}.items():
        earlier.write(tmp_path / name)

    def compared(name: str) -> Any:
        command = ["compare", str(torch), str(tmp_path / "flax.trace"), "--json", "--baseline", str(tmp_path / name)]
        return CliRunner().invoke(cli, command)

    same, worse, missing = compared("margins.json"), compared("shrunk.json"), compared("nothing.json")
    assert (same.exit_code, worse.exit_code, missing.exit_code) == (0, 1, 2)
    found = json.loads(same.stdout)["baseline"]
    assert (found["compared"], found["regressions"], found["changed"]) == (len(baseline.margins), [], {})
    grown = {(r["layer"], r["point"]) for r in json.loads(worse.stdout)["baseline"]["regressions"]}
    assert (1, "attn_out") in grown
    assert "does not exist" in missing.stderr


class Interrupted(FlaxSide):
    """Flax, until somebody presses Ctrl-C."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        if layer == 2:
            raise KeyboardInterrupt
        return super().block(layer, x_BTD, batch, routing)


def test_interrupted_and_resumed_is_as_if_never_interrupted(checkpoint: Path, torch: Path, tmp_path: Path) -> None:
    out = tmp_path / "flax.trace"
    with pytest.raises(KeyboardInterrupt):
        record(checkpoint, out, "flax", reference=torch, side=Interrupted)
    begun = compare(torch, out)
    assert begun.verdict == "unchecked"
    assert any("interrupted" in note for note in begun.notes)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    with (out / "answers.jsonl").open("a") as index:
        index.write('\n{"walk": "float32", "kind": "bl')  # a line that a crash tore
    record(checkpoint, out, "flax", reference=torch, resume=True)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items()), "what was there is not made again"
    assert said(compare(torch, out)) == said(run(checkpoint, inputs="quick"))


def test_in_bfloat16_both_walks_are_recorded_and_resumed(
    checkpoint: Path, torch_bfloat16: Path, tmp_path: Path
) -> None:
    torch, flax = torch_bfloat16, tmp_path / "flax.trace"
    with pytest.raises(KeyboardInterrupt):
        record(checkpoint, flax, "flax", reference=torch, side=Interrupted)
    assert compare(torch, flax).verdict == "unchecked"
    record(checkpoint, flax, "flax", reference=torch, resume=True)
    oracle = record(checkpoint, tmp_path / "oracle.trace", "oracle", reference=torch).path
    live = run(checkpoint, inputs="quick", dtype="bfloat16")
    assert live.verdict == "pass"
    assert {finding.dtype for finding in live.findings} == {"bfloat16", "float32"}
    for compared in (
        compare(torch, flax),
        compare(torch, flax, oracle),
        run(checkpoint, reference=torch, dtype="bfloat16"),
    ):
        assert said(compared) == said(live)


KILLED = """
import os, signal, sys
from parity.recordings import recording
from parity.__main__ import main

def counted(call, left=[int(sys.argv.pop(1))]):
    def killed(*arguments, **keywords):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)
    return killed

recording.Writer.write = counted(recording.Writer.write)
recording._sha256 = counted(recording._sha256)
main()
"""
"""Dies while a tensor is written, or between a file and its line in the index."""


def held(recording: Path) -> tuple[dict[str, str], list[Any]]:
    """Give every file of arrays with its SHA-256, and the index without the lines that were torn."""
    lines = [json.loads(line) for line in (recording / "answers.jsonl").read_text().splitlines() if line.endswith("}")]
    files = sorted(file for file in recording.rglob("*") if file.is_file() and file.suffix not in (".json", ".jsonl"))
    return {str(f.relative_to(recording)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}, lines


@pytest.mark.parametrize("calls", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 5, 6, 20, 52, 120))])
def test_a_recording_that_was_killed_goes_on(checkpoint: Path, torch: Path, tmp_path: Path, calls: int) -> None:
    out = tmp_path / "torch.trace"
    command = ["record", str(checkpoint), str(out), "--side", "torch", "--suite", "quick"]
    done = subprocess.run([sys.executable, "-c", KILLED, str(calls), *command], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert Recording.is_empty(out) == (calls == 1)
    record(checkpoint, out, "torch", inputs="quick", resume=True)
    assert held(out) == held(torch)


def test_layers_are_recorded_one_after_the_other(checkpoint: Path, torch: Path, tmp_path: Path) -> None:
    out = tmp_path / "torch.trace"
    record(checkpoint, out, "torch", inputs="quick", layers=range(0, 1))
    record(checkpoint, out, "torch", inputs="quick", layers=range(1, LAYERS), resume=True)
    assert said(run(checkpoint, reference=out)) == said(run(checkpoint, reference=torch))


def test_some_layers_alone(checkpoint: Path, torch: Path, tmp_path: Path) -> None:
    late = record(checkpoint, tmp_path / "late.trace", "torch", inputs="quick", layers=range(1, 2)).path
    assert not [file for file in late.rglob("*.safetensors") if "block-000" in file.name]
    live, recorded, cut = (
        run(checkpoint, inputs="quick", layers=range(1, 2)),
        run(checkpoint, reference=late),
        run(checkpoint, reference=torch, layers=range(1, 2)),
    )
    assert {finding.layer for finding in live.findings} == {1}
    assert live.verdict == "pass"
    assert any("only layers 1:2" in note for note in live.notes)
    assert said(live) == said(recorded) == said(cut)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_of_tokens_is_judged_and_said(checkpoint: Path, tmp_path: Path, dtype: Precision) -> None:
    detail = Detail(tokens=16)
    torch = record(checkpoint, tmp_path / "torch.trace", "torch", inputs="quick", dtype=dtype, detail=detail).path
    flax = record(checkpoint, tmp_path / "flax.trace", "flax", reference=torch, side=NormTwice).path
    oracle = record(checkpoint, tmp_path / "oracle.trace", "oracle", reference=torch).path
    result = compare(torch, flax, oracle)
    assert said(result) == said(compare(torch, flax))
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.layer == 1
    assert any("16 tokens" in note for note in result.notes)
    sound = run(checkpoint, reference=torch, dtype=dtype)
    unchecked = {finding.mode for finding in sound.findings if finding.verdict == "unchecked" and finding.decides}
    # In bfloat16 single operations are run on torch's input too, of which they need every token.
    assert unchecked == (set() if dtype == "float32" else {"operation"})
    assert sound.verdict == ("pass" if dtype == "float32" else "unchecked")


def test_what_was_recorded_in_bfloat16_informs_where_it_passes(checkpoint: Path, tmp_path: Path) -> None:
    torch = record(checkpoint, tmp_path / "torch.trace", "torch", inputs="quick", detail=Detail(bfloat16=True)).path
    result = run(checkpoint, reference=torch)
    assert result.verdict == "pass"
    decides = {finding.point: finding.decides for finding in result.findings if finding.mode == "local"}
    assert decides["resid_out"]
    assert not decides["q"]
    assert any("bfloat16" in note for note in result.notes)


def test_recordings_are_plain_safetensors(checkpoint: Path, torch: Path) -> None:
    with safe_open(torch / "float32" / "batch-0" / "block-001.safetensors", framework="np") as file:
        assert {"resid_in", "q", "router_ids", "expert.0.down", "resid_out", "rows.0"} <= set(file.keys())
        assert np.isfinite(file.get_tensor("resid_in")).all()


def test_the_estimate_is_close(checkpoint: Path, torch: Path) -> None:
    recording = Recording.open(torch)
    written = sum(file.stat().st_size for file in torch.rglob("*.safetensors"))
    estimate = estimate_bytes(recording.config, recording.batches, "float32", recording.layers, Detail(), "torch")
    assert 0.7 < written / estimate < 1.3


def test_a_damaged_recording_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    torch = record(checkpoint, tmp_path / "torch.trace", "torch", inputs="quick").path
    victim = torch / "float32" / "batch-0" / "block-001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(BadInput, match=r"block-001\.safetensors.*damaged"):
        run(checkpoint, reference=torch)


def test_recordings_that_do_not_belong_together_are_refused(checkpoint: Path, torch: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="exists already"):
        record(checkpoint, torch, "torch", inputs="quick")
    with pytest.raises(BadInput, match="another seed"):
        record(checkpoint, torch, "torch", inputs="quick", seed=1, resume=True)
    other = tmp_path / "other"
    write_checkpoint(other, num_hidden_layers=LAYERS, seed=1)
    with pytest.raises(BadInput, match="is not what"):
        run(other, reference=torch)
    stranger = record(checkpoint, tmp_path / "flax.trace", "flax", inputs="quick").path
    result = compare(torch, stranger)
    assert result.verdict == "unchecked"
    assert any("--reference" in note for note in result.notes)
    assert json.loads((torch / "manifest.json").read_text())["complete"]
