"""The two training losses: next-token cross entropy and load balance."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flax_mixtral.sharding import any_axis_types

__all__ = ["causal_lm_loss", "load_balancing_loss"]

IGNORED = -100
"""The label of a token that is not predicted, as in torch's cross entropy."""


@any_axis_types
def causal_lm_loss(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """Average the cross entropy of each next token.

    Args:
        logits_BTV: any float dtype.
        labels_BT: the tokens themselves (the shift is done here); -100 where none is predicted.

    Returns:
        Scalar in float32 or wider.

    Source: transformers 5.23, loss/loss_utils.py, `ForCausalLMLoss`.
    """
    wide_BTV = logits_BTV[:, :-1].astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
    target_BT = labels_BT[:, 1:]
    counted_BT = target_BT != IGNORED
    log_probs_BTV = jax.nn.log_softmax(wide_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(log_probs_BTV, jnp.where(counted_BT, target_BT, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted_BT, picked_BT, 0)) / jnp.sum(counted_BT)


def load_balancing_loss(
    router_logits: Sequence[jax.Array], per_token: int, mask_BT: jax.Array | None = None
) -> jax.Array:
    """Penalise experts that are both often chosen and probable; A at perfect balance.

    Args:
        router_logits: one [M, E] per layer.
        per_token: A.
        mask_BT: 1 on real tokens; padding is not counted.

    Returns:
        Scalar float32: E * sum over experts of (share of tokens choosing it) * (mean probability), over all layers.

    Source: transformers 5.23, modeling_mixtral.py, `load_balancing_loss_func`.
    """
    layers, experts = len(router_logits), router_logits[0].shape[-1]
    narrow = jnp.finfo(router_logits[0].dtype)
    wide = jnp.promote_types(narrow.dtype, jnp.float32)
    # Wide before they are stacked: XLA on a CPU is slow to compile that in bfloat16, and top_k would sort whole rows.
    logits_LME = jnp.stack([logits_ME.astype(wide) for logits_ME in router_logits])
    counted_M1 = jnp.ones((logits_LME.shape[1], 1)) if mask_BT is None else mask_BT.reshape(-1, 1)
    # Torch's softmax too is wide inside, and rounds its result.
    probs_LME = jax.lax.reduce_precision(jax.nn.softmax(logits_LME, axis=-1), narrow.nexp, narrow.nmant)
    _, ids_LMA = jax.lax.top_k(probs_LME, per_token)
    chosen_LME = jax.nn.one_hot(ids_LMA, experts).sum(axis=2)
    chosen_E = jnp.sum(chosen_LME * counted_M1, axis=(0, 1))
    probable_E = jnp.sum(probs_LME.astype(jnp.float32) * counted_M1, axis=(0, 1))
    tokens = jnp.sum(counted_M1) * layers
    return jnp.sum(chosen_E / tokens * (probable_E / tokens)) * experts
