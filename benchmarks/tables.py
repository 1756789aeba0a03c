"""Tables in the documentation: each between two marks; and measured rows on disk, that some are made of.

Those of docs/tolerances.md are rendered from the rows alone, so that a test can hold them against the rows.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["TOLERANCES", "between", "load", "markdown", "put", "store"]

ROOT = Path(__file__).parent.parent
TOLERANCES = ROOT / "docs" / "tolerances.md"
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


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a name in a page."""
    old = page.read_text()
    begin, end = _span(page, old, name)
    page.write_text(f"{old[:begin]}{text}{old[end:]}")


def between(page: Path, name: str) -> str:
    """Give what stands between the marks of a name in a page."""
    text = page.read_text()
    begin, end = _span(page, text, name)
    return text[begin:end]


def _span(page: Path, text: str, name: str) -> tuple[int, int]:
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: expected once {begin.strip()} and {end.strip()}")
    return text.index(begin) + len(begin), text.index(end)
