"""The sparse mixture of experts: routing, and the modules that hold router and experts.

Parameters exist before any control flow, and routing and the experts (flax_mixtral.experts) are pure functions of
arrays: that is what lets the model compose with every JAX transform.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_mixtral.config import MixtralConfig
from flax_mixtral.experts import Choice, Kernels, apply_experts, choose_backend
from flax_mixtral.parts import apply_part
from flax_mixtral.projection import Projection, project

__all__ = [
    "Experts",
    "MoE",
    "MoETrace",
    "Routing",
    "choose",
    "jitter",
    "route",
    "router_probs",
    "weigh",
]


class Routing(NamedTuple):
    """The router's decision for each token."""

    logits_ME: jax.Array
    probs_ME: jax.Array
    ids_MA: jax.Array
    weights_MA: jax.Array


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


def jitter(x_BTD: jax.Array, noise: float, key: jax.Array | None) -> jax.Array:
    """Multiply the experts' input by uniform noise around 1, in training only (key given)."""
    if key is None or noise == 0:
        return x_BTD
    return x_BTD * jax.random.uniform(key, x_BTD.shape, x_BTD.dtype, 1 - noise, 1 + noise)


class Experts(nnx.Module):
    """Holds all experts of one block: stacked, or one parameter per expert where the backend wants them so."""

    def __init__(self, config: MixtralConfig, *, split: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
        init = nnx.initializers.normal(config.initializer_range)

        def kernel(*shape: int) -> nnx.Param[jax.Array] | nnx.List[nnx.Param[jax.Array]]:
            if split:
                return nnx.List([nnx.Param(init(rngs.params(), shape, dtype)) for _ in range(E)])
            return nnx.Param(init(rngs.params(), (E, *shape), dtype))

        self.gate = kernel(D, F)
        self.up = kernel(D, F)
        self.down = kernel(F, D)

    def kernels(self) -> Kernels:
        """Give the arrays, as they are held."""
        held = (self.gate, self.up, self.down)
        return Kernels(*(k[...] if isinstance(k, nnx.Param) else tuple(one[...] for one in k) for k in held))


class MoE(nnx.Module):
    """Holds the router and the experts of one block."""

    def __init__(self, config: MixtralConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs, experts: Choice = "auto"):
        shape_DE = (config.hidden_size, config.num_local_experts)
        self.router = Projection(shape_DE, std=config.initializer_range, dtype=dtype, rngs=rngs)
        self.backend = choose_backend(experts, config)
        self.experts = Experts(config, split=self.backend == "blocks", dtype=dtype, rngs=rngs)
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
        routing = apply_part(route, x_MD, self.router.kernel[...], self.per_token, routing_MA, static=(2,))
        ids_MA = routing.ids_MA if routing_MA is None else routing_MA
        kernels = self.experts.kernels()
        out_MD = apply_experts(x_MD, routing.weights_MA, ids_MA, kernels, self.hidden_act, self.backend)
        return MoETrace(routing, out_MD.reshape(x_BTD.shape))
