"""Every fault of the catalogue that a block can have is planted, and named first; nothing correct is accused."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy.special import erf  # type: ignore[import-untyped]  # SciPy ships no types

from flax_mixtral.config import MixtralConfig
from parity.diagnosis.diagnose import replay, slope
from parity.diagnosis.hypotheses import HYPOTHESES
from parity.oracle.model import EXACT
from parity.sides.flax import FlaxSide
from parity.trace import Array, Batch
from tests.parity.diagnosis.scenes import LAYER, Scene
from tests.parity.diagnosis.test_flax_faults import PATCHES


def bfloat16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


# --- faults in NumPy, each said in another way than in the table ----------------------------------------------------


def neighbours(x: Array, cos: Array, sin: Array) -> Array:
    pairs = x.shape[-1] // 2
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, :, None, :pairs]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(x.dtype)


def low_frequencies(config: MixtralConfig, length: int) -> tuple[Array, float]:
    return bfloat16(config.rope.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)), 1.0


def other_window(by: int) -> Callable[[Batch, int], Array]:
    def visible(batch: Batch, window: int) -> Array:
        T = batch.input_ids.shape[1]
        distance_TS = np.subtract.outer(np.arange(T), np.arange(T))
        seen_TS = (distance_TS >= 0) & (distance_TS < window + by)
        return seen_TS & batch.real_BT[:, None, :]

    return visible


def plain_softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def nan_softmax(scores: Array, visible: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return plain_softmax(np.where(visible[:, None], scores, np.float32(-np.inf)))


def low_softmax(scores: Array, visible: Array) -> Array:
    masked = np.where(visible[:, None], bfloat16(scores), -1e30).astype(ml_dtypes.bfloat16)
    powers = np.exp(masked - masked.max(axis=-1, keepdims=True))
    total = bfloat16(powers.astype(np.float32).sum(axis=-1, keepdims=True)).astype(ml_dtypes.bfloat16)
    return np.asarray(powers / total).astype(scores.dtype)


def low_product(x: Array, kernel: Array) -> Array:
    return np.asarray(np.einsum("...i,oi->...o", bfloat16(x), bfloat16(kernel.astype(x.dtype))))


def low_router(x: Array, kernel: Array) -> Array:
    if len(kernel) == 5:  # E
        return bfloat16(low_product(x, kernel))
    return EXACT.project(x, kernel)


def noisy_router(x: Array, kernel: Array) -> Array:
    if len(kernel) == 5:
        x = x * np.random.default_rng(0).uniform(0.99, 1.01, x.shape).astype(x.dtype)
    return EXACT.project(x, kernel)


def low_matmul() -> dict[str, Any]:
    return {
        "project": low_product,
        "scores": lambda q, k: EXACT.scores(bfloat16(q), bfloat16(k)),
        "mix": lambda w, v: EXACT.mix(bfloat16(w), bfloat16(v)),
    }


def capacity(x: Array, ids: Array, weights: Array, expert: int) -> tuple[Array, Array, Array]:
    most = int(1.0 * ids.size / 5)
    return tuple(part[:most] for part in EXACT.dispatch(x, ids, weights, expert))  # type: ignore[return-value]


def no_last_expert(x: Array, ids: Array, weights: Array, expert: int) -> tuple[Array, Array, Array]:
    return EXACT.dispatch(x, np.where(ids == 4, -1, ids), weights, expert)


def weighted_input(x: Array, ids: Array, weights: Array, expert: int) -> tuple[Array, Array, Array]:
    rows, slots = np.nonzero(ids == expert)
    return rows, x[rows] * weights[rows, slots, None], np.ones(len(rows), x.dtype)


def low_combine(total: Array, rows: Array, weights: Array, down: Array) -> Array:
    wide = total.astype(ml_dtypes.bfloat16)
    wide[rows] += weights[:, None].astype(ml_dtypes.bfloat16) * down.astype(ml_dtypes.bfloat16)
    return wide.astype(total.dtype)


def unpaired(logits: Array, probs: Array, ids: Array) -> Array:
    return np.ascontiguousarray(EXACT.weigh(logits, probs, ids)[:, ::-1])


def taken(probs: Array, ids: Array) -> Array:
    return np.asarray(probs[np.arange(len(ids))[:, None], ids])


OPS: dict[str, dict[str, Any]] = {
    "norm-plus-one": {
        "norm": lambda x, scale, eps: EXACT.norm(x, scale, eps) + EXACT.norm(x, np.ones_like(scale), eps)
    },
    "residual-from-normed": {"residual": lambda stream, normed, branch: normed + branch},
    "rope-interleaved": {"rotate": neighbours},
    "rope-freq-low-precision": {"frequencies": low_frequencies},
    "padding-positions": {"positions": lambda batch: np.cumsum(np.ones_like(batch.input_ids), axis=1) - 1},
    "cache-position": {"positions": lambda batch: batch.position_ids + 1},
    "window-off-by-one": {"visible": other_window(1)},
    "window-off-by-one less": {"visible": other_window(-1)},
    "window-off-by-one none": {"visible": other_window(999)},
    "window-off-by-one much less": {"visible": other_window(-14)},
    "causal-mask-missing": {"visible": lambda batch, window: np.repeat(batch.real_BT[:, None], 64, axis=1)},
    "masked-row-nan": {"attention_softmax": nan_softmax},
    "kv-heads-tiled": {"repeat": lambda x, heads: x[:, :, np.arange(heads) % x.shape[2]]},
    "attention-scale": {"scores": lambda q, k: EXACT.scores(q, k) * np.float32(q.shape[-1] ** 0.5 / 6**0.5)},
    "attention-scale twice": {"scores": lambda q, k: EXACT.scores(q, k) / np.float32(q.shape[-1] ** 0.5)},
    "head-dim-ignored": {"scores": lambda q, k: EXACT.scores(q, k) * np.float32(q.shape[-1] ** 0.5 / 4**0.5)},
    "softmax-low-precision": {"attention_softmax": low_softmax},
    "router-not-renormalised": {"weigh": lambda logits, probs, ids: taken(probs, ids)},
    "router-raw-logits": {"weigh": lambda logits, probs, ids: taken(logits, ids)},
    "router-low-precision": {"project": low_router},
    "router-probs-rounded": {"router_softmax": lambda logits: bfloat16(plain_softmax(logits))},
    "ids-weights-unpaired": {"weigh": unpaired},
    "combine-low-precision": {"combine": low_combine},
    "capacity-drop": {"dispatch": capacity},
    "expert-skipped": {"dispatch": no_last_expert},
    "weight-before-expert": {"dispatch": weighted_input},
    "activation-wrong": {"activate": lambda name, x: (x * (1 + erf(x / np.sqrt(2))) / 2).astype(x.dtype)},
    "jitter-on": {"project": noisy_router},
    "matmul-low-precision": low_matmul(),
}
"""The operations of a faulty side, by slug; a second word tells variants apart."""

CONFIGS: dict[str, dict[str, Any]] = {
    "norm-eps": {"rms_norm_eps": 1e-6},
    "top-k-wrong": {"num_experts_per_tok": 3},
}


@pytest.mark.parametrize("name", OPS)
def test_a_faulty_operation_is_named(scene: Callable[..., Scene], name: str) -> None:
    case = scene()
    causes = case.causes(case.fake(**OPS[name]))
    assert causes, "nothing was found"
    assert causes[0].fault == name.split()[0], causes
    assert causes[0].layer == LAYER


@pytest.mark.parametrize("name", CONFIGS)
def test_a_faulty_configuration_is_named(scene: Callable[..., Scene], name: str) -> None:
    case = scene()
    causes = case.causes(case.fake(dataclasses.replace(case.config, **CONFIGS[name])))
    assert [cause.fault for cause in causes] == [name], causes


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_another_theta_is_named(scene: Callable[..., Scene], theta: float) -> None:
    case = scene()
    config = dataclasses.replace(case.config, rope=dataclasses.replace(case.config.rope, rope_theta=theta))
    causes = case.causes(case.fake(config))
    assert [cause.fault for cause in causes] == ["rope-theta"], causes
    assert f"{theta:g}" in causes[0].evidence


def test_a_window_that_the_configuration_does_not_have_is_named(scene: Callable[..., Scene]) -> None:
    case = scene(sliding_window=None)
    causes = case.causes(case.fake(visible=lambda batch, window: EXACT.visible(batch, 23)))
    assert [cause.fault for cause in causes] == ["window-off-by-one"], causes
    assert "sliding window 23 for None" in causes[0].evidence


def test_another_order_among_ties_is_named(scene: Callable[..., Scene]) -> None:
    case = scene(ties=True)

    def highest(probs_ME: Array, count: int) -> Array:
        return np.lexsort((-np.arange(5)[None].repeat(len(probs_ME), 0), -probs_ME), axis=-1)[:, :count]

    assert case.causes(case.fake()) == []
    assert [cause.fault for cause in case.causes(case.fake(choose=highest))] == ["router-tie-break"]


def test_the_final_norm_inside_the_last_block_is_named(scene: Callable[..., Scene]) -> None:
    case = scene(layer=11)
    side = case.fake()
    trace = side.block(11, case.x_BTD, case.batch)
    trace.arrays["resid_out"] = side.head(trace["resid_out"], case.batch)["final_norm"]
    causes = replay(
        case.config, case.legacy, case.batch, 11, case.x_BTD, case.torch, trace, dtype="float32", point="resid_out"
    )
    assert [cause.fault for cause in causes] == ["hidden-state-after-norm"], causes


# --- weights used in the wrong place --------------------------------------------------------------------------------


def swapped(weights: Mapping[str, Array], one: str, other: str, below: str = "") -> dict[str, Array]:
    names = {one: other, other: one}

    def partner(name: str) -> str:
        head, mark, tail = name.rpartition(f"{below}.") if below else ("", "", name)
        return head + mark + ".".join(names.get(part, part) for part in tail.split("."))

    return {name: weights[partner(name)] for name in weights}


def interleaved(kernel: Array) -> Array:
    order = np.arange(60).reshape(6, 2, 5).transpose(0, 2, 1).reshape(-1)[: len(kernel)]
    return kernel[order]


WEIGHTS: dict[str, Callable[[dict[str, Array]], dict[str, Array]]] = {
    "w1-w3-swapped": lambda weights: swapped(weights, "w1", "w3"),
    "k-v-swapped": lambda weights: swapped(weights, "k_proj", "v_proj"),
    "norms-swapped": lambda weights: swapped(weights, "input_layernorm", "post_attention_layernorm"),
    "rope-rows-permuted": lambda weights: {
        name: interleaved(array) if "q_proj" in name or "k_proj" in name else array for name, array in weights.items()
    },
    "experts-permuted": lambda weights: swapped(weights, "0", "3", below="experts"),
    "layers-sorted-as-strings": lambda weights: {
        name: weights[name.replace(f"layers.{LAYER}.", "layers.10.")] for name in weights
    },
}


@pytest.mark.parametrize("slug", WEIGHTS)
def test_weights_used_in_the_wrong_place_are_named(scene: Callable[..., Scene], slug: str) -> None:
    case = scene()
    causes = case.causes(case.fake(weights=WEIGHTS[slug](dict(case.legacy))))
    assert [cause.fault for cause in causes] == [slug], causes


def test_a_square_kernel_left_as_it_lies_is_named(scene: Callable[..., Scene]) -> None:
    case = scene(hidden_size=60)
    for module in ("q_proj", "o_proj"):
        weights = {name: array.T if module in name else array for name, array in case.legacy.items()}
        causes = case.causes(case.fake(weights=weights))
        assert [cause.fault for cause in causes] == ["kernel-not-transposed"], causes
        assert module in causes[0].evidence


# --- the head -------------------------------------------------------------------------------------------------------


def test_faults_of_the_head_are_named(scene: Callable[..., Scene]) -> None:
    case = scene()
    head, rng = "lm_head.weight", np.random.default_rng(0)
    shape = case.legacy[head].shape
    sides = {
        "final-norm-missing": case.fake(norm=lambda x, scale, eps: x),
        "norm-plus-one": case.fake(**OPS["norm-plus-one"]),
        "norm-eps": case.fake(dataclasses.replace(case.config, rms_norm_eps=1e-4)),
        "lm-head-wrong": case.fake(weights={**case.legacy, head: case.legacy["model.embed_tokens.weight"]}),
        "lm-head-wrong (not loaded)": case.fake(weights={**case.legacy, head: rng.normal(size=shape).astype("f4")}),
        "vocab-rows-shifted": case.fake(weights={**case.legacy, head: np.roll(case.legacy[head], 1, axis=0)}),
    }
    found = {name: [cause.fault for cause in case.head_causes(side)][:1] for name, side in sides.items()}
    assert found == {name: [name.split()[0]] for name in sides}
    assert case.head_causes(case.fake()) == []
    assert case.head_causes(FlaxSide(case.config, case.flax_leaves)) == []


# --- what is not in the table ---------------------------------------------------------------------------------------


def test_a_fault_that_is_not_in_the_table_is_unknown(scene: Callable[..., Scene]) -> None:
    case = scene()
    causes = case.causes(case.fake(mix=lambda weights, v: EXACT.mix(weights**2, v)))
    assert [(cause.fault, cause.point) for cause in causes] == [("unknown", "attn_context")]
    assert "ruled out: " in causes[0].evidence


def test_what_a_side_does_not_record_is_no_cause_and_hides_none(scene: Callable[..., Scene]) -> None:
    case = scene()
    trace = case.fake(**OPS["kv-heads-tiled"]).block(LAYER, case.x_BTD, case.batch)
    for name in ("input_norm", "k", "q_rot", "router_probs", "moe_out", "expert.1.down"):
        del trace.arrays[name]
    trace.arrays["router_logits"] = trace.arrays["router_logits"][:, :4]
    causes = replay(case.config, case.legacy, case.batch, LAYER, case.x_BTD, case.torch, trace, dtype="float32")
    assert [(cause.fault, cause.point) for cause in causes[:2]] == [
        ("kv-heads-tiled", "attn_context"),
        ("unknown", "router_logits"),
    ]


def test_two_faults_in_one_block_are_both_named(scene: Callable[..., Scene]) -> None:
    case = scene()
    causes = case.causes(case.fake(**OPS["rope-interleaved"], **OPS["router-raw-logits"]))
    assert [cause.fault for cause in causes] == ["rope-interleaved", "router-raw-logits"]


def test_every_row_of_the_table_is_planted() -> None:
    told = {"router-tie-break", "hidden-state-after-norm", "kernel-not-transposed", "rope-theta"}
    told |= {"final-norm-missing", "lm-head-wrong", "vocab-rows-shifted"}
    names = {name.split()[0] for name in (*OPS, *CONFIGS, *WEIGHTS, *PATCHES)}
    assert {hypothesis.slug for hypothesis in HYPOTHESES} == names | told


@pytest.mark.parametrize(
    ("errors", "says"),
    [
        ({"float64": 1e-2, "float32": 1e-2, "bfloat16": 1.4e-2}, "logic or weights"),
        ({"float64": 2e-16, "float32": 1e-7, "bfloat16": 5e-3}, "rounding alone"),
        ({"float64": 2e-16, "float32": 1e-7, "bfloat16": 0.4}, "not upcast"),
        ({"float64": 2e-16, "float32": 1e-3, "bfloat16": 0.4}, "neither"),
        ({"float32": 1e-7}, "no slope"),
    ],
)
def test_the_slope_of_an_error_over_dtypes(errors: dict[str, float], says: str) -> None:
    assert says in slope(errors)
