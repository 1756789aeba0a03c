"""docs/diagnosing.md lists what the tables hold, line by line."""

from pathlib import Path

from parity.diagnosis.cache_causes import FORMS
from parity.diagnosis.hypotheses import HYPOTHESES
from parity.diagnosis.weight_causes import ORIGINS

PAGE = Path(__file__).parents[3] / "docs" / "diagnosing.md"


def rows() -> list[str]:
    replayed = [
        f"| `{row.slug}` | {row.says} | {' '.join(f'`{point}`' for point in row.points)} | "
        f"{', '.join(row.dtypes) if len(row.dtypes) == 1 else 'both'} | {'rounding' if row.rounding else 'noise'} |"
        for row in HYPOTHESES
    ]
    cached = [f"| `{form.slug}` | {form.says} |" for form in FORMS]
    return [f"| `{origin.slug}` | {origin.says} |" for origin in ORIGINS] + replayed + cached


def test_the_page_has_every_row_of_the_tables_and_no_other() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert lines == rows()
