"""Known faults of real ports, one row each: what they change, and which point must show them first.

Slugs and order are those of the catalogue in docs/diagnosing.md.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from flax_mixtral import attention, decoder, experts, moe, norm, projection, rope
from flax_mixtral.config import MixtralConfig
from flax_mixtral.decoder import DecoderBlock
from parity.metrics import UNIT_ROUNDOFF, Precision
from parity.selftest import faulty_cache
from parity.selftest import faulty_ops as wrong
from parity.selftest.planting import GENERATES, Fault, Functions, Need, Scene, Weights, planted
from parity.sides import flax_operations
from parity.sides.flax import FlaxSide
from parity.trace import Array, Batch, Trace
from parity.verdict import MARGIN_LIMIT

__all__ = ["FAULTS", "Fault", "planted"]

F32: tuple[Precision, ...] = ("float32",)
BF16: tuple[Precision, ...] = ("bfloat16",)


def _instead(*pairs: tuple[Callable[..., Any], Callable[..., Any]]) -> Callable[[MixtralConfig], Functions]:
    return lambda config: pairs


def _exchanged(one: str, other: str) -> dict[str, str]:
    return {one: other, other: one}


def _swap(names: dict[str, str]) -> Callable[[MixtralConfig, Weights, str], Array]:
    """Give the leaf that has the other name in its path."""

    def weights(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
        parts = leaf.split(".")
        return weights[".".join(names.get(part, part) for part in parts)]

    return weights


def _transposed(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
    kernel = weights[leaf]
    if not leaf.endswith("attention.q.kernel"):
        return kernel
    return np.ascontiguousarray(kernel.reshape(len(kernel), -1).T).reshape(kernel.shape)


def _interleaved(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
    kernel = weights[leaf]
    if not leaf.endswith(("attention.q.kernel", "attention.k.kernel")):
        return kernel
    halves = kernel.reshape(*kernel.shape[:2], 2, -1)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).reshape(kernel.shape)


def _sorted_as_strings(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
    parts = leaf.split(".")
    if "layers" not in parts:
        return weights[leaf]
    at = parts.index("layers") + 1
    parts[at] = sorted(map(str, range(config.num_hidden_layers)))[int(parts[at])]
    return weights[".".join(parts)]


def _of_experts(change: Callable[[Array], Array]) -> Callable[[MixtralConfig, Weights, str], Array]:
    def weights(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
        return change(weights[leaf]) if ".experts." in leaf else weights[leaf]

    return weights


def _uninitialised(stacked_EXX: Array) -> Array:
    drawn = stacked_EXX.copy()
    drawn[-1] = np.random.default_rng(0).normal(0, 0.02, drawn[-1].shape)
    return drawn


def _rows_mixed(stacked_EXX: Array) -> Array:
    """Split a fused tensor as if its rows were interleaved: the experts' rows end up in each other."""
    E = len(stacked_EXX)
    return np.ascontiguousarray(stacked_EXX.reshape(-1, E, stacked_EXX.shape[2]).swapaxes(0, 1)).reshape(
        stacked_EXX.shape
    )


