"""Configuration and weights, compared exactly before any forward."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint import View
from convert.transpose import blocks, contiguous
from flax_mixtral.config import MixtralConfig
from parity.metrics import Precision
from parity.pages import Pages
from parity.trace import Array

__all__ = [
    "DTYPES",
    "AsStored",
    "Difference",
    "Rounded",
    "compare_configs",
    "compare_hashes",
    "compare_weights",
    "hash_leaves",
]

DTYPES: dict[Precision, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Rounded(Mapping[str, Array]):
    """Weights in the dtype that a run computes in, rounded on access; every side gets the same rounded values.

    Of a checkpoint, a tensor comes in memory of its own, filled piece by piece, and the files' pages are given back.

    Args:
        weights: by name.
        dtypes: what they are rounded to, one after the other.
        pages: where that memory comes from.
    """

    def __init__(self, weights: Mapping[str, Array], *dtypes: Precision, pages: Pages | None = None):
        self._weights = weights
        self._dtypes = [DTYPES[dtype] for dtype in dtypes]
        self._pages = pages

    def __getitem__(self, name: str) -> Array:
        if not isinstance(self._weights, View):
            return self._cast(self._weights[name])
        pages = self._pages or Pages()  # of which nothing is left when the tensor is gone
        array = pages.take(self._weights.shape(name), self._dtypes[-1])
        flat, start = array.reshape(-1), 0
        for piece in self._weights.pieces(name):
            for block in blocks(piece):
                ordered = contiguous(block).view(block.dtype).reshape(-1)
                flat[start : start + block.size] = self._cast(ordered)
                start += block.size
            self._weights.release(name, piece)
        return array

    def _cast(self, array: Array) -> Array:
        for dtype in self._dtypes:
            array = array.astype(dtype, copy=False)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class AsStored(Mapping[str, Array]):
    """Rounded weights for a side that widens them by itself, some rows at a time.

    What the rounding leaves as it is comes as the files hold it, without a copy, one tensor after the other: when the
    next is asked for, the pages of the last are given back (and read again, should it still be looked at).

    Args:
        view: of a checkpoint.
        dtype: what all sides' weights are rounded to.
    """

    def __init__(self, view: View, dtype: Precision):
        self._view, self._dtype = view, DTYPES[dtype]
        self._rounded = Rounded(view, dtype)
        self._last: str | None = None

    def __getitem__(self, name: str) -> Array:
        if self._last is not None:
            self._view.release(self._last)
        self._last = name
        if all(np.can_cast(stored, self._dtype) for stored in self._view.sources(name).values()):
            array = self._view[name]
            if array.strides[-1] == array.itemsize:
                return array
        return self._rounded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._view)

    def __len__(self) -> int:
        return len(self._view)


@dataclass(frozen=True, slots=True)
class Difference:
    """One configuration field or one Flax leaf that differs between the two checkpoints."""

    name: str
    reason: str


def compare_configs(torch: MixtralConfig, flax: MixtralConfig) -> list[Difference]:
    """List the fields whose values differ."""
    pairs = ((f.name, getattr(torch, f.name), getattr(flax, f.name)) for f in fields(MixtralConfig))
    return [Difference(f"config.{name}", f"torch {t!r}, Flax {f!r}") for name, t, f in pairs if t != f]


def compare_weights(
    torch: Mapping[str, Array],
    flax: Mapping[str, Array],
    advance: Callable[[str], None],
    names: Iterable[str] | None = None,
) -> tuple[dict[str, str], list[Difference]]:
    """Compare Flax leaves bit for bit.

    Args:
        torch: the source, seen as Flax leaves.
        flax: the converted checkpoint.
        advance: called before each leaf with its path.
        names: the leaves to compare; all unless given.

    Returns:
        The SHA-256 of each such leaf of the source, and the leaves that differ.
    """
    hashes, differences = {}, []
    for name in torch if names is None else names:
        advance(name)
        digest, differing, size = hashlib.sha256(), 0, 0
        dtypes = set[str]()
        for torch_piece, flax_piece in _side_by_side(torch, flax, name):
            torch_bits, flax_bits = _in_order(torch_piece), _in_order(flax_piece)
            digest.update(torch_bits.view(np.uint8).data)
            size += torch_piece.size
            if torch_piece.dtype != flax_piece.dtype:
                dtypes.add(f"torch {torch_piece.dtype}, Flax {flax_piece.dtype}")
            elif torch_bits.shape == flax_bits.shape:
                differing += int((torch_bits != flax_bits).sum())
            else:
                differing += torch_piece.size
            _release(torch, name, torch_piece)
            _release(flax, name, flax_piece)
        hashes[name] = digest.hexdigest()
        if dtypes:
            differences.append(Difference(name, f"dtypes differ: {', '.join(sorted(dtypes))}"))
        elif differing:
            differences.append(Difference(name, f"{differing} of {size} elements differ in their bits"))
    return hashes, differences


def hash_leaves(weights: Mapping[str, Array], advance: Callable[[str], None]) -> dict[str, str]:
    """Give the SHA-256 of every leaf, in C order."""
    hashes = {}
    for name in weights:
        advance(name)
        digest = hashlib.sha256()
        for piece in _pieces(weights, name):
            digest.update(_in_order(piece).view(np.uint8).data)
            _release(weights, name, piece)
        hashes[name] = digest.hexdigest()
    return hashes


def compare_hashes(torch: Mapping[str, str], flax: Mapping[str, str]) -> list[Difference]:
    """List the leaves whose SHA-256 differ."""
    return [
        Difference(name, "SHA-256 differ: the two recordings were not made from the same weights")
        for name in torch
        if torch[name] != flax.get(name)
    ]


def _side_by_side(torch: Mapping[str, Array], flax: Mapping[str, Array], name: str) -> Iterator[tuple[Array, Array]]:
    """Walk a leaf of both, expert by expert where both come so."""
    if isinstance(torch, View) and isinstance(flax, View):
        return zip(torch.pieces(name), flax.pieces(name), strict=True)
    return iter([(torch[name], flax[name])])


def _pieces(weights: Mapping[str, Array], name: str) -> Iterator[Array]:
    return weights.pieces(name) if isinstance(weights, View) else iter([weights[name]])


def _release(weights: Mapping[str, Array], name: str, piece: Array) -> None:
    if isinstance(weights, View):
        weights.release(name, piece)


def _in_order(array: Array) -> Array:
    """Give an array's bits in C order, flat."""
    return contiguous(array).reshape(-1)
