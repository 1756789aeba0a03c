"""All figures of docs/performance.md in one run: `make bench`, or `python -m benchmarks`.

Writes a checkpoint of 1.6 GB, takes some twenty-five minutes on two cores and 12 GB of memory, prints the tables, and
puts each in its place in the page.
"""

import shutil
from pathlib import Path

import click

PARTS = ("float32", "bfloat16", "huge-pages", "backends", "products", "memory", "start", "parity")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of every measurement.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only these; may be repeated.")
@click.option("--write", type=click.Path(path_type=Path, exists=True), help="The page; without it, print alone.")
def main(work: Path, rounds: int, parts: tuple[str, ...], write: Path | None) -> None:
    """Measure this project beside transformers."""
    from benchmarks import checkpoint, page, tables

    shutil.rmtree(work, ignore_errors=True)
    checkpoint.write(work / "hf")
    for part in parts or PARTS:
        text = page.SECTIONS[part](work / "hf", rounds)
        click.echo(text)
        if write is not None:
            tables.put(write, part, text)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
