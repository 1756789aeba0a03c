"""Each operation of flax_mixtral's block alone, on recorded inputs: a lost upcast hides in a whole block's rounding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mixtral.activations import activate
from flax_mixtral.attention import attention_probs, attention_scores, mix_values
from flax_mixtral.decoder import Context, DecoderBlock
from flax_mixtral.experts import weighted
from flax_mixtral.moe import jitter, router_probs, weigh
from flax_mixtral.projection import project
from flax_mixtral.rope import rotate
from parity.trace import Array, Trace, routed

__all__ = ["block_operations", "combine", "expert_operations"]

Given = dict[str, jax.Array]


def block_operations(block: DecoderBlock, x_BTD: jax.Array, given: Given, context: Context) -> Given:
    """Run the operations outside the experts.

    Args:
        block: the parameters, and the norms.
        x_BTD: the block's input.
        given: torch's points.
        context: rotations and visible keys.
    """
    attention, D = block.attention, x_BTD.shape[-1]
    x_MD = jitter(given["post_attn_norm"], block.moe.jitter_noise, key=None).reshape(-1, D)
    return {
        "input_norm": block.input_norm(x_BTD),
        "q": project("BTD,DNH->BTNH", given["input_norm"], attention.q.kernel[...]),
        "k": project("BTD,DKH->BTKH", given["input_norm"], attention.k.kernel[...]),
        "v": project("BTD,DKH->BTKH", given["input_norm"], attention.v.kernel[...]),
        "q_rot": rotate(given["q"], context.rotation),
        "k_rot": rotate(given["k"], context.rotation),
        "attn_scores": attention_scores(given["q_rot"], given["k_rot"]),
        "attn_probs": attention_probs(given["attn_scores"], context.visible_BTS),
        "attn_context": mix_values(given["attn_probs"], given["v"]),
        "attn_out": project("BTNH,NHD->BTD", given["attn_context"], attention.o.kernel[...]),
        "resid_mid": x_BTD + given["attn_out"],
        "post_attn_norm": block.post_attention_norm(given["resid_mid"]),
        "router_logits": project("MD,DE->ME", x_MD, block.moe.router.kernel[...]),
        "router_probs": router_probs(given["router_logits"]),
        "router_weights": weigh(given["router_probs"], given["router_ids"]),
        "resid_out": given["resid_mid"] + given["moe_out"],
    }


class Kernels(NamedTuple):
    """One expert's."""

    gate_DF: jax.Array
    up_DF: jax.Array
    down_FD: jax.Array


def expert_operations(x_RD: jax.Array, given: Given, kernels: Kernels, hidden_act: str) -> Given:
    """Run the operations of one expert; `given` has its points `gate`, `up` and `act`."""
    return {
        "gate": project("RD,DF->RF", x_RD, kernels.gate_DF),
        "up": project("RD,DF->RF", x_RD, kernels.up_DF),
        "act": activate(hidden_act, given["gate"]) * given["up"],
        "down": project("RF,FD->RD", given["act"], kernels.down_FD),
    }


def combine(given: Trace, shape_BTD: tuple[int, ...]) -> Array:
    """Sum the experts' recorded outputs by their routing weights, in float32 and with one cast."""
    M, D = shape_BTD[0] * shape_BTD[1], shape_BTD[2]
    sum_MD = jnp.zeros((M, D), jnp.float32)
    for expert, rows_R in given.rows.items():
        hit_R, weights_R = routed(given, expert)
        down_RD = given[f"expert.{expert}.down"]
        # Of every token, that one compilation serves every expert; those that are not routed to it add zero.
        down_MD, weights_M = np.zeros((M, D), down_RD.dtype), np.zeros(M, weights_R.dtype)
        down_MD[rows_R[hit_R]], weights_M[rows_R[hit_R]] = down_RD[hit_R], weights_R[hit_R]
        sum_MD = sum_MD + weighted(jnp.asarray(down_MD), jnp.asarray(weights_M))
    return np.asarray(sum_MD.astype(given["moe_out"].dtype)).reshape(shape_BTD)
