"""How the subcommands that compare end: report, table or JSON, and the exit code."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from parity.result import Result

__all__ = ["show"]


def show(result: "Result", report: Path | None, as_json: bool) -> NoReturn:
    """Write result.json where that was asked for, print, and exit with the verdict's code."""
    from parity.report import json as json_report

    rendered = json_report.render(result)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        (report / "result.json").write_text(rendered)
    if as_json:
        click.echo(rendered, nl=False)
    else:
        from rich.console import Console

        from parity.report import terminal

        Console(highlight=False).print(terminal.render(result))
    sys.exit(result.exit_code)
