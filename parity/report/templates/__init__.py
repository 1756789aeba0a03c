"""The templates of report.md and report.html, and what they share."""

from jinja2 import Environment, PackageLoader, StrictUndefined, Template, select_autoescape

__all__ = ["load"]

ENVIRONMENT = Environment(
    loader=PackageLoader("parity.report", "templates"),
    autoescape=select_autoescape(["html.j2"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def load(name: str) -> Template:
    """Give a template by its file name."""
    return ENVIRONMENT.get_template(name)


def _number(value: float | None, digits: int = 3) -> str:
    """Write a number with some digits, and what there is none of as a dash."""
    return "–" if value is None else f"{value:.{digits}g}"


def _cell(text: str) -> str:
    """Keep text in its cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


ENVIRONMENT.filters.update(number=_number, cell=_cell)
