"""The pytest plugin, in a repository of its own: tests/demo, run in a subprocess."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from parity.report.folder import FILES
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "torch"
    write_checkpoint(path, num_hidden_layers=1)
    return path


def pytest_in_demo(checkpoint: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in tests/demo, with no plugin but ours and xdist."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-c", os.devnull, f"--rootdir={ROOT / 'tests' / 'demo'}"]
    command += [
        "-p",
        "parity.pytest_plugin",
        "-p",
        "xdist",
        "-p",
        "no:cacheprovider",
        f"--junitxml={out / 'pytest.xml'}",
    ]
    return subprocess.run(
        [*command, *arguments, "test_port.py"],
        cwd=ROOT / "tests" / "demo",
        env={
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(ROOT),
            "DEMO_CHECKPOINT": str(checkpoint),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def messages(out: Path) -> dict[str, str]:
    """Give what each failing test said."""
    cases = ElementTree.parse(out / "pytest.xml").iter("testcase")
    return {case.get("name", ""): case.findtext("failure", "") for case in cases}


@pytest.fixture(scope="module", params=[0, pytest.param(2, marks=pytest.mark.slow)], ids=["alone", "xdist"])
def demo(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    done = pytest_in_demo(checkpoint, out, "-n", str(request.param), "--parity-report", str(out / "reports"))
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "2 failed" in done.stdout
    return out


def test_every_comparison_has_its_reports(demo: Path) -> None:
    verdicts = {}
    commands = set()
    for folder in (demo / "reports").iterdir():
        assert {path.name for path in folder.iterdir()} == FILES.keys()
        result = json.loads((folder / "result.json").read_text())
        verdicts[folder.name] = result["verdict"]
        commands.add(" ".join(result["provenance"]["command"]))
    assert verdicts == {
        "test_port.py-test_a_right_port": "pass",
        "test_port.py-test_a_wrong_port": "fail",
        "test_port.py-test_a_port_that_shows_a_part": "unchecked",
    }
    assert "pytest test_port.py::test_a_right_port" in commands


def test_a_failure_says_where_by_how_much_and_why_in_ten_lines(demo: Path) -> None:
    said = messages(demo)
    assert said["test_a_right_port"] == ""
    wrong, part = said["test_a_wrong_port"].splitlines(), said["test_a_port_that_shows_a_part"].splitlines()
    assert max(len(wrong), len(part)) <= 10
    assert wrong[0] == "parity: fail. Flax does not compute what PyTorch computes."
    assert "layer 0, attn_out" in wrong[1]
    assert "times as far from the exact answer as PyTorch, and 10 is allowed" in wrong[1]
    assert wrong[2].startswith("cause: ")
    assert wrong[-1].endswith("report.html")
    assert part[0] == "parity: unchecked. Not everything could be checked."
    assert any("layer 0, q: " in line for line in part)


@pytest.mark.slow
def test_without_the_option_nothing_is_written(checkpoint: Path, tmp_path: Path) -> None:
    done = pytest_in_demo(checkpoint, tmp_path, "-k", "part")
    assert "1 failed" in done.stdout, done.stdout + done.stderr
    assert "--parity-report DIR writes the whole report" in messages(tmp_path)["test_a_port_that_shows_a_part"]
    assert {path.name for path in tmp_path.iterdir()} == {"pytest.xml"}


def test_the_package_brings_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"parity": "parity.pytest_plugin"}
