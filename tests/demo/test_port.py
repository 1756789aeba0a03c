"""A repository with a port of its own, as its users would test it: one pass, one failure, one that is unchecked."""

import os
from pathlib import Path

import numpy as np

from parity.sides.flax import FlaxSide
from parity.trace import Array, Batch, Trace

CHECKPOINT = Path(os.environ["DEMO_CHECKPOINT"])


class Doubled(FlaxSide):
    """A port whose attention comes out twice as large."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        trace = super().block(layer, x_BTD, batch, routing)
        trace.arrays["attn_out"] = trace["attn_out"] * np.float32(2)
        return trace


class Silent(FlaxSide):
    """A port that does not show its queries."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        trace = super().block(layer, x_BTD, batch, routing)
        del trace.arrays["q"]
        return trace


def test_a_right_port(assert_parity):  # type: ignore[no-untyped-def]  # as short as users write it
    result = assert_parity(CHECKPOINT, inputs="quick")
    assert result.verdict == "pass"


def test_a_wrong_port(assert_parity):  # type: ignore[no-untyped-def]  # as above
    assert_parity(CHECKPOINT, inputs="quick", side=Doubled)


def test_a_port_that_shows_a_part(assert_parity):  # type: ignore[no-untyped-def]  # as above
    assert_parity(CHECKPOINT, inputs="quick", side=Silent)