def _tied_head(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
    return weights["model.embed_tokens.embedding"].T if leaf == "lm_head.kernel" else weights[leaf]


def _through_float16(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
    with np.errstate(over="ignore"):
        return weights[leaf].astype(np.float16).astype(weights[leaf].dtype)


def _rows_shifted(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
    return np.roll(weights[leaf], 1, axis=0) if leaf.endswith("embed_tokens.embedding") else weights[leaf]


def _positions_count_padding(batch: Batch) -> Batch:
    return replace(batch, position_ids=np.broadcast_to(np.arange(batch.input_ids.shape[1]), batch.input_ids.shape))


def _other_first_token(batch: Batch) -> Batch:
    ids_BT = batch.input_ids.copy()
    ids_BT[:, -1] = ids_BT[:, 0]
    return replace(batch, input_ids=ids_BT)


def _without(name: str) -> Callable[[Trace, FlaxSide, Batch], None]:
    def trace(trace: Trace, side: FlaxSide, batch: Batch) -> None:
        trace.arrays.pop(name, None)

    return trace


def _unshared(trace: Trace, side: FlaxSide, batch: Batch) -> None:
    """Keep what the walk goes on with, and no point that anybody compares."""
    trace.arrays = {name: array for name, array in trace.arrays.items() if name == "resid_out"}


def _normed(trace: Trace, side: FlaxSide, batch: Batch) -> None:
    trace.arrays["resid_out"] = side.head(trace["resid_out"], batch)["final_norm"]


def _other_activation(config: MixtralConfig) -> MixtralConfig:
    return replace(config, hidden_act="gelu" if config.hidden_act != "gelu" else "silu")


def _other_top_k(config: MixtralConfig) -> MixtralConfig:
    k = config.num_experts_per_tok
    return replace(config, num_experts_per_tok=k - 1 if k > 1 else k + 1)


NO_WINDOW_INSTEAD = 16
"""The window of a fault in a model that has none."""


def _other_window(config: MixtralConfig) -> MixtralConfig:
    window = config.sliding_window
    return replace(config, sliding_window=NO_WINDOW_INSTEAD if window is None else window + 1)


def _other_theta(config: MixtralConfig) -> MixtralConfig:
    theta = 1e4 if config.rope.rope_theta != 1e4 else 1e6
    return replace(config, rope=replace(config.rope, rope_theta=theta))


def _tenth_of_eps(config: MixtralConfig) -> MixtralConfig:
    return replace(config, rms_norm_eps=config.rms_norm_eps / 10)


def _eps_shows(scene: Scene) -> bool:
    """Say whether the norm of any token moves by more than a margin leaves to rounding; deep in a model none does.

    The norm rounds twice: what it normalises, and the product with the gain.
    """
    eps, wrong = scene.config.rms_norm_eps, _tenth_of_eps(scene.config).rms_norm_eps
    moved = math.sqrt((scene.quietest + eps) / (scene.quietest + wrong)) - 1
    return moved > MARGIN_LIMIT["float32"] * 2 * UNIT_ROUNDOFF["float32"]


SEVERAL_EXPERTS = Need("several experts per token", lambda scene: scene.config.num_experts_per_tok > 1)
SQUARE_Q = Need(
    "a square query kernel: N * H = D",
    lambda scene: scene.config.num_attention_heads * scene.config.head_dim == scene.config.hidden_size,
)
OWN_HEAD_DIM = Need("a head_dim other than D / N", lambda scene: not SQUARE_Q.met(scene))
GROUPED = Need(
    "several key heads, each for several query heads",
    lambda scene: 1 < scene.config.num_key_value_heads < scene.config.num_attention_heads,
)
OWN_HEAD = Need(
    "a language model's head of its own",
    lambda scene: scene.config.architecture == "MixtralForCausalLM" and not scene.config.tie_word_embeddings,
)
MANY_LAYERS = Need("more than 10 layers", lambda scene: scene.config.num_hidden_layers > 10)
BEYOND_WINDOW = Need(
    "inputs longer than the window",
    lambda scene: scene.longest > (scene.config.sliding_window or NO_WINDOW_INSTEAD),
)
QUIET = Need("a token quiet enough for rms_norm_eps to show above rounding", _eps_shows)
TIES = Need("router probabilities that tie exactly", lambda scene: scene.ties > 0)


GATE = ("expert.gate",)

WEIGHTS = (
    Fault(slug="w1-w3-swapped", shows=GATE, weights=_swap(_exchanged("gate", "up"))),
    Fault(slug="kernel-not-transposed", shows=("q",), weights=_transposed, needs=SQUARE_Q),
    Fault(slug="rope-rows-permuted", shows=("q",), weights=_interleaved),
    Fault(slug="k-v-swapped", shows=("k",), weights=_swap(_exchanged("k", "v"))),
    Fault(slug="norms-swapped", shows=("input_norm",), weights=_swap(_exchanged("input_norm", "post_attention_norm"))),
    Fault(
        slug="layers-sorted-as-strings",
        shows=("input_norm",),
        place="model",
        weights=_sorted_as_strings,
        fixed_layer=2,
        needs=MANY_LAYERS,
    ),
    Fault(slug="experts-permuted", shows=GATE, weights=_of_experts(lambda stacked: np.roll(stacked, 1, axis=0))),
    Fault(slug="expert-uninitialised", shows=GATE, weights=_of_experts(_uninitialised)),
    Fault(slug="lm-head-wrong", shows=("logits",), place="head", weights=_tied_head, needs=OWN_HEAD),
    Fault(slug="weights-through-float16", shows=("input_norm",), weights=_through_float16, dtypes=F32),
    Fault(slug="vocab-rows-shifted", shows=("embed",), place="model", weights=_rows_shifted),
    Fault(slug="expert-rows-mixed", shows=GATE, weights=_of_experts(_rows_mixed)),
)

NORMS = (
    Fault(
        slug="norm-eps",
        shows=("input_norm",),
        config=_tenth_of_eps,
        dtypes=F32,
        needs=QUIET,
    ),
    Fault(
        slug="norm-cast-order",
        shows=("input_norm",),
        functions=_instead((norm.rms_norm, wrong.norm_cast_last)),
        dtypes=BF16,
    ),
    Fault(slug="norm-plus-one", shows=("input_norm",), functions=_instead((norm.rms_norm, wrong.norm_plus_one))),
    Fault(
        slug="norm-not-upcast",
        shows=("input_norm",),
        functions=_instead((norm.rms_norm, wrong.norm_in_bfloat16)),
        dtypes=BF16,
    ),
    Fault(
        slug="final-norm-missing",
        shows=("final_norm",),
        place="head",
        functions=_instead((norm.rms_norm, wrong.no_norm)),
    ),
    Fault(
        slug="residual-from-normed",
        shows=("resid_mid",),
        functions=_instead((DecoderBlock.__call__, wrong.block_from_normed)),
    ),
)

ATTENTION = (
    Fault(slug="rope-interleaved", shows=("q_rot",), functions=_instead((rope.rotate, wrong.rotate_neighbours))),
    Fault(slug="rope-theta", shows=("q_rot",), config=_other_theta),
    Fault(
        slug="rope-freq-low-precision",
        shows=("q_rot",),
        functions=_instead((rope.inverse_frequencies, wrong.frequencies_in_bfloat16)),
    ),
    Fault(slug="padding-positions", shows=("q_rot",), batch=_positions_count_padding),
    Fault(slug="window-off-by-one", shows=("attn_context",), config=_other_window, needs=BEYOND_WINDOW),
    Fault(
        slug="causal-mask-missing",
        shows=("attn_context",),
        functions=_instead((attention.visible_keys, wrong.see_all_keys)),
    ),
    Fault(
        slug="masked-row-nan",
        shows=("attn_context",),
        functions=_instead((attention.attention_probs, wrong.probs_masked_by_infinity)),
    ),
    Fault(
        slug="kv-heads-tiled",
        shows=("attn_context",),
        functions=_instead(
            (attention.attention_scores, wrong.scores_of_tiled_heads),
            (attention.mix_values, wrong.values_of_tiled_heads),
        ),
        needs=GROUPED,
    ),
    Fault(
        slug="attention-scale",
        shows=("attn_context",),
        functions=_instead((attention.attention_scores, wrong.scores_scaled_twice)),
    ),
    Fault(
        slug="head-dim-ignored",
        shows=("attn_context",),
        needs=OWN_HEAD_DIM,
        functions=lambda config: ((attention.attention_scores, wrong.scores_of_width(config)),),
    ),
    Fault(
        slug="softmax-low-precision",
        shows=("attn_probs",),
        functions=_instead((attention.attention_probs, wrong.probs_in_bfloat16)),
        dtypes=BF16,
    ),
)

EXPERTS = (
    Fault(
        slug="expert-skipped",
        shows=("moe_out",),
        functions=_instead((experts.apply_experts, wrong.experts_but_the_last)),
    ),
    Fault(
        slug="router-not-renormalised",
        shows=("router_weights",),
        functions=_instead((moe.weigh, wrong.weigh_without_sum)),
    ),
    Fault(
        slug="router-raw-logits",
        shows=("router_weights",),
        functions=_instead((moe.route, wrong.route_by_logits)),
    ),
    Fault(
        slug="router-low-precision",
        shows=("router_logits",),
        functions=_instead((moe.route, wrong.route_in_bfloat16)),
        dtypes=F32,
    ),
    Fault(
        slug="router-probs-rounded",
        shows=("router_probs",),
        functions=_instead((moe.router_probs, wrong.probs_rounded)),
    ),
    Fault(
        slug="router-tie-break",
        shows=("router_ids",),
        functions=_instead((moe.choose, wrong.choose_highest)),
        needs=TIES,
    ),
    Fault(slug="top-k-wrong", shows=("router_ids",), config=_other_top_k),
    Fault(
        slug="ids-weights-unpaired",
        shows=("router_weights",),
        functions=_instead((moe.weigh, wrong.weigh_in_reverse)),
        needs=SEVERAL_EXPERTS,
    ),
    Fault(
        slug="combine-low-precision",
        shows=("moe_out",),
        functions=_instead(
            (experts.apply_experts, wrong.experts_summed_in_bfloat16),
            (flax_operations.combine, wrong.combined_in_bfloat16),
        ),
        dtypes=BF16,
    ),
    Fault(
        slug="capacity-drop",
        shows=("moe_out",),
        functions=_instead((experts.apply_experts, wrong.experts_with_capacity)),
    ),
    Fault(
        slug="weight-before-expert",
        shows=("moe_out",),
        functions=_instead((experts.apply_experts, wrong.experts_on_weighted_input)),
    ),
    Fault(slug="activation-wrong", shows=("expert.act",), config=_other_activation),
    Fault(slug="jitter-on", shows=("router_logits",), functions=_instead((moe.jitter, wrong.jittered))),
)

RUN_TIME = (
    Fault(
        slug="matmul-low-precision",
        shows=("q",),
        functions=_instead(
            (projection.project, wrong.project_in_bfloat16),
            (attention.attention_scores, wrong.scores_in_bfloat16),
            (attention.mix_values, wrong.values_in_bfloat16),
        ),
        dtypes=F32,
    ),
    Fault(
        slug="cache-position",
        shows=("decode_logits",),
        place="cache",
        functions=_instead((decoder.context_of, faulty_cache.one_further)),
        needs=GENERATES,
    ),
    Fault(slug="inputs-differ", shows=("embed",), place="model", batch=_other_first_token),
    Fault(slug="hidden-state-after-norm", shows=("resid_out",), trace=_normed),
    Fault(slug="points-missing", shows=("attn_out",), trace=_without("attn_out"), unchecked=True),
    Fault(slug="traces-do-not-overlap", shows=("input_norm",), trace=_unshared, unchecked=True),
)

FAULTS = (*WEIGHTS, *NORMS, *ATTENTION, *EXPERTS, *RUN_TIME)
