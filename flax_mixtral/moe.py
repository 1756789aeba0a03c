"""The sparse mixture of experts: routing, one expert, and all of them combined.

Parameters exist before any control flow, and routing and experts are pure functions of arrays: that is what lets the
model compose with every JAX transform.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mixtral.activations import activate
from flax_mixtral.config import MixtralConfig
from flax_mixtral.projection import Projection, project

__all__ = [
    "ExpertTrace",
    "Experts",
    "MoE",
    "MoETrace",
    "Routing",
    "choose",
    "dense_experts",
    "expert",
    "jitter",
    "route",
    "router_probs",
    "weigh",
    "weighted",
]


class Routing(NamedTuple):
    """The router's decision for each token."""

    logits_ME: jax.Array
    probs_ME: jax.Array
    ids_MA: jax.Array
    weights_MA: jax.Array


class ExpertTrace(NamedTuple):
    """One expert's arrays, for the tokens it was given."""

    gate_RF: jax.Array
    up_RF: jax.Array
    act_RF: jax.Array
    down_RD: jax.Array


class MoETrace(NamedTuple):
    """The routing and the combined output of one block."""

    routing: Routing
    out_BTD: jax.Array


def route(x_MD: jax.Array, kernel_DE: jax.Array, per_token: int, ids_MA: jax.Array | None = None) -> Routing:
    """Choose each token's experts and their weights.

    Args:
        x_MD: the normalised residual stream.
        kernel_DE: the router's kernel.
        per_token: A.
        ids_MA: the experts to take instead of the most probable ones; `Routing.ids_MA` stays the router's own choice.

    Returns:
        Logits in x's dtype; probabilities and weights in float32, the weights summing to 1; among equal
        probabilities the lowest expert goes first.

    Source: transformers 5.23, `MixtralTopKRouter`.
    """
    logits_ME = project("MD,DE->ME", x_MD, kernel_DE)
    probs_ME = router_probs(logits_ME)
    own_ids_MA = choose(probs_ME, per_token)
    weights_MA = weigh(probs_ME, own_ids_MA if ids_MA is None else ids_MA)
    return Routing(logits_ME, probs_ME, own_ids_MA, weights_MA)


def router_probs(logits_ME: jax.Array) -> jax.Array:
    """Normalise the logits over all experts, in float32."""
    return jax.nn.softmax(logits_ME.astype(jnp.promote_types(logits_ME.dtype, jnp.float32)), axis=-1)


def choose(probs_ME: jax.Array, per_token: int) -> jax.Array:
    """Take each token's most probable experts, [M, A]; the lowest goes first among equals."""
    return jax.lax.top_k(probs_ME, per_token)[1]


def weigh(probs_ME: jax.Array, ids_MA: jax.Array) -> jax.Array:
    """Renormalise the chosen experts' probabilities to sum 1: [M, A] in float32."""
    chosen_MA = jnp.take_along_axis(probs_ME, ids_MA, axis=-1)
    return chosen_MA / jnp.sum(chosen_MA, axis=-1, keepdims=True)


def expert(x_RD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array, hidden_act: str) -> ExpertTrace:
    """Apply one expert: down(activation(gate(x)) * up(x)), unweighted.

    Args:
        x_RD: the expert's tokens.
        gate_DF: called w1 in the paper's code.
        up_DF: w3.
        down_FD: w2.
        hidden_act: a name of `ACTIVATIONS`.

    Returns:
        Every step in x's dtype, each product accumulated in float32.
    """
    gate_RF = project("RD,DF->RF", x_RD, gate_DF)
    up_RF = project("RD,DF->RF", x_RD, up_DF)
    act_RF = activate(hidden_act, gate_RF) * up_RF
    return ExpertTrace(gate_RF, up_RF, act_RF, project("RF,FD->RD", act_RF, down_FD))


def dense_experts(
    x_MD: jax.Array,
    weights_MA: jax.Array,
    ids_MA: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
    hidden_act: str,
) -> jax.Array:
    """Give every token to every expert and keep what was routed: E/A times the work, no control flow.

    Args:
        x_MD: the normalised residual stream.
        weights_MA: float32 weight of each chosen expert.
        ids_MA: the chosen experts.
        kernels: gate [E, D, F], up [E, D, F] and down [E, F, D].
        hidden_act: a name of `ACTIVATIONS`.

    Returns:
        [M, D] in x's dtype, summed over experts in float32. An expert that a token was not routed to has no part in
        that token's sum, whatever its kernels hold: it is selected away, not multiplied by 0.

    Source: transformers 5.23, `grouped_mm_experts_forward`, for the float32 sum.
    """

    def add_expert(sum_MD: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        number, gate_DF, up_DF, down_FD = row
        hit_MA = ids_MA == number
        weight_M = jnp.sum(jnp.where(hit_MA, weights_MA, 0), axis=-1)
        weighted_MD = weighted(expert(x_MD, gate_DF, up_DF, down_FD, hidden_act).down_RD, weight_M)
        return sum_MD + jnp.where(hit_MA.any(axis=-1, keepdims=True), weighted_MD, 0), None

    numbers_E = jnp.arange(kernels[0].shape[0])
    start_MD = jnp.zeros(x_MD.shape, weights_MA.dtype)
    sum_MD, _ = jax.lax.scan(add_expert, start_MD, (numbers_E, *kernels))
    return sum_MD.astype(x_MD.dtype)


def weighted(down_RD: jax.Array, weights_R: jax.Array) -> jax.Array:
    """Scale an expert's outputs by their routing weights: in float32, to be summed over experts and then cast once."""
    return down_RD * weights_R[:, None]


def jitter(x_BTD: jax.Array, noise: float, key: jax.Array | None) -> jax.Array:
    """Multiply the experts' input by uniform noise around 1, in training only (key given)."""
    if key is None or noise == 0:
        return x_BTD
    return x_BTD * jax.random.uniform(key, x_BTD.shape, x_BTD.dtype, 1 - noise, 1 + noise)


class Experts(nnx.Module):
    """Holds all experts of one block, stacked."""

    def __init__(self, config: MixtralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
        init = nnx.initializers.normal(config.initializer_range)
        self.gate = nnx.Param(init(rngs.params(), (E, D, F), dtype))
        self.up = nnx.Param(init(rngs.params(), (E, D, F), dtype))
        self.down = nnx.Param(init(rngs.params(), (E, F, D), dtype))


class MoE(nnx.Module):
    """Holds the router and the experts of one block."""

    def __init__(self, config: MixtralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape_DE = (config.hidden_size, config.num_local_experts)
        self.router = Projection(shape_DE, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)
        self.per_token = config.num_experts_per_tok
        self.hidden_act = config.hidden_act
        self.jitter_noise = config.router_jitter_noise

    def __call__(self, x_BTD: jax.Array, routing_MA: jax.Array | None = None, key: jax.Array | None = None) -> MoETrace:
        """Route every token and combine its experts' outputs.

        Args:
            x_BTD: the normalised residual stream.
            routing_MA: experts to take instead of the router's own choice.
            key: PRNG key of training, for the jitter.
        """
        x_MD = jitter(x_BTD, self.jitter_noise, key).reshape(-1, x_BTD.shape[-1])
        routing = route(x_MD, self.router.kernel[...], self.per_token, routing_MA)
        ids_MA = routing.ids_MA if routing_MA is None else routing_MA
        kernels = (self.experts.gate[...], self.experts.up[...], self.experts.down[...])
        out_MD = dense_experts(x_MD, routing.weights_MA, ids_MA, kernels, self.hidden_act)
        return MoETrace(routing, out_MD.reshape(x_BTD.shape))
