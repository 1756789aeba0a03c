"""What is tested: a configuration, weights, and a side built from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax_mixtral.config import MixtralConfig
from parity.sides.flax import FlaxSide
from parity.trace import Array

__all__ = ["FlaxFactory", "Port"]

FlaxFactory = Callable[[MixtralConfig, Mapping[str, Array]], Any]
"""Builds a `Side`, whole or in part, from a configuration and Flax leaves in the dtype to compute in."""


@dataclass(frozen=True, slots=True)
class Port:
    """A Flax Mixtral under test.

    Args:
        config: as its config.json says.
        weights: its leaves by dotted path, as they are on disk.
        side: builds the side from both; the weights it gets are those of the port, in the dtype to compute in.
    """

    config: MixtralConfig
    weights: Mapping[str, Array]
    side: FlaxFactory = FlaxSide
