"""The pytest plugin: the fixture `assert_parity`, and `--parity-report DIR` for the reports of every comparison.

Loaded by pytest wherever the package is installed; nothing heavy is imported before a comparison is made.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from parity.result import Result

__all__ = ["assert_parity", "pytest_addoption"]

MOST_LINES = 10
"""Of a failing test's message."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--parity-report`."""
    group = parser.getgroup("parity", "Flax against PyTorch")
    group.addoption(
        "--parity-report",
        metavar="DIR",
        type=Path,
        default=None,
        help="write report.html, report.md, junit.xml and result.json of every assert_parity to DIR/TEST/",
    )


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> "Callable[..., Result]":
    """Give `assert_parity(torch_checkpoint, flax_checkpoint=None, **options) -> Result`.

    It compares as `parity.run` does, whose options it takes, and fails the test unless everything passes: also where
    something could not be checked.
    """
    calls = 0

    def compare(torch_checkpoint: str | Path, flax_checkpoint: str | Path | None = None, **options: Any) -> "Result":
        nonlocal calls
        __tracebackhide__ = True
        from parity.runner import run

        result = run(torch_checkpoint, flax_checkpoint, **options)
        # The command line may have run any number of tests, and a worker of pytest-xdist has none.
        result = replace(result, provenance={**result.provenance, "command": ["pytest", request.node.nodeid]})
        reports = request.config.getoption("parity_report", None)
        written = None
        if reports is not None:
            from parity.report.folder import write

            # A folder of its own for each comparison: workers of pytest-xdist do not meet.
            written = reports / (_folder(request.node.nodeid) + ("" if calls == 0 else f"-{calls + 1}"))
            write(result, written)
        calls += 1
        if result.verdict != "pass":
            pytest.fail(_message(result, written), pytrace=False)
        return result

    return compare


def _folder(nodeid: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", nodeid).strip("-")


def _message(result: "Result", written: Path | None) -> str:
    """Say where, by how much and why, in ten lines."""
    from parity.report.summary import cause_line, failures, headline, place, title

    lines = [f"parity: {result.verdict}. {title(result)}.", *headline(result)]
    lines += [f"cause: {cause_line(cause)}" for cause in result.causes[:2]]
    last = [f"report: {written / 'report.html'}" if written else "--parity-report DIR writes the whole report"]
    wrong = failures(result)
    room = MOST_LINES - len(lines) - len(last)
    for finding in wrong[: max(room, 0)]:
        margin = "" if finding.margin is None else f", margin {finding.margin:.3g}"
        lines.append(f"  {finding.verdict}: {place(finding.layer, finding.point)} ({finding.mode}{margin})")
    return "\n".join([*(" ".join(line.split("\n")) for line in lines[: MOST_LINES - 1]), *last])
