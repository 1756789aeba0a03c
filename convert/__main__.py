"""The command `mixtral-convert`.

Imports click and rich; NumPy and the rest of convert only once there is something to do.
"""

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert.errors import BadInput, ConfigError, Interrupted, printable
from convert.share import SHARE

if TYPE_CHECKING:
    from convert.checkpoint import Checkpoint
    from convert.execute import Report
    from convert.stream import Progress

__all__ = ["cli", "main"]

BAD_INPUT, INTERRUPTED = 3, 5

LAYOUT_NAMES = ("flax", "hf-legacy", "hf-fused", "mistral", "mistral-stacked")
"""Those of convert.layouts, which would load NumPy."""


class _ConvertByDefault(click.Group):
    """A group in which `SRC DST` alone means `convert SRC DST`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn what can be wrong with the input into one message and an exit code."""
    try:
        yield
    except (BadInput, ConfigError) as error:
        click.echo(f"mixtral-convert: {printable(str(error))}", err=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as stop:
        click.echo(f"mixtral-convert: {stop if isinstance(stop, Interrupted) else 'interrupted'}", err=True)
        sys.exit(INTERRUPTED)


@click.group(cls=_ConvertByDefault)
def cli() -> None:
    """Convert a Mixtral checkpoint to Flax and back, bit for bit.

    \b
    mixtral-convert SRC DST [OPTIONS]     convert; see `mixtral-convert convert --help`
    mixtral-convert inspect SRC           say what is in a checkpoint

    \b
    Examples:
      mixtral-convert Mixtral-8x7B mixtral-flax
      mixtral-convert Mixtral-8x7B mixtral-flax --dry-run
      mixtral-convert mixtral-flax mixtral-hf --to hf-legacy
      mixtral-convert Mixtral-8x7B small --dtype bfloat16 --json
      mixtral-convert Mixtral-8x22B mixtral-flax --share 2/4        beside 1/4, 3/4 and 4/4 elsewhere
      mixtral-convert inspect Mixtral-8x7B

    \b
    Exit codes: 0 done, 2 wrong usage, 3 the input cannot be used (nothing is written), 5 interrupted
    (--resume goes on).
    """  # noqa: D301  # a literal backspace is click's mark for lines to be left as they are


@cli.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(LAYOUT_NAMES), default="flax", show_default=True)
@click.option("--container", type=click.Choice(["safetensors", "orbax"]), default="safetensors", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
    default="keep",
    show_default=True,
    help="Cast every tensor; what that loses is counted and reported.",
)
@click.option("--rope-theta", type=float, help="For a params.json that has none; nothing is guessed.")
@click.option("--verify", is_flag=True, help="Read everything back from disk and compare it with SRC.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@click.option("--resume", is_flag=True, help="Go on with the same conversion where it was interrupted or killed.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a checkpoint and nothing else.")
@click.option(
    "--share", type=SHARE, help="Write the I-th of N shares of the files; the last share to end finishes DST."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def convert(src: Path, dst: Path, as_json: bool, verify: bool, **options: Any) -> None:
    """Write the checkpoint SRC as DST, in the layout --to.

    \b
    SRC  a directory with config.json or params.json and weights: safetensors, PyTorch's .bin, .pt and .pth,
         in one file or shards, or Orbax; the layout is recognised. Or the id of a Hub repository
    DST  a directory that does not exist; it appears when it is complete

    \b
    Layouts: flax       the Flax tree, experts stacked
             hf-legacy  Hugging Face, one tensor per expert (what transformers writes)
             hf-fused   Hugging Face, experts stacked (transformers 5.x in memory)
             mistral    Mistral's own, one tensor per expert, with params.json
             mistral-stacked  the same with the experts stacked (the first release)
    """  # noqa: D301  # as above
    if options["container"] == "orbax" and options["to"] != "flax":
        raise click.UsageError(f"--container orbax is for --to flax, not {options['to']}")
    with _exit_codes():
        from convert.execute import convert as run  # NumPy is slow to load
        from convert.hub import resolve

        src = resolve(src)
        with _progress_bar() as progress:
            report = run(src, dst, verify_written=verify, progress=progress, **options)
        click.echo(json.dumps(report.to_json(), indent=2) if as_json else _describe(report))


@cli.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.option("--rope-theta", type=float, help="For a params.json that has none.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, every tensor included.")
def inspect(src: Path, rope_theta: float | None, as_json: bool) -> None:
    """Say what is in the checkpoint SRC, from its headers alone."""
    with _exit_codes():
        from convert.checkpoint import Checkpoint  # NumPy is slow to load
        from convert.hub import resolve

        facts = _facts(Checkpoint.open(resolve(src), rope_theta))
        if as_json:
            click.echo(json.dumps(facts, indent=2))
            return
        del facts["tensors"], facts["config"]
        for name, value in facts.items():
            for line in value if isinstance(value, list) else [value]:
                click.echo(f"{name.replace('_', ' '):14} {f'{line:,}' if isinstance(line, int) else line}")


def _facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    headers = checkpoint.headers
    dtypes = Counter(header.dtype.name for header in headers.values())
    return {
        "path": str(checkpoint.path),
        "architecture": checkpoint.config.architecture,
        "layout": checkpoint.layout,
        "dtypes": [f"{dtype} ({count} tensors)" for dtype, count in dtypes.most_common()],
        "parameters": sum(header.nbytes // header.dtype.itemsize for header in headers.values()),
        "bytes": sum(header.nbytes for header in headers.values()),
        "files": list(checkpoint.files.readers),
        "notes": list(checkpoint.notes),
        "tensors": {
            name: {"dtype": header.dtype.name, "shape": list(header.shape), "file": checkpoint.files.homes[name]}
            for name, header in headers.items()
        },
        "config": checkpoint.raw_config,
    }


@contextmanager
def _progress_bar() -> Iterator["Progress | None"]:
    """Draw a bar on stderr, on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting", total=None)
        yield lambda name, done, total: bar.update(task, completed=done, total=total, description=name)


def _describe(report: "Report") -> str:
    plan, loss = report.plan, report.loss
    lines = []
    if report.share is not None and not report.written:
        share = f"share {report.share}: {len(report.share.of(plan.files))} of {len(plan.files)} files written"
        return f"{share}; {report.destination} appears when the last share has ended"
    if not report.written:
        lines += [f"  {t.name}  {t.dtype} {list(t.shape)}  from {', '.join(t.sources)}" for t in plan.tensors]
    lines += [f"note: {note}" for note in plan.notes]
    for name, lost in report.losses.items():
        if lost.to_infinity:
            lines.append(f"cast: {name}: {lost.to_infinity:,} of {lost.values:,} values became infinite")
    for name, count in report.non_finite.items():
        lines.append(f"note: {name}: {count:,} values are NaN or infinite: kept as they are")
    if loss.changed:
        lines.append(f"cast: {loss.changed:,} values rounded, {loss.to_zero:,} of them to zero")
    files = f"{len(plan.files)} file{'s' * (len(plan.files) > 1)}"
    what = f"{sum(1 for _ in plan.tensors)} tensors, {plan.total_bytes:,} bytes in {files}"
    verb = "written" if report.written else "would be written (dry run)"
    if not report.written:
        lines.append(f"peak memory: at most {plan.peak_bytes / 1e6:,.0f} MB beside the program itself")
    lines.append(f"{plan.from_layout} -> {plan.to_layout}: {what} {verb}: {report.destination}")
    return "\n".join(lines)


def main() -> None:
    """Run the command; the console script's entry."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite end is one that can be resumed
    cli(prog_name="mixtral-convert")


if __name__ == "__main__":
    main()
