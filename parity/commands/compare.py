"""mixtral-parity compare."""

from pathlib import Path

import click

from parity.commands.progress import progress_bar
from parity.commands.show import reported, show

__all__ = ["compare"]

EXAMPLES = """
\b
Examples:
  mixtral-parity compare torch.trace flax.trace --oracle oracle.trace
  mixtral-parity compare torch.trace flax.trace --checkpoint mixtral/
  mixtral-parity compare torch.trace flax.trace --baseline margins.json   of mixtral-parity run --baseline
"""


@click.command(epilog=EXAMPLES)
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@click.option("--oracle", type=click.Path(path_type=Path), help="The oracle's recording.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The model, for the oracle and the cause of a failure; what torch was recorded on unless given.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), help="Directory for report.html, report.md, junit.xml, result.json."
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Margins to compare with, written by run: a margin that grew beyond its noise fails.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict alone, and no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json instead of the table.")
def compare(
    reference: Path,
    other: Path,
    oracle: Path | None,
    checkpoint: Path | None,
    report: Path | None,
    baseline: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare the recording OTHER with torch's recording REFERENCE, as a run on both sides does."""
    from parity.baseline import Baseline
    from parity.recordings.compare import compare as compare_recordings

    with reported(report), progress_bar(quiet) as progress:
        result = compare_recordings(reference, other, oracle, checkpoint=checkpoint, progress=progress)
        if baseline is not None:
            result = result.held_to(Baseline.read(baseline), baseline)
    show(result, report, as_json, quiet)
