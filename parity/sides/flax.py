"""The Flax side: flax_mixtral's own blocks, one in memory at a time."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_mixtral.arrays import fill
from flax_mixtral.config import MixtralConfig
from flax_mixtral.decoder import BlockTrace, Context, DecoderBlock, Embedding, context_of
from flax_mixtral.heads import MODELS, MixtralModel, Model
from flax_mixtral.losses import IGNORED, causal_lm_loss, load_balancing_loss
from flax_mixtral.moe import ExpertTrace, expert
from flax_mixtral.norm import RMSNorm
from parity.trace import Array, Batch, Trace, expert_rows

__all__ = ["FlaxSide", "labels_of", "run_block"]


class FlaxSide:
    """flax_mixtral behind the Side protocol.

    Args:
        config: the model's.
        weights: Flax leaves by dotted path, read on access; the arrays' dtype is what is computed in.
    """

    name = "flax"

    def __init__(self, config: MixtralConfig, weights: Mapping[str, Array]):
        self._config = config
        self._weights = weights
        self._prefix = "" if config.architecture == "MixtralModel" else "model."
        self._run_block = self.compiled_block()
        self._run_expert = jax.jit(expert, static_argnames="hidden_act")

    def compiled_block(self) -> Callable[..., BlockTrace]:
        """Give the jitted block; its compilations are shared by all sides, as jit caches by function."""
        return jax.jit(run_block)

    def embed(self, batch: Batch) -> Array:
        """See `Side.embed`."""
        module = fill(
            lambda rngs: Embedding(self._config, dtype=jnp.float32, rngs=rngs),
            self._weights,
            f"{self._prefix}embed_tokens.",
        )
        return np.asarray(module(jnp.asarray(batch.input_ids)))

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        module = fill(
            lambda rngs: DecoderBlock(self._config, dtype=jnp.float32, rngs=rngs),
            self._weights,
            f"{self._prefix}layers.{layer}.",
        )
        forced_MA = None if routing is None else jnp.asarray(routing)
        found = self._run_block(module, jnp.asarray(x_BTD), self._context(batch, x_BTD), forced_MA)
        trace = Trace({name: np.asarray(array) for name, array in found._asdict().items()})
        self._record_experts(trace, module, batch, trace["router_ids"] if routing is None else routing)
        return trace

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        """See `Side.head`."""
        norm = fill(
            lambda rngs: RMSNorm(self._config.hidden_size, self._config.rms_norm_eps, dtype=jnp.float32),
            self._weights,
            f"{self._prefix}final_norm.",
        )
        final_norm_BTD = norm(jnp.asarray(x_BTD))
        trace = Trace({"final_norm": np.asarray(final_norm_BTD)})
        rest = {name: self._weights[name] for name in self._weights if ".layers." not in name}
        model = fill(self._build, rest, partial=True)
        if not isinstance(model, MixtralModel):
            trace.arrays["logits"] = np.asarray(model.head(final_norm_BTD, jnp.asarray(batch.input_ids)))
        return trace

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        """See `Side.losses`."""
        mask = None if batch.attention_mask is None else jnp.asarray(batch.attention_mask)
        layers = [jnp.asarray(logits_ME) for logits_ME in router_logits]
        aux_loss = load_balancing_loss(layers, self._config.num_experts_per_tok, mask)
        loss = causal_lm_loss(jnp.asarray(logits), jnp.asarray(labels_of(batch)))
        return Trace({"loss": np.asarray(loss), "aux_loss": np.asarray(aux_loss)})

    def whole(self, batch: Batch) -> Array | None:
        """Run the whole model under one jit, as users do: its logits, or None for the bare model."""
        model = fill(self._build, self._weights)
        output = jax.jit(lambda model, *inputs: model(*inputs).logits)(
            model, batch.input_ids, batch.attention_mask, batch.position_ids
        )
        return None if output is None else np.asarray(output)

    def _build(self, rngs: nnx.Rngs) -> Model:
        return MODELS[self._config.architecture](self._config, rngs=rngs)

    def _context(self, batch: Batch, x_BTD: Array) -> Context:
        mask, position = (None if x is None else jnp.asarray(x) for x in (batch.attention_mask, batch.position_ids))
        return context_of(self._config, batch.input_ids.shape, mask, position, x_BTD.dtype)

    def _record_experts(self, trace: Trace, block: DecoderBlock, batch: Batch, ids_MA: Array) -> None:
        experts = block.moe.experts
        x_MD = trace["post_attn_norm"].reshape(-1, self._config.hidden_size)
        for number, rows in enumerate(expert_rows(ids_MA, batch, self._config.num_local_experts)):
            kernels = (kernel[number] for kernel in (experts.gate, experts.up, experts.down))
            # Rows padded to a power of two: a handful of compilations serves every expert.
            padded_R = np.resize(rows, 1 << (len(rows) - 1).bit_length())
            found: ExpertTrace = self._run_expert(x_MD[padded_R], *kernels, hidden_act=self._config.hidden_act)
            trace.rows[number] = rows
            for name, array in zip(("gate", "up", "act", "down"), found, strict=True):
                trace.arrays[f"expert.{number}.{name}"] = np.asarray(array)[: len(rows)]


def labels_of(batch: Batch) -> Array:
    """Give the tokens to predict: the batch's own, -100 on padding."""
    labels: Array = np.where(batch.real_BT, batch.input_ids, IGNORED)
    return labels


def run_block(block: DecoderBlock, x_BTD: jax.Array, context: Context, routing_MA: jax.Array | None) -> BlockTrace:
    """Call a block; a plain function of arrays and modules, for jit."""
    return block(x_BTD, context, routing_MA)
