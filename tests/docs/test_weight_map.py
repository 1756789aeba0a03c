"""docs/weight-map.md is what the rule tables say."""

from convert.layouts import LAYOUTS
from scripts.write_weight_map import PAGE, page


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == page(), "run scripts/write_weight_map.py"


def test_it_has_a_row_for_every_rule() -> None:
    text = page()
    for layout in LAYOUTS.values():
        section = text.split(f"## {layout.name}\n")[1].split("\n## ")[0]
        for rule in layout.rules:
            assert f"| `{rule.source}` | `{rule.target}` | `{rule.pattern}` |" in section
