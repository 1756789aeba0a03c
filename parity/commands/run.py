"""mixtral-parity run."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parity.commands.progress import progress_bar

if TYPE_CHECKING:
    from parity.inputs import Suite
    from parity.metrics import Precision
    from parity.trace import Batch

__all__ = ["EXAMPLES", "run"]

EXAMPLES = """
\b
Examples:
  mixtral-parity run torch-checkpoint/ flax-checkpoint/
  mixtral-parity run torch-checkpoint/ --suite quick          map to Flax in memory
  mixtral-parity run torch-checkpoint/ --report report/       write report/result.json

\b
Exit codes: 0 pass, 1 parity failed, 2 usage, 3 bad input, 4 not everything could be checked, 5 interrupted.
"""


@click.command(epilog=EXAMPLES)
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
@click.option(
    "--generate",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Continue the prompts by N greedy tokens too, with the cache on; whole models in memory.",
)
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
    generate: int | None,
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

    with progress_bar() as progress:
        result = run_parity(
            src, flax, dtype=dtype, inputs=inputs, seed=seed, grad=grad, generate=generate or 0, progress=progress
        )
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


def _inputs(src: Path, suite: "Suite", input_ids: Path | None, text: str | None) -> "Suite | list[Batch]":
    from convert import Checkpoint
    from parity.inputs import read_ids, tokenized

    if input_ids is not None:
        return read_ids(input_ids, Checkpoint.open(src).config)
    return suite if text is None else tokenized(src, text)
