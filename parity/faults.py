"""Known faults of real ports, each planted into one layer of the Flax side: the proof that the harness finds them.

A fault is one row: what it changes (weights, configuration or one function), and the point that must show it first.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from flax_mixtral import attention, moe
from flax_mixtral.config import MixtralConfig
from flax_mixtral.decoder import BlockTrace
from flax_mixtral.moe import Routing, route
from flax_mixtral.projection import project
from flax_mixtral.rope import Rotary
from parity.sides import Side
from parity.sides.flax import FlaxSide, run_block
from parity.trace import Array, Batch, Trace

__all__ = ["FAULTS", "Fault", "planted"]

Weights = Mapping[str, Array]


def _same_weights(weights: Weights, leaf: str) -> Array:
    return weights[leaf]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Args:
        slug: its name in the catalogue.
        point: the comparison point that shows it first, in the layer where it is planted.
        weights: gives a leaf as the fault has it, from all leaves and the leaf's path.
        config: changes the configuration.
        patch: replaces a function while the layer runs.
    """

    slug: str
    point: str
    weights: Callable[[Weights, str], Array] = _same_weights
    config: Callable[[MixtralConfig], MixtralConfig] = lambda config: config
    patch: Callable[[], AbstractContextManager[object]] = nullcontext


def planted(fault: Fault, layer: int) -> Callable[[MixtralConfig, Weights], Side]:
    """Give a factory of Flax sides that have the fault in one layer."""
    return lambda config, weights: _PlantedSide(fault, layer, config, weights)


def _gate_and_up_swapped(weights: Weights, leaf: str) -> Array:
    swap = {"gate": "up", "up": "gate"}
    stem, _, last = leaf.rpartition(".")
    return weights[f"{stem}.{swap[last]}"] if ".experts." in leaf and last in swap else weights[leaf]


def _experts_rolled(weights: Weights, leaf: str) -> Array:
    return np.roll(weights[leaf], 1, axis=0) if ".experts." in leaf else weights[leaf]


def _rotate_neighbours(x_BTNH: jax.Array, rotation: Rotary) -> jax.Array:
    """Pair lanes 2p and 2p + 1, as the paper and Mistral's own code do."""
    pairs_BTN1P = rotation.cos_BTH.shape[-1] // 2
    cos, sin = (jnp.repeat(part[:, :, None, :pairs_BTN1P], 2, axis=-1) for part in rotation)
    even, odd = x_BTNH[..., ::2], x_BTNH[..., 1::2]
    turned_BTNH = jnp.stack([-odd, even], axis=-1).reshape(x_BTNH.shape)
    return x_BTNH * cos + turned_BTNH * sin


def _route_without_sum(
    x_MD: jax.Array, kernel_DE: jax.Array, per_token: int, ids_MA: jax.Array | None = None
) -> Routing:
    routing = route(x_MD, kernel_DE, per_token, ids_MA)
    used_MA = routing.ids_MA if ids_MA is None else ids_MA
    return routing._replace(weights_MA=jnp.take_along_axis(routing.probs_ME, used_MA, axis=-1))


def _attend_tiled(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, **training: object
) -> jax.Array:
    """Give query head n the key/value head n mod K instead of n // G."""
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.tile(x, (1, 1, groups, 1)) for x in (k_BSKH, v_BSKH))
    scores_BNTS = project("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * q_BTNH.shape[-1] ** -0.5
    scores_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS, jnp.finfo(q_BTNH.dtype).min)
    return project("BNTS,BSNH->BTNH", jax.nn.softmax(scores_BNTS, axis=-1), v_BSNH)


FAULTS = (
    Fault("w1-w3-swapped", "expert.0.gate", weights=_gate_and_up_swapped),
    Fault("experts-permuted", "expert.0.gate", weights=_experts_rolled),
    Fault("norm-eps", "input_norm", config=lambda config: replace(config, rms_norm_eps=config.rms_norm_eps / 10)),
    Fault("rope-interleaved", "q_rot", patch=lambda: mock.patch.object(attention, "rotate", _rotate_neighbours)),
    Fault("kv-heads-tiled", "attn_context", patch=lambda: mock.patch.object(attention, "attend", _attend_tiled)),
    Fault(
        "router-not-renormalised", "router_weights", patch=lambda: mock.patch.object(moe, "route", _route_without_sum)
    ),
)


class _PlantedWeights(Mapping[str, Array]):
    """Weights as a fault has them."""

    def __init__(self, fault: Fault, weights: Weights):
        self._fault, self._weights = fault, weights

    def __getitem__(self, leaf: str) -> Array:
        return self._fault.weights(self._weights, leaf)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class _FaultySide(FlaxSide):
    """The Flax side with a fault in every layer."""

    def __init__(self, fault: Fault, config: MixtralConfig, weights: Weights):
        super().__init__(fault.config(config), _PlantedWeights(fault, weights))
        self._fault = fault

    def compiled_block(self) -> Callable[..., BlockTrace]:
        """Give a function of its own to jit, which would otherwise find the healthy one's compilation."""

        def run(*args: Any) -> BlockTrace:
            with self._fault.patch():
                return run_block(*args)

        return jax.jit(run)


class _PlantedSide(FlaxSide):
    """The Flax side with a fault in one layer."""

    def __init__(self, fault: Fault, layer: int, config: MixtralConfig, weights: Weights):
        super().__init__(config, weights)
        self._layer = layer
        self._faulty = _FaultySide(fault, config, weights)

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        if layer == self._layer:
            return self._faulty.block(layer, x_BTD, batch, routing)
        return super().block(layer, x_BTD, batch, routing)
