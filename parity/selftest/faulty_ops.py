"""Operations of flax_mixtral as wrong ports have them: each takes the place of the function of its name.

A substitute is written against the public signature of the original and shares as little as it can with it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mixtral import attention, experts, moe, projection, rope
from flax_mixtral.config import MixtralConfig
from flax_mixtral.decoder import BlockTrace, DecoderBlock
from flax_mixtral.experts import Backend, Kernels
from flax_mixtral.moe import Routing
from flax_mixtral.rope import Rotary
from parity.trace import Array, Trace, routed


def rounded(x: jax.Array) -> jax.Array:
    """Round to bfloat16 and keep the dtype; said so that XLA cannot keep more digits."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


# --- norms and residuals


def norm_cast_last(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Apply the gain in float32 and cast down after it."""
    wide_D = x_D.astype(jnp.float32)
    normed_D = wide_D / jnp.sqrt(jnp.mean(wide_D**2, axis=-1, keepdims=True) + eps)
    return (scale_D.astype(jnp.float32) * normed_D).astype(x_D.dtype)


def norm_plus_one(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Scale by 1 + gain."""
    return norm_cast_last(x_D, scale_D + 1, eps)


def norm_in_bfloat16(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Take the mean of squares without an upcast."""
    mean_square = rounded(jnp.mean(rounded(x_D.astype(jnp.float32) ** 2), axis=-1, keepdims=True))
    normed_D = rounded(x_D.astype(jnp.float32) * rounded(lax.rsqrt(rounded(mean_square + eps))))
    return (scale_D.astype(jnp.float32) * normed_D).astype(x_D.dtype)


def no_norm(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Leave the norm out."""
    return x_D


def block_from_normed(block: DecoderBlock, x_BTD: jax.Array, context: Any, *rest: Any, **named: Any) -> BlockTrace:
    """Add attention's output to the normed stream."""
    normed = block.input_norm(x_BTD)
    attended = block.attention(normed, context.rotation, context.visible_BTS)
    resid_mid = normed + attended.out_BTD
    post_attn_norm = block.post_attention_norm(resid_mid)
    routing_MA = rest[0] if rest else named.get("routing_MA")
    mixed = block.moe(post_attn_norm, routing_MA)
    return BlockTrace(
        input_norm=normed,
        q=attended.q_BTNH,
        k=attended.k_BTKH,
        v=attended.v_BTKH,
        q_rot=attended.q_rot_BTNH,
        k_rot=attended.k_rot_BTKH,
        attn_context=attended.context_BTNH,
        attn_out=attended.out_BTD,
        resid_mid=resid_mid,
        post_attn_norm=post_attn_norm,
        router_logits=mixed.routing.logits_ME,
        router_probs=mixed.routing.probs_ME,
        router_ids=mixed.routing.ids_MA,
        router_weights=mixed.routing.weights_MA,
        moe_out=mixed.out_BTD,
        resid_out=resid_mid + mixed.out_BTD,
    )


# --- rope and attention


def rotate_neighbours(x_BTNH: jax.Array, rotation: Rotary) -> jax.Array:
    """Pair lanes 2p and 2p + 1, as the paper and Mistral's own code do."""
    pairs = x_BTNH.shape[-1] // 2
    cos, sin = (jnp.repeat(part[:, :, None, :pairs], 2, axis=-1) for part in rotation)
    even, odd = x_BTNH[..., ::2], x_BTNH[..., 1::2]
    turned_BTNH = jnp.stack([-odd, even], axis=-1).reshape(x_BTNH.shape)
    return x_BTNH * cos + turned_BTNH * sin


def frequencies_in_bfloat16(
    config: MixtralConfig, length: jax.Array, exact: Any = rope.inverse_frequencies
) -> tuple[jax.Array, float]:
    """Hold the inverse frequencies in bfloat16."""
    inv_freq_P, factor = exact(config, length)
    return rounded(inv_freq_P), factor


def see_all_keys(
    config: MixtralConfig,
    shape_BT: tuple[int, int],
    mask_BT: jax.Array | None,
    position_BT: jax.Array | None,
    *rest: Any,
) -> jax.Array:
    """Forget the causal mask."""
    B, T = shape_BT
    real_BT = jnp.ones((B, T), bool) if mask_BT is None else mask_BT.astype(bool)
    return jnp.broadcast_to(real_BT[:, None, :], (B, T, T))


def probs_masked_by_infinity(scores_BNTS: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Mask with -inf: a query that sees nothing becomes not a number."""
    masked_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS.astype(jnp.float32), -jnp.inf)
    return jax.nn.softmax(masked_BNTS, axis=-1).astype(scores_BNTS.dtype)


def probs_in_bfloat16(scores_BNTS: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Take the softmax without an upcast."""
    masked_BNTS = jnp.where(visible_BTS[:, None], scores_BNTS.astype(jnp.float32), -1e30)
    powers_BNTS = rounded(jnp.exp(rounded(masked_BNTS - jnp.max(masked_BNTS, axis=-1, keepdims=True))))
    total_BNT1 = rounded(jnp.sum(powers_BNTS, axis=-1, keepdims=True))
    return rounded(powers_BNTS / total_BNT1).astype(scores_BNTS.dtype)


def scores_of_tiled_heads(q_BTNH: jax.Array, k_BSKH: jax.Array, exact: Any = attention.attention_scores) -> jax.Array:
    """Give query head n the key head n mod K instead of n // G."""
    scores_BNTS: jax.Array = exact(q_BTNH, jnp.tile(k_BSKH, (1, 1, q_BTNH.shape[2] // k_BSKH.shape[2], 1)))
    return scores_BNTS


def values_of_tiled_heads(probs_BNTS: jax.Array, v_BSKH: jax.Array, exact: Any = attention.mix_values) -> jax.Array:
    """Do the same with the values."""
    context_BTNH: jax.Array = exact(probs_BNTS, jnp.tile(v_BSKH, (1, 1, probs_BNTS.shape[1] // v_BSKH.shape[2], 1)))
    return context_BTNH


def scores_scaled_twice(q_BTNH: jax.Array, k_BSKH: jax.Array, exact: Any = attention.attention_scores) -> jax.Array:
    """Divide by sqrt(H) once in the queries and once in the scores."""
    scores_BNTS: jax.Array = exact(q_BTNH, k_BSKH)
    return (scores_BNTS * math.pow(q_BTNH.shape[-1], -0.5)).astype(q_BTNH.dtype)


def scores_of_width(config: MixtralConfig, exact: Any = attention.attention_scores) -> Any:
    """Divide by the root of D / N, whatever head_dim says."""
    scale = math.sqrt(config.head_dim / (config.hidden_size / config.num_attention_heads))

    def scores(q_BTNH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
        scores_BNTS: jax.Array = exact(q_BTNH, k_BSKH)
        return (scores_BNTS * scale).astype(q_BTNH.dtype)

    return scores


# --- mixture of experts


def weigh_without_sum(probs_ME: jax.Array, ids_MA: jax.Array) -> jax.Array:
    """Take the probabilities as they are."""
    return jnp.take_along_axis(probs_ME, ids_MA, axis=-1)


def weigh_in_reverse(probs_ME: jax.Array, ids_MA: jax.Array) -> jax.Array:
    """Pair the ids with the weights of the other order."""
    chosen_MA = jnp.take_along_axis(probs_ME, ids_MA, axis=-1)
    return (chosen_MA / chosen_MA.sum(axis=-1, keepdims=True))[:, ::-1]


def route_by_logits(
    x_MD: jax.Array, kernel_DE: jax.Array, per_token: int, ids_MA: jax.Array | None = None, exact: Any = moe.route
) -> Routing:
    """Weigh the experts by their logits."""
    routing: Routing = exact(x_MD, kernel_DE, per_token, ids_MA)
    used_MA = routing.ids_MA if ids_MA is None else ids_MA
    logits_MA = jnp.take_along_axis(routing.logits_ME, used_MA, axis=-1)
    return routing._replace(weights_MA=logits_MA.astype(routing.weights_MA.dtype))


def route_in_bfloat16(
    x_MD: jax.Array, kernel_DE: jax.Array, per_token: int, ids_MA: jax.Array | None = None, exact: Any = moe.route
) -> Routing:
    """Project the router's input in bfloat16."""
    routing: Routing = exact(rounded(x_MD), rounded(kernel_DE), per_token, ids_MA)
    return routing


def probs_rounded(logits_ME: jax.Array, exact: Any = moe.router_probs) -> jax.Array:
    """Round the router's probabilities to bfloat16."""
    return rounded(exact(logits_ME))


def choose_highest(probs_ME: jax.Array, per_token: int) -> jax.Array:
    """Take the highest expert first among equals."""
    last = probs_ME.shape[-1] - 1
    return last - lax.top_k(probs_ME[:, ::-1], per_token)[1]


def jittered(x_BTD: jax.Array, noise: float, key: jax.Array | None) -> jax.Array:
    """Jitter the router's input outside training."""
    return x_BTD * jax.random.uniform(jax.random.key(0), x_BTD.shape, x_BTD.dtype, 0.99, 1.01)


def _per_expert(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, act: str) -> jax.Array:
    """Give each expert's weighted output for every token: [E, M, D] float32, zero where it was not chosen."""
    outputs = []
    for number in range(len(kernels.gate)):
        chosen_M = jnp.sum(jnp.where(ids_MA == number, weights_MA, 0), axis=-1)
        gate_DF, up_DF, down_FD = (kernel[number] for kernel in kernels)
        down_MD = experts.expert(x_MD, gate_DF, up_DF, down_FD, act).down_RD
        outputs.append(down_MD.astype(jnp.float32) * chosen_M[:, None])
    return jnp.stack(outputs)


def experts_but_the_last(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, act: str, backend: Backend
) -> jax.Array:
    """Loop over one expert too few."""
    return _per_expert(x_MD, weights_MA, ids_MA, kernels, act)[:-1].sum(axis=0).astype(x_MD.dtype)


def experts_summed_in_bfloat16(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, act: str, backend: Backend
) -> jax.Array:
    """Weigh and sum the experts without an upcast."""
    sum_MD = jnp.zeros(x_MD.shape, jnp.float32)
    for out_MD in _per_expert(x_MD, weights_MA, ids_MA, kernels, act):
        sum_MD = rounded(sum_MD + rounded(out_MD))
    return sum_MD.astype(x_MD.dtype)


def experts_with_capacity(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, act: str, backend: Backend
) -> jax.Array:
    """Drop the tokens that come after an expert has its even share."""
    number = len(kernels.gate)
    hit_MAE = jax.nn.one_hot(ids_MA, number, dtype=jnp.int32)
    place_MAE = jnp.cumsum(hit_MAE.reshape(-1, number), axis=0).reshape(hit_MAE.shape) * hit_MAE
    capacity = -(-ids_MA.size // number)
    kept_MA = place_MAE.sum(axis=-1) <= capacity
    return _per_expert(x_MD, weights_MA * kept_MA, ids_MA, kernels, act).sum(axis=0).astype(x_MD.dtype)


def experts_on_weighted_input(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, act: str, backend: Backend
) -> jax.Array:
    """Scale an expert's input by its weight instead of its output."""
    sum_MD = jnp.zeros(x_MD.shape, jnp.float32)
    for number in range(len(kernels.gate)):
        weight_M1 = jnp.sum(jnp.where(ids_MA == number, weights_MA, 0), axis=-1)[:, None].astype(x_MD.dtype)
        gate_DF, up_DF, down_FD = (kernel[number] for kernel in kernels)
        down_MD = experts.expert(x_MD * weight_M1, gate_DF, up_DF, down_FD, act).down_RD
        sum_MD += jnp.where(weight_M1 > 0, down_MD, 0)
    return sum_MD.astype(x_MD.dtype)


def project_in_bfloat16(equation: str, x: jax.Array, kernel: jax.Array, exact: Any = projection.project) -> jax.Array:
    """Round what a product is made of, as an accelerator's default precision does."""
    product: jax.Array = exact(equation, rounded(x), rounded(kernel))
    return product


def scores_in_bfloat16(q_BTNH: jax.Array, k_BSKH: jax.Array, exact: Any = attention.attention_scores) -> jax.Array:
    """Do the same to queries and keys."""
    scores_BNTS: jax.Array = exact(rounded(q_BTNH), rounded(k_BSKH))
    return scores_BNTS


def values_in_bfloat16(probs_BNTS: jax.Array, v_BSKH: jax.Array, exact: Any = attention.mix_values) -> jax.Array:
    """Do the same to attention's weights and values."""
    context_BTNH: jax.Array = exact(rounded(probs_BNTS), rounded(v_BSKH))
    return context_BTNH


def combined_in_bfloat16(given: Trace, shape_BTD: tuple[int, ...]) -> Array:
    """Weigh and sum the recorded outputs of the experts without an upcast."""
    sum_MD = jnp.zeros((shape_BTD[0] * shape_BTD[1], shape_BTD[2]), jnp.float32)
    for expert, rows_R in given.rows.items():
        hit_R, weights_R = routed(given, expert)
        down_RD = jnp.asarray(given[f"expert.{expert}.down"][hit_R]).astype(jnp.float32)
        weighted_RD = rounded(down_RD * weights_R[hit_R][:, None])
        sum_MD = rounded(sum_MD.at[rows_R[hit_R]].add(weighted_RD))
    return np.asarray(sum_MD.astype(given["moe_out"].dtype)).reshape(shape_BTD)
