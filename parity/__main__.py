"""The command mixtral-parity."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from parity.inputs import Suite
    from parity.metrics import Precision
    from parity.runner import Progress
    from parity.trace import Batch

__all__ = ["main"]

BAD_INPUT, INTERRUPTED = 3, 5

EXAMPLES = """
\b
Examples:
  mixtral-parity run torch-checkpoint/ flax-checkpoint/
  mixtral-parity run torch-checkpoint/ --suite quick          map to Flax in memory
  mixtral-parity run torch-checkpoint/ --report report/       write report/result.json

\b
Exit codes: 0 pass, 1 parity failed, 2 usage, 3 bad input, 4 not everything could be checked, 5 interrupted.
"""


SELFTEST_EXAMPLES = """
\b
Examples:
  mixtral-parity selftest                               on a small random model
  mixtral-parity selftest torch-checkpoint/ --dtype float32
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(package_name="flax-mixtral")
def cli() -> None:
    """Compare Flax's Mixtral with PyTorch's, block by block, against an exact float64 run."""


@cli.command(epilog=EXAMPLES)
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("flax", type=click.Path(path_type=Path), required=False)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What both sides compute in; a bfloat16 run also walks in float32.",
)
@click.option(
    "--suite",
    type=click.Choice(["quick", "standard", "long"]),
    default="standard",
    show_default=True,
    help="How many tokens: some 100, some 2 x 900, or longer than the sliding window.",
)
@click.option("--input-ids", type=click.Path(path_type=Path), help="JSON list of token ids (or of lists) instead.")
@click.option("--text", help="Text instead, through the checkpoint's tokenizer.")
@click.option("--seed", default=0, show_default=True, help="Of the suite's token ids.")
@click.option("--grad", is_flag=True, help="Compare the gradients of the training loss too; whole models in memory.")
@click.option("--report", type=click.Path(path_type=Path), help="Directory for result.json.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json instead of the table.")
def run(
    src: Path,
    flax: Path | None,
    dtype: "Precision",
    suite: "Suite",
    input_ids: Path | None,
    text: str | None,
    seed: int,
    grad: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Compare Flax with PyTorch on checkpoint SRC.

    SRC is a Mixtral checkpoint as transformers reads it. FLAX is the converted one; without it, SRC is mapped to Flax
    in memory.
    """
    if input_ids is not None and text is not None:
        raise click.UsageError("--input-ids and --text exclude each other")
    from parity.report import json as json_report

    inputs = _inputs(src, suite, input_ids, text)
    from parity.runner import run as run_parity  # after the inputs are known to be good: it loads JAX and torch

    with _progress_bar() as progress:
        result = run_parity(src, flax, dtype=dtype, inputs=inputs, seed=seed, grad=grad, progress=progress)
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


@cli.command(epilog=SELFTEST_EXAMPLES)
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
    from parity.selftest import Alarm, Trial, passed, steps, to_json
    from parity.selftest import selftest as run_selftest

    with tempfile.TemporaryDirectory() as folder, _progress_bar() as progress:
        source = Checkpoint.open(checkpoint if checkpoint is not None else draw(Path(folder) / "drawn", seed=seed))
        rows: list[Trial | Alarm] = []
        total = steps(source.config, dtypes)
        progress("first compilations", 0, total)
        for row in run_selftest(source, dtypes=dtypes, inputs=suite, seed=seed):
            rows.append(row)
            progress(row.slug, len(rows), total)
    if as_json:
        click.echo(json.dumps([to_json(row) for row in rows], indent=1))
    else:
        from rich.console import Console

        from parity.report import selftest as report

        Console(highlight=False).print(report.render(rows))
    sys.exit(0 if passed(rows) else 1)


def _inputs(src: Path, suite: "Suite", input_ids: Path | None, text: str | None) -> "Suite | list[Batch]":
    from convert import Checkpoint
    from parity.inputs import read_ids, tokenized

    if input_ids is not None:
        return read_ids(input_ids, Checkpoint.open(src).config)
    return suite if text is None else tokenized(src, text)


@contextmanager
def _progress_bar() -> Iterator["Progress"]:
    """Draw a bar on stderr, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening checkpoints", total=None)
        yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total)


def main() -> None:
    """Run the command; every refusal is one message on stderr and its exit code."""
    from convert import BadInput
    from flax_mixtral.config import ConfigError

    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(INTERRUPTED)
    except (BadInput, ConfigError) as error:
        click.echo(f"mixtral-parity: {error}", err=True)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
