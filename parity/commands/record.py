"""mixtral-parity record."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parity.commands.options import FLAX_SIDE, LAYERS, inputs_of
from parity.commands.progress import progress_bar

if TYPE_CHECKING:
    from parity.inputs import Suite
    from parity.metrics import Precision
    from parity.port import FlaxFactory
    from parity.recordings.recorder import Part

__all__ = ["record"]

INTERRUPTED = 5

EXAMPLES = """
\b
Examples:
  mixtral-parity record mixtral/ torch.trace --side torch                        where torch is
  mixtral-parity record mixtral/ flax.trace --side flax --reference torch.trace  where JAX is
  mixtral-parity record mixtral/ oracle.trace --side oracle --reference torch.trace
  mixtral-parity compare torch.trace flax.trace --oracle oracle.trace            anywhere
"""


@click.command(epilog=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--side", "part", type=click.Choice(["torch", "flax", "oracle"]), required=True, help="What is recorded.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Torch's recording: the other sides are also fed what torch fed its blocks. It fixes every option below.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--suite", type=click.Choice(["quick", "standard", "long"]), default="standard", show_default=True)
@click.option("--input-ids", type=click.Path(path_type=Path), help="JSON list of token ids (or of lists) instead.")
@click.option("--text", help="Text instead, through the checkpoint's tokenizer.")
@click.option("--seed", default=0, show_default=True, help="Of the suite's token ids.")
@click.option("--layers", type=LAYERS, help="Record blocks A to B-1 alone.")
@click.option("--tokens", type=click.IntRange(16), help="Keep a sample of so many tokens inside blocks.")
@click.option(
    "--precision", type=click.Choice(["full", "bfloat16"]), default="full", show_default=True, help="Inside blocks."
)
@click.option("--flax-side", "factory", type=FLAX_SIDE, help="Another implementation than flax_mixtral.")
@click.option("--resume", is_flag=True, help="Go on with a recording that was interrupted, or that ends at layer A.")
@click.pass_context
def record(
    context: click.Context,
    checkpoint: Path,
    out: Path,
    part: "Part",
    reference: Path | None,
    dtype: "Precision",
    suite: "Suite",
    input_ids: Path | None,
    text: str | None,
    seed: int,
    layers: range | None,
    tokens: int | None,
    precision: str,
    factory: "FlaxFactory | None",
    resume: bool,
) -> None:
    """Record one side of a comparison on CHECKPOINT into the directory OUT, as safetensors.

    Interrupted, it ends with exit code 5, and --resume goes on.
    """
    inputs = inputs_of(context, checkpoint, reference, suite, input_ids, text)
    from parity.recordings.detail import Detail
    from parity.recordings.recorder import record as record_side

    detail = Detail(tokens, precision == "bfloat16")
    try:
        with progress_bar() as progress:
            record_side(
                checkpoint,
                out,
                part,
                dtype=dtype,
                inputs=inputs,
                seed=seed,
                layers=layers,
                detail=detail,
                reference=reference,
                side=factory,
                resume=resume,
                announce=lambda line: click.echo(line, err=True),
                progress=progress,
            )
    except KeyboardInterrupt:
        click.echo(f"interrupted; the same command with --resume goes on with {out}", err=True)
        sys.exit(INTERRUPTED)
