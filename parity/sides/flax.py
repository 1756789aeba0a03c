"""The Flax side: flax_mixtral's own blocks, one in memory at a time."""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property

import jax
import jax.numpy as jnp
import numpy as np

from flax_mixtral.arrays import Mould, taken_over
from flax_mixtral.config import MixtralConfig
from flax_mixtral.decoder import BlockTrace, Context, DecoderBlock, context_of, look_up
from flax_mixtral.experts import ExpertTrace, expert
from flax_mixtral.heads import MODELS, Mixtral, MixtralModel, Model
from flax_mixtral.losses import causal_lm_loss, load_balancing_loss
from parity.decoding import Decoded
from parity.gradients import Gradients, training_labels
from parity.sides.flax_decoding import decode, greedy
from parity.sides.flax_gradients import differentiate
from parity.sides.flax_operations import Kernels, block_operations, combine, expert_operations
from parity.trace import Array, Batch, Trace, expert_rows

__all__ = ["FlaxSide", "run_block"]

LARGE = 1 << 20
"""Weights of one matrix of an expert, from which on a block's memory is worth freeing at once."""


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
        self._held: tuple[int, DecoderBlock] | None = None
        self._prefix = "" if config.architecture == "MixtralModel" else "model."
        self._run_block: Callable[..., BlockTrace] = jax.jit(run_block)
        self._run_expert = jax.jit(expert, static_argnames="hidden_act")
        self._run_operations = jax.jit(block_operations)
        self._run_expert_operations = jax.jit(expert_operations, static_argnums=3)

    def embed(self, batch: Batch) -> Array:
        """See `Side.embed`."""
        embedding_VD = self._weights[f"{self._prefix}embed_tokens.embedding"]
        return np.asarray(look_up(jnp.asarray(embedding_VD), jnp.asarray(batch.input_ids)))

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        module = self._block(layer)
        forced_MA = None if routing is None else jnp.asarray(routing)
        found = self._run_block(module, jnp.asarray(x_BTD), self._context(batch, x_BTD), forced_MA)
        trace = Trace({name: np.asarray(array) for name, array in found._asdict().items()})
        self._record_experts(trace, module, batch, trace["router_ids"] if routing is None else routing)
        return trace

    def operations(self, layer: int, x_BTD: Array, given: Trace, batch: Batch) -> Trace:
        """See `Operations.operations`."""
        module = self._block(layer)
        arrays = {name: jnp.asarray(array) for name, array in given.arrays.items() if not name.startswith("expert.")}
        found = self._run_operations(module, jnp.asarray(x_BTD), arrays, self._context(batch, x_BTD))
        trace = Trace({name: np.asarray(array) for name, array in found.items()}, given.rows)
        x_MD = given["post_attn_norm"].reshape(-1, self._config.hidden_size)
        for number, rows in given.rows.items():
            seen = {name: _padded(given[f"expert.{number}.{name}"]) for name in ("gate", "up", "act")}
            kernels = Kernels(*(kernel[number] for kernel in module.moe.experts.kernels()))
            outputs = self._run_expert_operations(_padded(x_MD[rows]), seen, kernels, self._config.hidden_act)
            for name, array in outputs.items():
                trace.arrays[f"expert.{number}.{name}"] = np.asarray(array)[: len(rows)]
        trace.arrays["moe_out"] = combine(given, x_BTD.shape)
        return trace

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        """See `Side.head`."""
        model = self._head_model
        decoder = model if isinstance(model, MixtralModel) else model.model
        final_norm_BTD = decoder.final_norm(jnp.asarray(x_BTD))
        trace = Trace({"final_norm": np.asarray(final_norm_BTD)})
        if not isinstance(model, MixtralModel):
            trace.arrays["logits"] = np.asarray(model.head(final_norm_BTD, jnp.asarray(batch.input_ids)))
        return trace

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        """See `Side.losses`."""
        mask = None if batch.attention_mask is None else jnp.asarray(batch.attention_mask)
        layers = [jnp.asarray(logits_ME) for logits_ME in router_logits]
        aux_loss = load_balancing_loss(layers, self._config.num_experts_per_tok, mask)
        loss = causal_lm_loss(jnp.asarray(logits), jnp.asarray(training_labels(batch)))
        return Trace({"loss": np.asarray(loss), "aux_loss": np.asarray(aux_loss)})

    def whole(self, batch: Batch) -> Array | None:
        """Run the whole model under one jit, as users do: its logits, or None for the bare model."""
        model = self.whole_model()
        output = jax.jit(lambda model, *inputs: model(*inputs).logits)(
            model, batch.input_ids, batch.attention_mask, batch.position_ids
        )
        logits = None if output is None else np.array(output)
        del model, output
        _collect(self._config.hidden_size * self._config.intermediate_size)
        return logits

    def gradients(self, batch: Batch, labels_BT: Array, routing: Sequence[Array] | None = None) -> Gradients:
        """See `Differentiable.gradients`: `jax.grad` of the whole model, by leaf."""
        return differentiate(self._language_model(), batch, labels_BT, routing)

    def generate(self, batch: Batch, new: int) -> Array:
        """See `Generates.generate`: `flax_mixtral.generate`."""
        return greedy(self._language_model(), batch, new)

    def decode(self, batch: Batch, ids_BX: Array, routing: Sequence[Array] | None = None) -> Decoded:
        """See `Generates.decode`: the whole model with flax_mixtral's cache."""
        return decode(self._language_model(), batch, ids_BX, routing)

    def whole_model(self) -> Model:
        """Build the model as its users have it."""
        return _model_mould(self._config).fill(self._weights, own=taken_over)

    def _language_model(self) -> Mixtral:
        model = self.whole_model()
        assert isinstance(model, Mixtral), self._config.architecture
        return model

    def done(self, layer: int) -> None:
        """See `Keeping.done`."""
        self._held = None
        _collect(self._config.hidden_size * self._config.intermediate_size)

    def _block(self, layer: int) -> DecoderBlock:
        """Give a block, whose parameters stay until `done` or the next one."""
        if self._held is None or self._held[0] != layer:
            if self._held is not None:
                self.done(self._held[0])  # the last one's memory goes before the next one's comes
            block = _block_mould(self._config).fill(self._weights, f"{self._prefix}layers.{layer}.", own=taken_over)
            self._held = (layer, block)
        return self._held[1]

    @cached_property
    def _head_model(self) -> Model:
        """The whole model of which only final norm and head hold arrays."""
        tied = self._config.tie_word_embeddings
        outside = {
            name: self._weights[name]
            for name in self._weights
            if "layers." not in name and (tied or "embed_tokens." not in name)
        }
        return _model_mould(self._config).fill(outside, partial=True, own=taken_over)

    def _context(self, batch: Batch, x_BTD: Array) -> Context:
        mask, position = (None if x is None else jnp.asarray(x) for x in (batch.attention_mask, batch.position_ids))
        return context_of(self._config, batch.input_ids.shape, mask, position, x_BTD.dtype)

    def _record_experts(self, trace: Trace, block: DecoderBlock, batch: Batch, ids_MA: Array) -> None:
        x_MD = trace["post_attn_norm"].reshape(-1, self._config.hidden_size)
        for number, rows in enumerate(expert_rows(ids_MA, batch, self._config.num_local_experts)):
            kernels = (kernel[number] for kernel in block.moe.experts.kernels())
            found: ExpertTrace = self._run_expert(_padded(x_MD[rows]), *kernels, hidden_act=self._config.hidden_act)
            trace.rows[number] = rows
            for name, array in zip(("gate", "up", "act", "down"), found, strict=True):
                trace.arrays[f"expert.{number}.{name}"] = np.asarray(array)[: len(rows)]


def _collect(weights: int) -> None:
    """Free modules: they refer to themselves, so that only the collector does; small ones can wait for its turn."""
    if weights >= LARGE:
        gc.collect()


@cache
def _block_mould(config: MixtralConfig) -> Mould[DecoderBlock]:
    return Mould(lambda rngs: DecoderBlock(config, dtype=jnp.float32, rngs=rngs))


@cache
def _model_mould(config: MixtralConfig) -> Mould[Model]:
    return Mould(lambda rngs: MODELS[config.architecture](config, rngs=rngs))


def _padded(x_RX: Array) -> Array:
    """Repeat rows up to a power of two: a handful of compilations then serves every expert."""
    return np.resize(x_RX, (1 << (len(x_RX) - 1).bit_length(), x_RX.shape[1]))


def run_block(block: DecoderBlock, x_BTD: jax.Array, context: Context, routing_MA: jax.Array | None) -> BlockTrace:
    """Call a block; a plain function of arrays and modules, for jit."""
    return block(x_BTD, context, routing_MA)
