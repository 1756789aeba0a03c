"""Configuration and weights, compared exactly before any forward."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.metrics import Precision
from parity.trace import Array

__all__ = ["Difference", "Rounded", "compare_configs", "compare_weights"]

DTYPES: dict[Precision, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Rounded(Mapping[str, Array]):
    """Weights in the dtype that a run computes in, rounded on access; every side gets the same rounded values."""

    def __init__(self, weights: Mapping[str, Array], dtype: Precision):
        self._weights = weights
        self._dtype = DTYPES[dtype]

    def __getitem__(self, name: str) -> Array:
        return self._weights[name].astype(self._dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


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
    torch: Mapping[str, Array], flax: Mapping[str, Array], advance: Callable[[str], None]
) -> tuple[dict[str, str], list[Difference]]:
    """Compare every Flax leaf bit for bit.

    Args:
        torch: the source, seen as Flax leaves.
        flax: the converted checkpoint.
        advance: called before each leaf with its path.

    Returns:
        The SHA-256 of each leaf of the source, and the leaves that differ.
    """
    hashes, differences = {}, []
    for name in torch:
        advance(name)
        torch_array, flax_array = torch[name], flax[name]
        hashes[name] = hashlib.sha256(np.ascontiguousarray(torch_array).view(np.uint8).data).hexdigest()
        if torch_array.dtype != flax_array.dtype:
            differences.append(Difference(name, f"dtypes differ: torch {torch_array.dtype}, Flax {flax_array.dtype}"))
            continue
        unsigned = np.dtype(f"u{torch_array.dtype.itemsize}")
        differing = int(
            (np.ascontiguousarray(torch_array).view(unsigned) != np.ascontiguousarray(flax_array).view(unsigned)).sum()
        )
        if differing:
            differences.append(Difference(name, f"{differing} of {torch_array.size} elements differ in their bits"))
    return hashes, differences
