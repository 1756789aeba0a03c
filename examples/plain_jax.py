"""A Mixtral in plain JAX, in one file, that shares nothing with flax_mixtral.

`side` shows it to mixtral-parity, as docs/own-port.md explains:

    mixtral-parity run path/to/mixtral --flax-side examples.plain_jax:side
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.trace import Array, Batch, Trace, expert_rows

Weights = Mapping[str, Any]


def rms_norm(x: jax.Array, scale: Any, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed: jax.Array = scale * (x32 / jnp.sqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return normed


def rotate_halves(x_BTNH: jax.Array, angle_BTP: jax.Array) -> jax.Array:
    cos, sin = jnp.cos(angle_BTP)[:, :, None], jnp.sin(angle_BTP)[:, :, None]
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def renormalised(probs_ME: jax.Array, ids_MA: jax.Array) -> jax.Array:
    chosen_MA = jnp.take_along_axis(probs_ME, ids_MA, axis=-1)
    return chosen_MA / chosen_MA.sum(axis=-1, keepdims=True)


class PlainJax:
    """The model, cut where mixtral-parity looks into it.

    Args:
        config: the checkpoint's configuration.
        weights: its parameters by flax_mixtral's names; a port that reads its own files leaves them alone.
        rotate: rotary embedding; weigh: routing weights. Parameters of the example, so that faults can be planted.
    """

    name = "plain-jax"

    def __init__(
        self,
        config: Any,
        weights: Weights,
        rotate: Callable[..., Any] = rotate_halves,
        weigh: Callable[..., Any] = renormalised,
    ):
        self.config, self.weights, self.rotate, self.weigh = config, weights, rotate, weigh
        self._block = jax.jit(self._run_block)
        self._expert = jax.jit(self._run_expert)

    def embed(self, batch: Batch) -> Array:
        return np.asarray(self.weights["model.embed_tokens.embedding"])[batch.input_ids]

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): self.weights[name] for name in self.weights if name.startswith(prefix)}
        positions = np.arange(x_BTD.shape[1])[None] if batch.position_ids is None else batch.position_ids
        points = self._block(own, x_BTD, positions, batch.real_BT, routing)
        trace = Trace({name: np.asarray(array) for name, array in points.items()})
        ids_MA = trace["router_ids"] if routing is None else routing
        x_MD = trace["post_attn_norm"].reshape(-1, x_BTD.shape[-1])
        for e, rows in enumerate(expert_rows(ids_MA, batch, self.config.num_local_experts)):
            kernels = (own[f"moe.experts.{name}"][e] for name in ("gate", "up", "down"))
            trace.rows[e] = rows
            for name, array in zip(("gate", "up", "act", "down"), self._expert(x_MD, *kernels), strict=True):
                trace.arrays[f"expert.{e}.{name}"] = np.asarray(array)[rows]
        return trace

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        normed = rms_norm(jnp.asarray(x_BTD), self.weights["model.final_norm.scale"], self.config.rms_norm_eps)
        return Trace({"final_norm": np.asarray(normed), "logits": np.asarray(normed @ self.weights["lm_head.kernel"])})

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        real_BT = batch.real_BT
        log_probs = jax.nn.log_softmax(jnp.asarray(logits)[:, :-1])
        nats = -jnp.take_along_axis(log_probs, batch.input_ids[:, 1:, None], axis=-1)[..., 0]
        E, A = self.config.num_local_experts, self.config.num_experts_per_tok
        probs = jax.nn.softmax(jnp.concatenate([layer[batch.real_M] for layer in router_logits]), axis=-1)
        share = jax.nn.one_hot(jax.lax.top_k(probs, A)[1], E).sum(axis=1).mean(axis=0)
        loss, aux_loss = nats[real_BT[:, 1:] & real_BT[:, :-1]].mean(), E * (share * probs.mean(axis=0)).sum()
        return Trace({"loss": np.asarray(loss), "aux_loss": np.asarray(aux_loss)})

    def whole(self, batch: Batch) -> Array:
        x_BTD = self.embed(batch)
        for layer in range(self.config.num_hidden_layers):
            x_BTD = self.block(layer, x_BTD, batch)["resid_out"]
        return self.head(x_BTD, batch)["logits"]

    def _run_block(self, own: Weights, x_BTD: jax.Array, positions: jax.Array, real_BT: Any, routing: Any) -> Any:
        c = self.config
        p: dict[str, jax.Array] = {}
        p["input_norm"] = rms_norm(x_BTD, own["input_norm.scale"], c.rms_norm_eps)
        for name in "qkv":
            p[name] = jnp.einsum("BTD,DNH->BTNH", p["input_norm"], own[f"attention.{name}.kernel"])
        inv_freq_P = c.rope.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        angle_BTP = positions[..., None] * jnp.asarray(inv_freq_P, jnp.float32)
        p["q_rot"], p["k_rot"] = self.rotate(p["q"], angle_BTP), self.rotate(p["k"], angle_BTP)
        k, v = (jnp.repeat(x, c.num_attention_heads // c.num_key_value_heads, axis=2) for x in (p["k_rot"], p["v"]))
        scores = jnp.einsum("BTNH,BSNH->BNTS", p["q_rot"], k) / np.sqrt(c.head_dim).astype(np.float32)
        t, s = np.arange(x_BTD.shape[1])[:, None], np.arange(x_BTD.shape[1])[None]
        seen = (s <= t) & (s > t - (c.sliding_window or x_BTD.shape[1])) & real_BT[:, None, None, :]
        probs = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
        p["attn_context"] = jnp.einsum("BNTS,BSNH->BTNH", probs, v)
        p["attn_out"] = jnp.einsum("BTNH,NHD->BTD", p["attn_context"], own["attention.o.kernel"])
        p["resid_mid"] = x_BTD + p["attn_out"]
        p["post_attn_norm"] = rms_norm(p["resid_mid"], own["post_attention_norm.scale"], c.rms_norm_eps)
        x_MD = p["post_attn_norm"].reshape(-1, c.hidden_size)
        p["router_logits"] = x_MD @ own["moe.router.kernel"]
        p["router_probs"] = jax.nn.softmax(p["router_logits"], axis=-1)
        p["router_ids"] = jax.lax.top_k(p["router_probs"], c.num_experts_per_tok)[1]
        ids_MA = p["router_ids"] if routing is None else routing
        p["router_weights"] = self.weigh(p["router_probs"], ids_MA)
        mixed_MD = jnp.zeros_like(x_MD)
        for e in range(c.num_local_experts):
            kernels = (own[f"moe.experts.{name}"][e] for name in ("gate", "up", "down"))
            weight_M1 = jnp.where(ids_MA == e, p["router_weights"], 0).sum(axis=-1, keepdims=True)
            mixed_MD += weight_M1 * self._run_expert(x_MD, *kernels)[-1]
        p["moe_out"] = mixed_MD.reshape(x_BTD.shape)
        p["resid_out"] = p["resid_mid"] + p["moe_out"]
        return p

    def _run_expert(self, x_MD: jax.Array, gate_DF: Any, up_DF: Any, down_FD: Any) -> tuple[jax.Array, ...]:
        gate, up = x_MD @ gate_DF, x_MD @ up_DF
        act = jax.nn.silu(gate) * up
        return gate, up, act, act @ down_FD


def side(config: Any, weights: Weights) -> PlainJax:
    """Build the port that mixtral-parity is to look into."""
    return PlainJax(config, weights)
