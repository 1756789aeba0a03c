"""The reports of a pass, a failure, what is unchecked, and a crash, as they stand in tests/golden.

After a change that is meant: `pytest tests/parity/report/test_golden.py --force-regen`, and read the diff.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_regressions.file_regression import FileRegressionFixture
from rich.console import Console

from parity.report import html, json, junit, markdown, terminal
from parity.result import Result
from tests.parity.report.results import RESULTS

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def printed(result: Result) -> str:
    """Give what a terminal of 120 columns shows, without colours."""
    console = Console(width=120, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(terminal.render(result))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def page(result: Result) -> str:
    """Give report.html without its style and scripts, which are the same for every result."""
    without_style = re.sub(r"<style>.*?</style>", "<style/>", html.render(result), flags=re.DOTALL)
    return re.sub(r"<script>.*?</script>", "<script/>", without_style, flags=re.DOTALL)


RENDERED: dict[str, Callable[[Result], str]] = {
    "report.html": page,
    "report.md": markdown.render,
    "junit.xml": junit.render,
    "result.json": json.render,
    "terminal.txt": printed,
}


@pytest.mark.parametrize("file", RENDERED)
@pytest.mark.parametrize("kind", RESULTS)
def test_a_report_is_as_it_was(kind: str, file: str, file_regression: FileRegressionFixture) -> None:
    text = RENDERED[file](RESULTS[kind])
    file_regression.check(text, fullpath=GOLDEN / kind / file, encoding="utf-8", newline="")
