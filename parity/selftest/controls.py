"""Changes that are no fault: each must pass. A tool that accuses these is not believed when it matters."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType

from convert import Checkpoint
from flax_mixtral import experts, moe
from flax_mixtral.config import MixtralConfig
from flax_mixtral.experts import Backend, Kernels, choose_backend
from parity.memory import available_bytes
from parity.metrics import Precision
from parity.port import Port
from parity.selftest.planting import GENERATES, Functions, Need, Scene, Weights, replaced
from parity.sides import Side
from parity.sides.flax import FlaxSide, run_block
from parity.sides.narrow import NarrowSide
from parity.trace import Array, Batch, Trace

__all__ = ["CONTROLS", "Control"]

DEVICES = 8
"""Among which experts are shared."""


@dataclass(frozen=True, slots=True)
class Control:
    """One benign variant of the Flax side, or of the torch side's settings; or prompts continued with a cache.

    Args:
        slug: its name.
        side: the Flax side.
        attention: torch's implementation.
        experts: torch's implementation.
        threads: torch's.
        cached: whether prompts are continued instead of walked.
        needs: without which there is nothing to try; None where every model and machine has it.
    """

    slug: str
    side: Callable[[MixtralConfig, Weights], Side] = FlaxSide
    attention: str = "eager"
    experts: str = "grouped_mm"
    threads: int | None = None
    cached: bool = False
    needs: Need | None = None

    def change(self, port: Port) -> Port:
        """Put the variant in the port's place."""
        return replace(port, side=self.side)

    def lacks(self, scene: Scene) -> str | None:
        """Say what is missing for the variant to exist, or None."""
        return None if self.needs is None or self.needs.met(scene) else self.needs.says


class _OpByOp(FlaxSide):
    """Without jit: every operation compiled by itself."""

    def __init__(self, config: MixtralConfig, weights: Weights):
        super().__init__(config, weights)
        self._run_block = run_block

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        with jax.disable_jit():  # the model compiles its parts by itself where nobody else compiles
            return super().block(layer, x_BTD, batch, routing)


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


class _PaddedAtTheOtherEnd(FlaxSide):
    """Padding moved to the other end of each row, and what comes out moved back."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        whole = super().block(layer, x_BTD, batch, routing)
        if batch.attention_mask is None or batch.position_ids is None:
            return whole
        (B, T), mask_BT = batch.input_ids.shape, batch.attention_mask
        pads_first = not mask_BT[:, 0].all()
        order_BT = np.argsort(1 - mask_BT if pads_first else mask_BT, axis=1, kind="stable")
        back_BT = np.argsort(order_BT, axis=1)

        def moved(array: Array, by_BT: Array) -> Array:
            by_row = array.reshape(B, T, *(array.shape[2:] if array.shape[:2] == (B, T) else array.shape[1:]))
            return np.stack([row[by_T] for row, by_T in zip(by_row, by_BT, strict=True)]).reshape(array.shape)

        other = Batch(batch.name, *(moved(x, order_BT) for x in (batch.input_ids, mask_BT, batch.position_ids)))
        forced = None if routing is None else moved(routing, order_BT)
        found = super().block(layer, moved(x_BTD, order_BT), other, forced)
        points = {name: moved(array, back_BT) for name, array in found.arrays.items() if not name.startswith("expert.")}
        whole.arrays.update(points)
        return whole


class _Untapped(FlaxSide):
    """The residual stream from a block of which nothing else is asked: XLA then fuses otherwise."""

    def __init__(self, config: MixtralConfig, weights: Weights):
        super().__init__(config, weights)
        self._run_untapped = jax.jit(lambda *given: run_block(*given).resid_out)

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        trace = super().block(layer, x_BTD, batch, routing)
        forced_MA = None if routing is None else jnp.asarray(routing)
        given = (self._block(layer), jnp.asarray(x_BTD), self._context(batch, x_BTD), forced_MA)
        trace.arrays["resid_out"] = np.asarray(self._run_untapped(*given))
        return trace


def _independent(config: MixtralConfig, weights: Weights) -> Side:
    """Build the NumPy side on the same leaves."""
    dtype: Precision = "bfloat16" if weights[next(iter(weights))].dtype == ml_dtypes.bfloat16 else "float32"
    return NarrowSide(config, Checkpoint.of_arrays(config, dict(weights), "the port").view("hf-legacy"), dtype)


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


def _through(backend: Backend) -> type[FlaxSide]:
    """Apply the experts by another backend than the model was built for."""

    def apply(
        x_MD: jax.Array,
        weights_MA: jax.Array,
        ids_MA: jax.Array,
        kernels: Kernels,
        hidden_act: str,
        built_for: Backend,
        exact: Callable[..., jax.Array] = experts.apply_experts,
    ) -> jax.Array:
        split = [[stacked[e] for e in range(len(stacked))] for stacked in kernels]
        wanted = Kernels(*split) if backend == "blocks" else Kernels(*map(jnp.stack, split))
        return exact(x_MD, weights_MA, ids_MA, wanted, hidden_act, backend)

    return type("_Through", (_Changed,), {"functions": ((experts.apply_experts, apply),)})


class _OverDevices(_through("parallel")):  # type: ignore[misc]  # a class that is made by a function
    """The experts shared among devices."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        with jax.set_mesh(jax.make_mesh((DEVICES,), ("expert",), axis_types=(AxisType.Auto,))):
            trace: Trace = super().block(layer, x_BTD, batch, routing)
        return trace


def _other_than(backend: Backend) -> Need:
    return Need("a model built for another backend", lambda scene: choose_backend("auto", scene.config) != backend)


SHARED = Need(
    f"{DEVICES} devices, as XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES} simulates, to share the experts "
    "evenly",
    lambda scene: len(jax.devices()) >= DEVICES and scene.config.num_local_experts % DEVICES == 0,
)


def _copied_bytes(scene: Scene) -> int:
    """Say what torch's batched_mm holds: the three kernels of each token's experts, in float32 at most."""
    config = scene.config
    kernels = 3 * config.hidden_size * config.intermediate_size
    return scene.tokens * config.num_experts_per_tok * kernels * np.dtype(np.float32).itemsize


COPIES = Need(
    "memory for the kernels that batched_mm copies for every token",
    lambda scene: _copied_bytes(scene) <= available_bytes(),
)

CONTROLS = (
    Control("unchanged"),
    Control("op-by-op", side=_OpByOp),
    Control("other-batch-size", side=_RowByRow),
    Control("padded-at-the-other-end", side=_PaddedAtTheOtherEnd),
    Control("taps-off", side=_Untapped),
    Control("softmax-of-chosen", side=_SoftmaxOfChosen),
    Control("experts-dense", side=_through("dense"), needs=_other_than("dense")),
    Control("experts-in-blocks", side=_through("blocks"), needs=_other_than("blocks")),
    Control("experts-ragged", side=_through("ragged"), needs=_other_than("ragged")),
    Control("experts-over-devices", side=_OverDevices, needs=SHARED),
    Control("independent", side=_independent),
    Control("two-threads", threads=2),
    Control("sdpa", attention="sdpa"),
    Control("experts-eager", experts="eager"),
    Control("experts-batched", experts="batched_mm", needs=COPIES),
    Control("with-a-cache", cached=True, needs=GENERATES),
)
