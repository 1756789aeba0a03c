"""Faults of the Flax side itself, planted in its functions, are named; a correct port has no cause."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flax_mixtral import attention, experts, norm, projection, rope
from flax_mixtral.config import MixtralConfig
from flax_mixtral.experts import Backend, Kernels
from parity.diagnosis.diagnose import replay
from parity.metrics import Precision
from parity.port import Port
from parity.selftest.faults import FAULTS, Fault, planted
from parity.sides.flax import FlaxSide
from tests.parity.diagnosis.scenes import LAYER, Scene

SIX = (
    "w1-w3-swapped",
    "rope-interleaved",
    "norm-eps",
    "experts-permuted",
    "router-not-renormalised",
    "kv-heads-tiled",
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_correct_port_has_no_cause(scene: Callable[..., Scene], dtype: Precision) -> None:
    case = scene(dtype)
    assert case.causes(FlaxSide(case.config, case.flax_leaves)) == []


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.slug in SIX], ids=lambda fault: fault.slug)
def test_faults_planted_in_flax_are_named(scene: Callable[..., Scene], fault: Fault) -> None:
    case = scene()
    port = planted(fault, LAYER)(Port(case.config, case.flax_leaves))
    causes = case.causes(port.side(port.config, port.weights))
    assert [cause.fault for cause in causes] == [fault.slug], causes


def norm_cast_last(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scale.astype(jnp.float32) * normed).astype(x.dtype)


def norm_not_upcast(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return scale * (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(eps, x.dtype)))


def attend_low(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, **rest: Any) -> jax.Array:
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    # The scale in float32, as torch takes it: the softmax is the one fault.
    scores = projection.project("BTNH,BSNH->BNTS", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    scores = scores.astype(q.dtype)
    scores = jnp.where(visible[:, None], scores, jnp.finfo(q.dtype).min)
    return projection.project("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1), v)


def combine_low(
    x: jax.Array, weights: jax.Array, ids: jax.Array, kernels: Kernels, hidden_act: str, backend: Backend
) -> jax.Array:
    total = jnp.zeros_like(x)
    for number, (gate, up, down) in enumerate(zip(*kernels, strict=True)):
        weight = jnp.sum(jnp.where(ids == number, weights, 0), axis=-1, keepdims=True).astype(x.dtype)
        total = total + weight * experts.expert(x, gate, up, down, hidden_act).down_RD
    return total


original_frequencies = rope.inverse_frequencies


def frequencies_low(config: MixtralConfig, length: jax.Array) -> tuple[jax.Array, float]:
    found, factor = original_frequencies(config, length)
    return found.astype(jnp.bfloat16).astype(jnp.float32), factor


PATCHES: dict[str, tuple[str, Any, str, Any]] = {
    "norm-cast-order": ("input_norm", norm, "rms_norm", norm_cast_last),
    "norm-not-upcast": ("input_norm", norm, "rms_norm", norm_not_upcast),
    "softmax-low-precision": ("attn_context", attention, "attend", attend_low),
    "combine-low-precision": ("moe_out", experts, "apply_experts", combine_low),
    "rope-freq-low-precision": ("q_rot", rope, "inverse_frequencies", frequencies_low),
}
"""Faults that lose precision, as bfloat16 has them: where they show, and the function they replace."""


@pytest.mark.parametrize("slug", PATCHES)
def test_lost_precision_is_named_in_bfloat16(scene: Callable[..., Scene], slug: str) -> None:
    case = scene("bfloat16")
    point, module, name, replacement = PATCHES[slug]
    fault = Fault(slug=slug, shows=(point,), functions=lambda config: ((getattr(module, name), replacement),))
    port = planted(fault, LAYER)(Port(case.config, case.flax_leaves))
    trace = port.side(port.config, port.weights).block(LAYER, case.x_BTD, case.batch)
    causes = replay(
        case.config, case.legacy, case.batch, LAYER, case.x_BTD, case.torch, trace, dtype="bfloat16", point=point
    )
    assert causes[0].fault == slug, causes
