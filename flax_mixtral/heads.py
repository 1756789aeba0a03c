"""The models that users build: the language model, the bare one, and three classification heads."""

from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from flax_mixtral import pretrained
from flax_mixtral.cache import KVCache
from flax_mixtral.config import Architecture, ConfigError, MixtralConfig
from flax_mixtral.decoder import Decoder, DecoderTrace
from flax_mixtral.experts import Choice
from flax_mixtral.losses import load_balancing_loss
from flax_mixtral.parts import apply_part
from flax_mixtral.projection import Projection, project
from flax_mixtral.sharding import any_axis_types

__all__ = [
    "MODELS",
    "Mixtral",
    "MixtralForQuestionAnswering",
    "MixtralForSequenceClassification",
    "MixtralForTokenClassification",
    "MixtralModel",
    "MixtralOutput",
]


class MixtralOutput(NamedTuple):
    """What a forward gives.

    Args:
        logits: [B, T, V]; [B, C] for sequence classification, [B, T, C] for tokens, [B, T, 2] (start and end) for
            question answering; None for the bare model.
        hidden_states: L + 1 arrays [B, T, D]: before each block, and after the final norm.
        router_logits: L arrays [M, E].
        aux_loss: load-balancing loss of the real tokens, float32, without its coefficient.
        cache: with the keys and values of these tokens; None if none was given.
    """

    logits: jax.Array | None
    hidden_states: tuple[jax.Array, ...]
    router_logits: tuple[jax.Array, ...]
    aux_loss: jax.Array
    cache: KVCache | None = None


class _Model(nnx.Module):
    """What every model is: a decoder, a head or none, and the way to and from files.

    Args:
        config: its `architecture` must be the class's.
        dtype: of all parameters.
        rngs: draws the initial ones.
        experts: the backend, see `experts.choose_backend`.
    """

    architecture: Architecture

    def __init__(
        self, config: MixtralConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs, experts: Choice = "auto"
    ):
        if config.architecture != self.architecture:
            raise ConfigError(
                f"{type(self).__name__} is for {self.architecture}, but the configuration says {config.architecture}; "
                f"build flax_mixtral.MODELS[{config.architecture!r}], or set `architecture`"
            )
        self.config = config
        self._build(config, dtype, rngs, experts)

    def _build(self, config: MixtralConfig, dtype: jnp.dtype, rngs: nnx.Rngs, experts: Choice) -> None:
        """Make the decoder, then the head: the order in which parameters are drawn."""
        self.model = Decoder(config, dtype=dtype, rngs=rngs, experts=experts)
        self._build_head(config, dtype, rngs)

    def _build_head(self, config: MixtralConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: jnp.dtype | None = None,
        mesh: jax.sharding.Mesh | None = None,
        experts: Choice = "auto",
    ) -> Self:
        """Read a checkpoint directory.

        Args:
            path: what mixtral-convert wrote, or any checkpoint it reads. On a CPU, parameters that lie in its files
                as the model has them are not copied: the files must not be written to while the model lives.
            dtype: of all parameters; None keeps the file's, which must then be one.
            mesh: devices to spread the parameters over, see `sharding.partition_specs`; a process reads what its own
                devices hold, once. Call the model within `jax.set_mesh(mesh)`.
            experts: the backend, see `experts.choose_backend`; on a mesh, "auto" is "parallel".

        Raises:
            ConfigError: config.json cannot be honoured, is for another head, or does not fit the mesh.
            convert.BadInput: tensors are missing, unexpected, misshaped or unreadable.
        """
        if mesh is not None and experts == "auto":
            experts = "parallel"
        return pretrained.load(lambda config, rngs: cls(config, rngs=rngs, experts=experts), path, dtype, mesh)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and flax_model.safetensors, as mixtral-convert does."""
        pretrained.save(self, self.config, path)

    @any_axis_types
    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> MixtralOutput:
        """Run the model.

        Args:
            input_ids: [B, T] int, each below vocab_size.
            attention_mask: [B, T], 1 on real tokens and 0 on padding, left or right; None where there is none. With a
                cache it is for the new tokens alone: the cache remembers which of the others were padding.
            position_ids: [B, T] int; 0..T-1 unless given, or on from the cache's length. Without an attention_mask, a
                position that is not its predecessor plus one starts a new packed sequence, which sees nothing of
                those before; with a cache there are no packed sequences.
            cache: from `init_cache`, or from the output of the call before; the tokens continue it.
            key: PRNG key of a training step: turns on the configured attention dropout and router jitter.

        Returns:
            Logits (None from the bare model) and what led to them, in the parameters' dtype.

        Source: transformers 5.23, modeling_mixtral.py and modeling_layers.py.
        """
        ids_BT = jnp.asarray(input_ids)
        mask_BT = None if attention_mask is None else jnp.asarray(attention_mask)
        position_BT = None if position_ids is None else jnp.asarray(position_ids)
        trace = self._decode(ids_BT, mask_BT, position_BT, cache, key)
        logits = apply_part(type(self).head, self, trace.final_norm_BTD, ids_BT)
        routed = (trace.router_logits, self.config.num_experts_per_tok, mask_BT)
        aux_loss = apply_part(load_balancing_loss, *routed, static=(1,))
        hidden_states = (*trace.stream_BTD, trace.final_norm_BTD)
        return MixtralOutput(logits, hidden_states, trace.router_logits, aux_loss, trace.cache)

    def _decode(self, *inputs: Any) -> DecoderTrace:
        return self.model(*inputs)

    def head(self, x_BTD: jax.Array, input_ids: jax.Array) -> jax.Array | None:
        """Apply the head to the final norm's output."""
        raise NotImplementedError


