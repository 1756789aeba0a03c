"""The code blocks of README and docs."""

import re
import shlex
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "ROOT", "Block", "Command", "blocks", "commands"]

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]

EMBEDDED = "$(python -m parity.embedded)"


class Block(NamedTuple):
    """One fenced block: its page, its language and its text."""

    page: str
    language: str
    text: str


class Command(NamedTuple):
    """One line of a shell block, and the exit code that the page gives it."""

    arguments: list[str]
    exit_code: int


def blocks(page: str, language: str) -> Iterator[Block]:
    """Give the blocks of one page in one language, in order."""
    for name, text in re.findall(r"^```(\S*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        if name == language:
            yield Block(page, name, text)


def commands(page: str) -> Iterator[Command]:
    """Give the commands of one page; the embedded model is named by the path that the quickstart's reader gets."""
    for block in blocks(page, "sh"):
        for line in block.text.replace(EMBEDDED, "path/to/mixtral").splitlines():
            code = re.search(r"# exit code (\d)", line)
            words = shlex.split(line, comments=True)
            arguments = list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))  # after the environment
            if arguments:
                yield Command(arguments, int(code[1]) if code else 0)
