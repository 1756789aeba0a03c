"""Measured rows on disk, and the tables of docs/tolerances.md that are made of them.

A table stands between two marks. It is rendered from the rows alone, so that a test can hold it against them.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["PAGE", "between", "load", "markdown", "replace_table", "store"]

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tolerances.md"
MEASURED = Path(__file__).parent / "measured"


def store(name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of one kind as CSV."""
    with (MEASURED / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def load(name: str) -> list[dict[str, str]]:
    """Read the rows of the last measurement; none where there was none."""
    path = MEASURED / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay rows out as a table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def replace_table(name: str, text: str) -> None:
    """Put a text between the marks of a name."""
    page = PAGE.read_text()
    PAGE.write_text(page.replace(f"\n{between(name)}\n", f"\n{text}\n"))


def between(name: str) -> str:
    """Give what stands between the marks of a name."""
    start, end = f"<!-- {name}: written by python -m benchmarks.{name} -->\n", f"\n<!-- end of {name} -->"
    page = PAGE.read_text()
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"{PAGE}: expected the marks of {name} once each: {start.strip()} and {end.strip()}")
    return page[page.index(start) + len(start) : page.index(end)]
