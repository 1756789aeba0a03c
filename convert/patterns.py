"""A small language for how one tensor's axes become another's: "(N H) D -> D N H".

A side lists dimensions; a dimension is one factor or several in parentheses, slowest first. A factor is

    an axis letter      its size is looked up (flax_mixtral.axes)
    a number            a factor of that fixed size, as in "(N P 2) D -> D N (2 P)"
    a part `i/n`        part i of n: "(0/2 F)" is the first half of a dimension of size 2 F

An axis on one side only is fixed from outside: in "F D -> E D F" the tensor's name says which expert it is.
Imports NumPy only. Arrays are moved as views wherever NumPy can express the result as one.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from numpy.typing import NDArray

__all__ = ["Factor", "Pattern", "parse"]


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a dimension: an axis letter, a number, or a part (then `part` and `parts` are set)."""

    name: str
    part: int | None = None
    parts: int = 1

    def size(self, sizes: Mapping[str, int]) -> int:
        """Give the number of positions along this factor."""
        if self.part is not None:
            return self.parts
        return int(self.name) if self.name.isdigit() else sizes[self.name]


Side = tuple[tuple[Factor, ...], ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern; `source` and `target` hold one tuple of factors per dimension."""

    source: Side
    target: Side

    def invert(self) -> "Pattern":
        """Give the pattern that undoes this one."""
        return Pattern(self.target, self.source)

    def without(self, axis: str) -> "Pattern":
        """Drop an axis from both sides: the pattern of one slice along it."""

        def drop(side: Side) -> Side:
            dims = (tuple(factor for factor in dim if factor.name != axis) for dim in side)
            return tuple(dim for dim, before in zip(dims, side, strict=True) if dim or not before)

        return Pattern(drop(self.source), drop(self.target))

    def source_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Give the shape of the whole tensor on the left."""
        return tuple(math.prod(factor.size(sizes) for factor in dim) for dim in self.source)

    def position(self, fixed: Mapping[str, int]) -> tuple[int, ...]:
        """Give where the left tensor's region lies among those that other parts and fixed axes select."""
        indices = (_index(factor, fixed) for dim in self.source for factor in dim)
        return tuple(index for index in indices if isinstance(index, int))

    def is_contiguous(self, fixed: Mapping[str, int]) -> bool:
        """Say whether the region selected from the left tensor is one run of bytes."""
        indices = [_index(factor, fixed) for dim in self.source for factor in dim]
        chosen = [isinstance(index, int) for index in indices]
        return chosen == sorted(chosen, reverse=True)

    def apply(self, array: NDArray[Any], sizes: Mapping[str, int], fixed: Mapping[str, int] | None = None) -> Any:
        """Select the region that parts and fixed axes name, and bring its axes into the order of the right side.

        Args:
            array: laid out as the left side says.
            sizes: the size of every axis letter.
            fixed: the index along each axis that is to be selected, and so dropped.

        Returns:
            The right side's array without fixed axes and parts; a view unless merged axes forbid it.

        Raises:
            ValueError: the array does not have the left side's shape.
        """
        fixed = fixed or {}
        if array.shape != self.source_shape(sizes):
            raise ValueError(f"expected shape {self.source_shape(sizes)}, got {array.shape}")
        factors = [factor for dim in self.source for factor in dim]
        split = array.reshape([factor.size(sizes) for factor in factors])
        free = split[tuple(_index(factor, fixed) for factor in factors)]
        have = [factor.name for factor in factors if not isinstance(_index(factor, fixed), int)]
        want = [[f for f in dim if not isinstance(_index(f, fixed), int)] for dim in self.target]
        moved = free.transpose([have.index(factor.name) for dim in want for factor in dim])
        kept = [dim for dim, before in zip(want, self.target, strict=True) if dim or not before]
        return moved.reshape([math.prod(factor.size(sizes) for factor in dim) for dim in kept])


def _index(factor: Factor, fixed: Mapping[str, int]) -> int | slice:
    if factor.part is not None:
        return factor.part
    return fixed.get(factor.name, slice(None))


@cache
def parse(text: str) -> Pattern:
    """Read a pattern such as "E (0/2 F) D -> E D F".

    Raises:
        ValueError: the text is not a pattern, an axis occurs twice on a side, or a number has no counterpart.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"pattern {text!r} has no '->'")
    pattern = Pattern(_side(left, text), _side(right, text))
    names = [[f.name for dim in side for f in dim if f.part is None] for side in (pattern.source, pattern.target)]
    if any(len(set(side)) < len(side) for side in names):
        raise ValueError(f"pattern {text!r} uses an axis twice on one side")
    if any(name.isdigit() for name in set(names[0]) ^ set(names[1])):
        raise ValueError(f"pattern {text!r} has a number on one side only")
    return pattern


def _side(text: str, whole: str) -> Side:
    dims = re.findall(r"\(([^()]*)\)|([^\s()]+)", text)
    if re.sub(r"\([^()]*\)|[^\s()]+|\s", "", text):
        raise ValueError(f"pattern {whole!r} has unbalanced parentheses")
    return tuple(tuple(_factor(word, whole) for word in (group or single).split()) for group, single in dims)


def _factor(word: str, whole: str) -> Factor:
    if re.fullmatch(r"[A-Z]|[1-9]\d*", word):
        return Factor(word)
    if (match := re.fullmatch(r"(\d+)/([1-9]\d*)", word)) and int(match[1]) < int(match[2]):
        return Factor(word, int(match[1]), int(match[2]))
    raise ValueError(f"pattern {whole!r}: {word!r} is not an axis letter, a number or a part i/n")
