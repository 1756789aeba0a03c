"""How the subcommands that compare end: reports, table or JSON, and the exit code."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from parity.result import Result

__all__ = ["reported", "show"]


def show(result: "Result", report: Path | None, as_json: bool, quiet: bool = False) -> NoReturn:
    """Write the reports where they were asked for, print, and exit with the verdict's code.

    Args:
        result: of the run.
        report: the directory to write.
        as_json: print result.json instead of the table.
        quiet: print the verdict alone.
    """
    from rich.console import Console

    from parity.report import json as json_report
    from parity.report import terminal

    if report is not None:
        from parity.report.folder import write

        write(result, report)
    if as_json:
        click.echo(json_report.render(result), nl=False)
    else:
        Console(highlight=False).print(terminal.verdict(result) if quiet else terminal.render(result))
    sys.exit(result.exit_code)


@contextmanager
def reported(report: Path | None) -> Iterator[None]:
    """Write reports also of a run that ends in an error: a CI job shows the last ones, and they must not be old."""
    try:
        yield
    except Exception as error:
        if report is not None:
            from convert import BadInput
            from flax_mixtral.config import ConfigError
            from parity.report.folder import write
            from parity.result import Result

            foreseen = isinstance(error, (BadInput, ConfigError, click.ClickException))
            write(Result.stopped(str(error) if foreseen else traceback.format_exc()), report)
        raise
