"""mixtral-parity selftest."""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parity.commands.progress import progress_bar

if TYPE_CHECKING:
    from parity.inputs import Suite
    from parity.metrics import Precision

__all__ = ["selftest"]

EXAMPLES = """
\b
Examples:
  mixtral-parity selftest                               on a small random model
  mixtral-parity selftest torch-checkpoint/ --dtype float32
"""


@click.command(epilog=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(["float32", "bfloat16"]),
    multiple=True,
    default=("float32", "bfloat16"),
    show_default=True,
    help="May be given twice.",
)
@click.option("--suite", type=click.Choice(["quick", "standard", "long"]), default="standard", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the token ids, and of a drawn checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON instead of the table.")
def selftest(
    checkpoint: Path | None, dtypes: "tuple[Precision, ...]", suite: "Suite", seed: int, as_json: bool
) -> None:
    """Plant the known faults into CHECKPOINT's model and see whether each is found, and where.

    Without CHECKPOINT, a small random model is drawn. Exit code 1 says that a fault was missed or misplaced, or that a
    change which is no fault was taken for one.
    """
    from convert import Checkpoint
    from parity.drawn import draw
    from parity.selftest.courts import hold_courts
    from parity.selftest.trials import Row, passed, steps, to_json

    with tempfile.TemporaryDirectory() as folder, progress_bar() as progress:
        path = checkpoint if checkpoint is not None else draw(Path(folder) / "drawn", seed=seed)
        Checkpoint.open(path)  # says at once what is wrong with it
        rows: list[Row] = []
        dtypes = tuple(dict.fromkeys(dtypes))
        total = steps(dtypes)
        progress("first compilations", 0, total)
        for row in hold_courts(path, dtypes=dtypes, inputs=suite, seed=seed):
            rows.append(row)
            progress(row.slug, len(rows), total)
    rows.sort(key=lambda row: dtypes.index(row.dtype))
    if as_json:
        click.echo(json.dumps([to_json(row) for row in rows], indent=1))
    else:
        from rich.console import Console

        from parity.report import selftest as report

        Console(highlight=False).print(report.render(rows))
    sys.exit(0 if passed(rows) else 1)