class MixtralModel(_Model, Decoder):  # type: ignore[misc]  # called, it gives users their output and not the trace
    """Mixtral without a head: its parameters lie at the top, as in transformers' files, and not under `model`."""

    architecture = "MixtralModel"

    def _build(self, config: MixtralConfig, dtype: jnp.dtype, rngs: nnx.Rngs, experts: Choice) -> None:
        Decoder.__init__(self, config, dtype=dtype, rngs=rngs, experts=experts)

    def _decode(self, *inputs: Any) -> DecoderTrace:
        return Decoder.__call__(self, *inputs)

    def head(self, x_BTD: jax.Array, input_ids: jax.Array) -> None:
        """Give nothing."""


class Mixtral(_Model):
    """Mixtral as a language model (transformers' MixtralForCausalLM)."""

    architecture = "MixtralForCausalLM"

    def _build_head(self, config: MixtralConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        if not config.tie_word_embeddings:
            shape_DV = (config.hidden_size, config.vocab_size)
            self.lm_head = Projection(shape_DV, std=config.initializer_range, dtype=dtype, rngs=rngs)

    def head(self, x_BTD: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Give a logit to every token of the vocabulary; a tied head is the embedding."""
        if self.config.tie_word_embeddings:
            return project("BTD,VD->BTV", x_BTD, self.model.embed_tokens.embedding[...])
        return project("BTD,DV->BTV", x_BTD, self.lm_head.kernel[...])


def _classes(config: MixtralConfig, dtype: jnp.dtype, rngs: nnx.Rngs, *, bias: bool) -> Projection:
    """Make a head of num_labels classes."""
    D, C = config.hidden_size, config.num_labels
    return Projection((D, C), std=config.initializer_range, bias=(C,) if bias else None, dtype=dtype, rngs=rngs)


def _classify(x_BTD: jax.Array, head: Projection) -> jax.Array:
    """Score every token: [B, T, C]."""
    scores_BTC = project("BTD,DC->BTC", x_BTD, head.kernel[...])
    return scores_BTC if head.bias is None else scores_BTC + head.bias[...]


class MixtralForSequenceClassification(_Model):
    """Mixtral with one set of class logits per sequence, read at its last token that is not padding."""

    architecture = "MixtralForSequenceClassification"

    def _build_head(self, config: MixtralConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.score = _classes(config, dtype, rngs, bias=False)

    def head(self, x_BTD: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Score every token and keep the rightmost one whose id is not pad_token_id."""
        scores_BTC = _classify(x_BTD, self.score)
        if self.config.pad_token_id is None:
            if input_ids.shape[0] != 1:
                raise ValueError(
                    "sequence classification of more than one row finds each row's last token by pad_token_id, which "
                    "the configuration lacks; set it, or pass one row at a time"
                )
            return scores_BTC[:, -1]
        places_BT = jnp.arange(input_ids.shape[1]) * (input_ids != self.config.pad_token_id)
        last_B11 = jnp.argmax(places_BT, axis=1)[:, None, None]
        return jnp.take_along_axis(scores_BTC, last_B11, axis=1)[:, 0]


class MixtralForTokenClassification(_Model):
    """Mixtral with class logits for every token."""

    architecture = "MixtralForTokenClassification"

    def _build_head(self, config: MixtralConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.score = _classes(config, dtype, rngs, bias=config.token_classification_bias)

    def head(self, x_BTD: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Score every token."""
        return _classify(x_BTD, self.score)


class MixtralForQuestionAnswering(_Model):
    """Mixtral with two logits for every token: that the answer starts there, and that it ends there."""

    architecture = "MixtralForQuestionAnswering"

    def _build_head(self, config: MixtralConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.qa_outputs = _classes(config, dtype, rngs, bias=True)

    def head(self, x_BTD: jax.Array, input_ids: jax.Array) -> jax.Array:
        """Score every token as start and as end."""
        return _classify(x_BTD, self.qa_outputs)


Model = (
    Mixtral
    | MixtralModel
    | MixtralForSequenceClassification
    | MixtralForTokenClassification
    | MixtralForQuestionAnswering
)

MODELS: dict[Architecture, type[Model]] = {
    "MixtralModel": MixtralModel,
    "MixtralForCausalLM": Mixtral,
    "MixtralForSequenceClassification": MixtralForSequenceClassification,
    "MixtralForTokenClassification": MixtralForTokenClassification,
    "MixtralForQuestionAnswering": MixtralForQuestionAnswering,
}
"""The class of each `architectures` entry of config.json."""
