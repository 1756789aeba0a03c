"""The directory that --report names: every rendering of one result."""

from pathlib import Path

from parity.report import html, json, junit, markdown
from parity.result import Result

__all__ = ["FILES", "write"]

FILES = {
    "result.json": json.render,
    "junit.xml": junit.render,
    "report.md": markdown.render,
    "report.html": html.render,
}


def write(result: Result, folder: Path) -> None:
    """Write all of `FILES`; each is rendered before the first is written."""
    rendered = {name: render(result) for name, render in FILES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in rendered.items():
        (folder / name).write_text(text, encoding="utf-8")
