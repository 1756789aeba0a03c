"""The command mixtral-parity: table, result.json and exit codes, through real processes."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jsonschema
import pytest

from convert import convert
from parity.__main__ import main
from parity.baseline import Baseline
from parity.points import block_points
from parity.report.folder import FILES
from parity.report.json import schema
from parity.runner import run
from tests.checkpoints import write_checkpoint


class Done(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


Parity = Callable[..., Done]


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Parity:
    """Run the command in this process, by its entry point."""

    def run_command(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["mixtral-parity", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run_command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("main") / "torch"
    write_checkpoint(path, num_hidden_layers=2)
    return path


def test_run_prints_the_verdict_and_writes_result_json(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "parity", "run", str(checkpoint), "--suite", "quick"]
    command += ["--report", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verdict: pass, worst margin" in done.stdout
    assert "\x1b[" not in done.stdout + done.stderr, "no colour and no bar when piped"
    result = json.loads((tmp_path / "report" / "result.json").read_text())
    assert result["schema_version"] == 1
    assert result["verdict"] == "pass"
    assert result["first_divergence"] is None
    assert {"causes", "points", "router", "environment", "provenance", "cost"} <= result.keys()
    assert {"layer", "point", "mode", "margin", "verdict"} <= result["points"][0].keys()
    assert {"agreement", "flips", "excused", "min_margin"} <= result["router"][0].keys()
    assert {"seconds", "peak_bytes"} == result["cost"]["torch"].keys()
    assert result["environment"]["packages"]["torch"] is not None
    jsonschema.validate(result, schema())
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES.keys()


def test_quiet_prints_the_verdict_alone(checkpoint: Path, parity: Parity) -> None:
    done = parity("run", checkpoint, "--suite", "quick", "--quiet")
    assert done.stdout.startswith("verdict: pass, worst margin")
    assert "layer  local" not in done.stdout
    assert not done.stderr


def test_a_baseline_is_held_to(checkpoint: Path, tmp_path: Path, parity: Parity) -> None:
    path = tmp_path / "margins.json"
    result = run(checkpoint, inputs="quick")
    made = Baseline.of(result.dtype, result.findings, [], result.environment, result.provenance)
    made.write(path)
    assert parity("run", checkpoint, "--suite", "quick", "--baseline", path).returncode == 0
    # As if Flax had once been 100 times as close.
    replace(made, margins={key: margin / 100 for key, margin in made.margins.items()}).write(path)
    done = parity("run", checkpoint, "--suite", "quick", "--baseline", path)
    assert done.returncode == 1
    assert "noise explains" in done.stdout


def test_a_run_that_stops_leaves_reports_of_that(
    checkpoint: Path, tmp_path: Path, parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an earlier run would say that all is well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_port.py").write_text("def side(config, weights):\n    return 1 / 0\n")
    for arguments, code, word in (
        ((checkpoint, "--suite", "quick", "--flax-side", "broken_port:side"), 4, "ZeroDivisionError"),
        ((tmp_path / "nothing",), 3, "config.json"),
        ((checkpoint, "--text", "a", "--input-ids", "b"), 2, "exclude each other"),
    ):
        report = tmp_path / f"report-{code}"
        done = parity("run", *arguments, "--report", report)
        assert done.returncode == code, done.stderr
        result = json.loads((report / "result.json").read_text())
        assert result["verdict"] == "unchecked"
        assert word in result["error"]
        assert word in done.stderr


def test_json_goes_to_stdout_alone(checkpoint: Path, parity: Parity) -> None:
    done = parity("run", checkpoint, "--suite", "quick", "--json")
    assert json.loads(done.stdout)["verdict"] == "pass"


def test_a_checkpoint_that_transformers_does_not_load_is_refused(
    checkpoint: Path, tmp_path: Path, parity: Parity
) -> None:
    convert(checkpoint, tmp_path / "flax")
    done = parity("run", tmp_path / "flax", "--suite", "quick")
    assert done.returncode == 3
    assert "has the layout flax" in done.stderr
    assert "--to hf-legacy" in done.stderr


def test_every_point_is_compared_in_every_block(checkpoint: Path) -> None:
    result = run(checkpoint, inputs="quick")
    config_points = {"embed", "final_norm", "logits", "loss", "aux_loss"}
    from convert import Checkpoint

    expected = [name for name, _ in block_points(Checkpoint.open(checkpoint).config)]
    for layer in (0, 1):
        for mode in ("local", "propagated"):
            found = [f.point for f in result.findings if f.layer == layer and f.mode == mode]
            assert found == (expected if mode == "propagated" else expected[:-1])  # the lens is of the own stream
    assert config_points <= {finding.point for finding in result.findings if finding.layer is None}
    assert {f.mode for f in result.findings if f.point == "logits"} == {"local", "propagated", "reference", "whole"}


def test_token_ids_from_a_file(checkpoint: Path, tmp_path: Path, parity: Parity) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([[5, 6, 7, 8, 9, 10, 11], [1, 2, 3]]))
    done = parity("run", checkpoint, "--input-ids", ids, "--json")
    assert done.returncode == 0, done.stdout[-2000:]
    assert json.loads(done.stdout)["provenance"]["inputs"][0]["real_tokens"] == 10


@pytest.mark.parametrize("content", ["[[1, 2], [3, 101]]", "{}", "[]", "[1.5]", "not json", "[[]]"])
def test_token_ids_that_are_none_are_refused(checkpoint: Path, tmp_path: Path, content: str, parity: Parity) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(content)
    done = parity("run", checkpoint, "--input-ids", ids)
    assert done.returncode == 3
    assert "ids.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input_is_one_message(checkpoint: Path, tmp_path: Path, parity: Parity) -> None:
    write_checkpoint(tmp_path / "other", num_hidden_layers=3)
    for arguments, word in (
        ((tmp_path / "nothing",), "config.json"),
        ((checkpoint, tmp_path / "other"), "num_hidden_layers"),
        ((checkpoint, "--text", "hello"), "tokenizer.json"),
    ):
        done = parity("run", *arguments, "--suite", "quick")
        assert done.returncode == 3, (arguments, done.stderr)
        assert word in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("walk",), ("run",), ("run", "x", "--suite", "huge")])
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...], parity: Parity) -> None:
    assert parity(*arguments).returncode == 2


def test_help_has_examples(parity: Parity) -> None:
    done = parity("run", "--help")
    assert done.returncode == 0
    assert "mixtral-parity run torch-checkpoint/ flax-checkpoint/" in done.stdout
