"""One process's share of a piece of work that several do: which files of a conversion, which layers of a walk.

Imports click alone, for the option that names it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

__all__ = ["SHARE", "Share"]

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Share:
    """Process `number` of `count`, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def stem(self) -> str:
        """The share as part of a file's name."""
        return f"{self.number}-of-{self.count}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Take every count-th item: all shares together have each item once."""
        return items[self.number - 1 :: self.count]


class _ShareType(click.ParamType[Share]):
    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Share:
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", str(value))
        if not found or int(found[1]) > int(found[2]):
            self.fail(f"{value!r} is not I/N with I from 1 to N, as 2/4", param, ctx)
        return Share(int(found[1]), int(found[2]))


SHARE = _ShareType()
