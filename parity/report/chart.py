"""One chart of report.html, as Plotly reads it: data and layout in plain dictionaries, colours left to the page.

Each has the same numbers as rows of text, for who does not see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Chart", "number"]


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart and its table.

    Args:
        name: its id in the page.
        section: where it stands.
        caption: what it shows.
        figure: `data` and `layout` for Plotly.
        header: of the table.
        rows: of the table.
    """

    name: str
    section: str
    caption: str
    figure: dict[str, Any]
    header: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default=())


def number(value: float | None) -> str:
    """Write a number as the tables do."""
    return "none" if value is None else f"{value:.3g}"
