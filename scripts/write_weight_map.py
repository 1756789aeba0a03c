"""Write docs/weight-map.md from the rule tables: which tensor becomes which leaf, and how its axes move.

python scripts/write_weight_map.py
"""

from collections.abc import Iterator
from pathlib import Path

from convert.layouts import LAYOUTS
from convert.rules import Layout, Rule

PAGE = Path(__file__).resolve().parent.parent / "docs" / "weight-map.md"

HEAD = """# Weight map

<!-- Written by scripts/write_weight_map.py from convert/layouts; change those, not this. -->

Which tensor becomes which leaf of the Flax tree, layout by layout. A pattern names the axes on disk and in the leaf, as
in einops: `(N H) D -> D N H` splits the rows into heads and moves them behind the columns. A letter that stands on the
right alone, as `E` in `F D -> E D F`, is the place of one tensor in a stacked leaf. The way back is derived from the
same line.

Letters: V vocabulary · D model · N query heads · K key/value heads · H head dimension · P half of it · F expert hidden
· E experts · C labels. `{L}` is the layer, `{E}` the expert, `{model}` is `model.` wherever a head holds the decoder.
"""


def page() -> str:
    """Give the text of the page."""
    return "\n".join([HEAD, *(line for layout in LAYOUTS.values() for line in _section(layout))])


def _section(layout: Layout) -> Iterator[str]:
    yield from (f"## {layout.name}", "", "| tensor | Flax leaf | axes |", "|---|---|---|")
    yield from dict.fromkeys(_row(rule) for rule in layout.rules)  # heads share leaves
    yield ""


def _row(rule: Rule) -> str:
    return f"| `{rule.source}` | `{rule.target}` | `{rule.pattern}` |"


if __name__ == "__main__":
    PAGE.write_text(page())
