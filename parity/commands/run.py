"""mixtral-parity run."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convert.share import SHARE, Share
from parity.commands.options import FLAX_SIDE, LAYERS, inputs_of
from parity.commands.progress import progress_bar
from parity.commands.show import reported, show

if TYPE_CHECKING:
    from parity.inputs import Suite
    from parity.metrics import Precision
    from parity.port import FlaxFactory

__all__ = ["EXAMPLES", "run"]

EXAMPLES = """
\b
Examples:
  mixtral-parity run torch-checkpoint/ flax-checkpoint/
  mixtral-parity run torch-checkpoint/ --suite quick          map to Flax in memory
  mixtral-parity run torch-checkpoint/ --report report/       write report/report.html and more
  mixtral-parity run torch-checkpoint/ --reference torch.trace   without torch, on what was recorded
  mixtral-parity run torch-checkpoint/ --flax-side my_port:side  a port of your own
  mixtral-parity run torch-checkpoint/ --report report/ --share 2/4   beside 1/4, 3/4 and 4/4 elsewhere

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
@click.option("--layers", type=LAYERS, help="Compare blocks A to B-1 alone; torch runs those before them.")
@click.option(
    "--share", type=SHARE, help="Compare the I-th of N ranges of blocks; the last one writes --report for all."
)
@click.option("--reference", type=click.Path(path_type=Path), help="Torch's recording, in place of torch.")
@click.option("--flax-side", type=FLAX_SIDE, help="Another implementation of the side protocol, whole or in part.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="Directory for report.html, report.md, junit.xml, result.json."
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Margins to compare with: a margin that grew beyond its noise fails. Written where it is not there.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict alone, and no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json instead of the table.")
@click.pass_context
def run(
    context: click.Context,
    src: Path,
    flax: Path | None,
    dtype: "Precision",
    suite: "Suite",
    input_ids: Path | None,
    text: str | None,
    seed: int,
    grad: bool,
    generate: int | None,
    layers: range | None,
    share: Share | None,
    reference: Path | None,
    flax_side: "FlaxFactory | None",
    report: Path | None,
    baseline: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare Flax with PyTorch on checkpoint SRC.

    SRC is a Mixtral checkpoint as transformers reads it. FLAX is the converted one; without it, SRC is mapped to Flax
    in memory.
    """
    if share is not None and (report is None or layers is not None or baseline is not None):
        raise click.UsageError(
            "--share needs --report DIR, where the shares meet, and excludes --layers and --baseline"
        )
    with ExitStack() as until_shown:
        # What stops one share is no result of all.
        with reported(None if share else report), progress_bar(quiet) as progress:
            inputs = inputs_of(context, src, reference, suite, input_ids, text)
            if reference is not None:
                from parity.recordings.recording import Recording

                dtype = Recording.open(reference).manifest.dtype
            from parity.runner import run as run_parity  # after the inputs are known to be good: it loads JAX

            met = None
            if share is not None and report is not None:
                from parity.meeting import meeting

                met = until_shown.enter_context(meeting(report / "shares", share))
            run_again = partial(
                run_parity,
                src,
                flax,
                dtype=dtype,
                inputs=inputs,
                seed=seed,
                grad=grad,
                generate=generate or 0,
                layers=layers,
                reference=reference,
                side=flax_side,
                meeting=met,
                progress=progress,
            )
            result = run_again()
            if baseline is not None:
                from parity.noise import with_baseline

                result = with_baseline(result, baseline, lambda change: run_again(change=change))
        show(result, None if met and met.missing else report, as_json, quiet)
