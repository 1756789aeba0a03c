"""Changes that are no fault: each must pass. A tool that accuses these is not believed when it matters."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from flax_mixtral import moe
from flax_mixtral.config import MixtralConfig
from parity.planting import Functions, Weights, replaced
from parity.port import Port
from parity.sides import Side
from parity.sides.flax import FlaxSide, run_block
from parity.trace import Array, Batch, Trace

__all__ = ["CONTROLS", "Control"]


@dataclass(frozen=True, slots=True)
class Control:
    """One benign variant of the Flax side, or of the torch side's settings."""

    slug: str
    side: Callable[[MixtralConfig, Weights], Side] = FlaxSide
    attention: str = "eager"
    experts: str = "grouped_mm"

    def change(self, port: Port) -> Port:
        """Put the variant in the port's place."""
        return replace(port, side=self.side)


class _OpByOp(FlaxSide):
    """Without jit: every operation compiled by itself."""

    def __init__(self, config: MixtralConfig, weights: Weights):
        super().__init__(config, weights)
        self._run_block = run_block


class _RowByRow(FlaxSide):
    """Each row of the batch by itself: another batch size."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        T = x_BTD.shape[1]
        parts = []
        for b in range(len(x_BTD)):
            row = Batch(
                batch.name,
                batch.input_ids[b : b + 1],
                None if batch.attention_mask is None else batch.attention_mask[b : b + 1],
                None if batch.position_ids is None else batch.position_ids[b : b + 1],
            )
            forced = None if routing is None else routing[b * T : (b + 1) * T]
            parts.append(super().block(layer, x_BTD[b : b + 1], row, forced))
        names = [name for name in parts[0].arrays if not name.startswith("expert.")]
        trace = Trace({name: np.concatenate([part[name] for part in parts]) for name in names})
        whole = super().block(layer, x_BTD, batch, trace["router_ids"] if routing is None else routing)
        trace.arrays.update({name: array for name, array in whole.arrays.items() if name.startswith("expert.")})
        trace.rows = whole.rows
        return trace


class _Changed(FlaxSide):
    """With functions of flax_mixtral replaced by equal ones."""

    functions: Functions = ()

    def __init__(self, config: MixtralConfig, weights: Weights):
        super().__init__(config, weights)
        self._run_block = jax.jit(lambda *given: run_block(*given))

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        with replaced(self.functions):
            return super().block(layer, x_BTD, batch, routing)


def _softmax_of_chosen(probs_ME: jax.Array, ids_MA: jax.Array) -> jax.Array:
    """Take the softmax over the chosen experts' logits alone: the same numbers by another way."""
    logits_MA = jnp.log(jnp.take_along_axis(probs_ME, ids_MA, axis=-1))
    return jax.nn.softmax(logits_MA, axis=-1)


class _SoftmaxOfChosen(_Changed):
    functions = ((moe.weigh, _softmax_of_chosen),)


CONTROLS = (
    Control("unchanged"),
    Control("op-by-op", side=_OpByOp),
    Control("other-batch-size", side=_RowByRow),
    Control("softmax-of-chosen", side=_SoftmaxOfChosen),
    Control("sdpa", attention="sdpa"),
    Control("experts-eager", experts="eager"),
    Control("experts-batched", experts="batched_mm"),
)
