"""An independent implementation in a narrow dtype: the oracle's NumPy, computing and storing as a framework does.

It shares no code with torch or Flax, so that it stands for any correct port. In bfloat16 it computes in float64 and
rounds every result to what a model of that dtype stores, at Hugging Face's rounding points.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.diagnosis.replay import BASE_OPS, FLOAT32_POINTS, to_bfloat16
from parity.metrics import Precision
from parity.oracle.model import Ops, Oracle
from parity.trace import Array, Batch, Trace
from parity.weights import DTYPES

__all__ = ["NarrowSide"]


class NarrowSide:
    """A `Side` of NumPy.

    Args:
        config: the model.
        weights: Hugging Face's legacy names to [out, in] arrays, rounded to the dtype already.
        dtype: what the arrays of a trace have.
    """

    name = "flax"

    def __init__(self, config: MixtralConfig, weights: Mapping[str, Array], dtype: Precision):
        self.dtype = DTYPES[dtype]
        if dtype == "float32":
            self.oracle = Oracle(config, weights, dtype=np.float32)
        else:
            self.oracle = Oracle(config, weights, _storing_bfloat16())

    def embed(self, batch: Batch) -> Array:
        """See `Side.embed`."""
        return self.oracle.embed(batch).astype(self.dtype)

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        return self._stored(self.oracle.block(layer, x_BTD, batch, routing))

    def operations(self, layer: int, x_BTD: Array, given: Trace, batch: Batch) -> Trace:
        """See `Operations.operations`."""
        return self._stored(self.oracle.operations(layer, x_BTD, given, batch))

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        """See `Side.head`."""
        return self._stored(self.oracle.head(x_BTD, batch))

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        """See `Side.losses`; in float32, as both frameworks compute them."""
        losses = self.oracle.losses(logits, router_logits, batch)
        return Trace({name: array.astype(np.float32) for name, array in losses.arrays.items()})

    def _stored(self, trace: Trace) -> Trace:
        for name, array in trace.arrays.items():
            if name != "router_ids":
                trace.arrays[name] = array.astype(np.float32 if name in FLOAT32_POINTS else self.dtype)
        return trace


def _storing_bfloat16() -> Ops:
    """Give operations whose every result is rounded to what a bfloat16 model stores."""
    base = BASE_OPS["bfloat16"]

    def cast(name: str, to: Callable[[Array], Array]) -> Callable[..., Array]:
        return lambda *given: to(getattr(base, name)(*given))

    def single(x: Array) -> Array:
        return x.astype(np.float32).astype(np.float64)

    storing: dict[str, Any] = {
        name: cast(name, to_bfloat16) for name in ("norm", "project", "rotate", "scores", "mix", "product")
    }
    storing |= {name: cast(name, single) for name in ("router_softmax", "weigh")}
    storing["residual"] = lambda stream, normed, branch: to_bfloat16(stream + to_bfloat16(branch))
    return replace(base, **storing)
