"""The torch side: transformers' own modules, one block at a time, recorded without patching.

The one module of the project that imports torch and transformers.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral as mixtral

from flax_mixtral.config import MixtralConfig
from parity.decoding import Decoded, continued, in_steps, joined
from parity.gradients import Gradients, Losses, training_labels
from parity.metrics import Precision
from parity.sides.torch_hooks import (
    EXPERT_INPUTS,
    gradient_of,
    observe_router,
    record,
    record_gradients,
    recording_attention,
)
from parity.trace import Array, Batch, Trace, expert_rows

__all__ = ["Attention", "Experts", "TorchSide", "whole_logits"]

Attention = Literal["eager", "sdpa"]
Experts = Literal["eager", "grouped_mm", "batched_mm"]

RECORDING = "mixtral_parity_recording"
"""The name under which the recording attention is registered while a block runs."""

transformers.utils.logging.disable_progress_bar()  # mixtral-parity shows its own


class TorchSide:
    """A `Side` made of transformers' modules.

    Each block is a `MixtralDecoderLayer` that is built, filled, run and freed; masks, rotary embedding and heads are
    transformers' too. The walk equals the whole model bit for bit.

    Args:
        config: the model.
        raw_config: its config.json, for transformers' own reader.
        weights: a lazy mapping from Hugging Face's fused names to arrays.
        dtype: what weights are cast to, and what the arrays of a trace have.
        attention: transformers' attention implementation.
        experts: transformers' experts implementation.
        threads: torch's number of threads while the side runs; None leaves it.
        path: the checkpoint's directory, from which a user loads the model whole.
    """

    name = "torch"

    def __init__(
        self,
        config: MixtralConfig,
        raw_config: Mapping[str, Any],
        weights: Mapping[str, Array],
        *,
        dtype: Precision = "float32",
        attention: Attention = "eager",
        experts: Experts = "grouped_mm",
        threads: int | None = None,
        path: Path | None = None,
    ) -> None:
        self.config = config
        self.path = path
        self.threads = threads
        self._weights = weights
        self._held: tuple[int, dict[str, Tensor]] | None = None
        self._dtype_name: Precision = dtype
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._prefix = "" if config.architecture == "MixtralModel" else "model."
        self._hf_config = transformers.MixtralConfig.from_dict(dict(raw_config))
        self._hf_config._attn_implementation = attention
        self._hf_config._experts_implementation = experts

    def embed(self, batch: Batch) -> Array:
        """Look the tokens up: [B, T, D]."""
        with _running(self.threads):
            embedding_VD = self._weight(f"{self._prefix}embed_tokens.weight")
            return _numpy(functional.embedding(_inputs(batch)["input_ids"], embedding_VD))

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """Run one decoder block and record its points.

        `router_weights` belong to `router_ids`, or to `routing` where that is given.
        """
        with _running(self.threads):
            config = copy.deepcopy(self._hf_config)
            config._attn_implementation = RECORDING
            with torch.device("meta"):
                module = mixtral.MixtralDecoderLayer(config, layer)
            self._fill_block(module, layer)
            x, inputs = _tensor(x_BTD).to(self._dtype), _inputs(batch)
            positions = inputs["position_ids"]
            rotary = mixtral.MixtralRotaryEmbedding(self._hf_config)  # a new one: dynamic rope remembers long batches
            seen: dict[str, Tensor] = {}
            record(module, seen, routing)
            with _recording_attention(self._hf_config._attn_implementation, seen):
                seen["resid_out"] = module(
                    x,
                    attention_mask=self._mask(x, inputs["attention_mask"], positions),
                    position_ids=positions,
                    position_embeddings=rotary(x, position_ids=positions),
                    use_cache=False,
                )
            return self._trace(module, seen, batch)

    def done(self, layer: int) -> None:
        """See `Keeping.done`."""
        self._held = None

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        """Apply final norm and head: the architecture's own model, with no layers and `x_BTD` for an embedding."""
        with _running(self.threads):
            config = copy.deepcopy(self._hf_config)
            config.num_hidden_layers = 0
            with torch.device("meta"):
                model = getattr(transformers, self.config.architecture)(config)
            base = model if self.config.architecture == "MixtralModel" else model.model
            base.embed_tokens = nn.Identity()
            base.embed_tokens.register_forward_hook(lambda module, args, output: _tensor(x_BTD).to(self._dtype))
            base.rotary_emb = mixtral.MixtralRotaryEmbedding(self._hf_config)
            self._fill(model, "")
            final: list[Tensor] = []
            base.norm.register_forward_hook(lambda module, args, output: final.append(output))
            logits = _logits(model(**_inputs(batch)))
            bare = {"final_norm": _numpy(final[0])}
            return Trace(bare if base is model else {**bare, "logits": _numpy(logits)})

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        """Compute `loss` (without the auxiliary term) and `aux_loss`, both [], in transformers' own functions."""
        with _running(self.threads):
            mask = _inputs(batch)["attention_mask"]
            loss = ForCausalLMLoss(_tensor(logits), _tensor(training_labels(batch)), self.config.vocab_size)
            router: Any = tuple(_tensor(logits_ME) for logits_ME in router_logits)
            E, A = self.config.num_local_experts, self.config.num_experts_per_tok
            aux_loss = mixtral.load_balancing_loss_func(router, E, A, mask)
            return Trace({"loss": _numpy(loss), "aux_loss": _numpy(torch.as_tensor(aux_loss))})

    def whole(self, batch: Batch) -> Array | None:
        """See `WholeModel.whole`: the checkpoint as `from_pretrained` loads it; None without a path."""
        if self.path is None:
            return None
        dtype, config = self._dtype_name, self._hf_config
        return whole_logits(self.path, batch, dtype, config._attn_implementation, config._experts_implementation)

    def gradients(self, batch: Batch, labels_BT: Array, routing: Sequence[Array] | None = None) -> Gradients:
        """See `Differentiable.gradients`: autograd through transformers' own model, in its fused layout."""
        with _running(self.threads), torch.enable_grad():
            model = self._whole_model()
            seen: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
            for number, (layer, own) in enumerate(zip(model.model.layers, seen, strict=True)):
                record_gradients(layer, own, None if routing is None else routing[number])
            output = model(**_inputs(batch), labels=_tensor(labels_BT), output_router_logits=True)
            output.loss.backward()
            loss = ForCausalLMLoss(output.logits, _tensor(labels_BT), self.config.vocab_size)
            parameters = {name: _numpy(gradient_of(leaf)) for name, leaf in model.named_parameters()}
            stream = [own["resid_in"] for own in seen] + [seen[-1]["resid_out"]]
            return Gradients(
                Losses(*(_numpy(scalar.detach()) for scalar in (loss, output.aux_loss, output.loss))),
                parameters,
                [_numpy(gradient_of(x_BTD)) for x_BTD in stream],
                [_numpy(own["router_ids"]) for own in seen],
            )

    def generate(self, batch: Batch, new: int) -> Array:
        """See `Generates.generate`: transformers' own `generate`."""
        with _running(self.threads):
            model = self._whole_model()
            model.generation_config.eos_token_id = None
            ids_BT, mask_BT = _tensor(batch.input_ids), _tensor(batch.real_BT.astype(np.int64))
            found = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, pad_token_id=0)
            return _numpy(found[:, ids_BT.shape[1] :])

    def decode(self, batch: Batch, ids_BX: Array, routing: Sequence[Array] | None = None) -> Decoded:
        """See `Generates.decode`: the whole model with transformers' own cache."""
        with _running(self.threads):
            model = self._whole_model()
            inputs = _inputs(continued(batch, ids_BX))
            (B, end), mask = inputs["input_ids"].shape, inputs["attention_mask"]
            cache = transformers.DynamicCache(config=self._hf_config)
            logits, routes = [], []
            for step in in_steps(batch, ids_BX):
                seen: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
                hooks = []
                for layer, (block, own) in enumerate(zip(model.model.layers, seen, strict=True)):
                    forced = None if routing is None else routing[layer].reshape(B, end, -1)[:, step]
                    hooks.append(
                        observe_router(block, own, None if forced is None else forced.reshape(-1, forced.shape[-1]))
                    )
                output = model(
                    inputs["input_ids"][:, step],
                    attention_mask=None if mask is None else mask[:, : step.stop],
                    position_ids=inputs["position_ids"][:, step],
                    past_key_values=cache,
                    use_cache=True,
                    output_router_logits=False,
                    logits_to_keep=1,
                )
                for hook in hooks:
                    hook.remove()
                logits.append(output.logits)
                routes.append([{name: _numpy(own[name]) for name in ("router_logits", "router_ids")} for own in seen])
            return Decoded(_numpy(torch.cat(logits, dim=1)), joined(routes, B))

    def _whole_model(self) -> Any:
        """Build the architecture's own model on the side's weights, each in its own memory."""
        with torch.device("meta"):
            model = getattr(transformers, self.config.architecture)(self._hf_config)
        model.model.rotary_emb = mixtral.MixtralRotaryEmbedding(self._hf_config)
        self._fill(model, "")
        model.tie_weights()
        return model

    def _mask(self, x_BTD: Tensor, padding: Tensor | None, positions: Tensor) -> Any:
        """Create the mask as `MixtralModel.forward` does."""
        windowed = self._hf_config.sliding_window is not None
        create = create_sliding_window_causal_mask if windowed else create_causal_mask
        return create(self._hf_config, x_BTD, padding, past_key_values=None, position_ids=positions)

    def _trace(self, module: nn.Module, seen: dict[str, Tensor], batch: Batch) -> Trace:
        """Bring what was seen into the points' shapes, and run each expert as `MixtralExperts.forward` does."""
        expert_inputs, used_ids, _ = (seen.pop(name) for name in EXPERT_INPUTS)
        trace = Trace()
        for point, tensor in seen.items():
            by_head = point in ("q", "k", "v")
            trace.arrays[point] = _numpy(tensor.unflatten(-1, (-1, self.config.head_dim)) if by_head else tensor)
        trace.rows = dict(enumerate(expert_rows(_numpy(used_ids), batch, self.config.num_local_experts)))
        experts: Any = module.get_submodule("mlp.experts")
        for expert, rows in trace.rows.items():
            gate_RF, up_RF = functional.linear(expert_inputs[_tensor(rows)], experts.gate_up_proj[expert]).chunk(2, -1)
            act_RF = experts.act_fn(gate_RF) * up_RF
            down_RD = functional.linear(act_RF, experts.down_proj[expert])
            for point, tensor in (("gate", gate_RF), ("up", up_RF), ("act", act_RF), ("down", down_RD)):
                trace.arrays[f"expert.{expert}.{point}"] = _numpy(tensor)
        return trace

    def _fill_block(self, module: nn.Module, layer: int) -> None:
        """Load a block's parameters, which stay until `done` or the next block."""
        if self._held is None or self._held[0] != layer:
            self._held = None  # the last one's memory goes before the next one's comes
            self._held = (layer, self._state(module, f"{self._prefix}layers.{layer}."))
        module.load_state_dict(self._held[1], strict=True, assign=True)
        module.eval()

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Load every parameter of a module that was built without memory."""
        module.load_state_dict(self._state(module, prefix), strict=True, assign=True)
        module.eval()

    def _state(self, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        names = {name: prefix + name for name in module.state_dict()}
        if self.config.tie_word_embeddings and "lm_head.weight" in names:
            names["lm_head.weight"] = "model.embed_tokens.weight"
        return {name: self._weight(source) for name, source in names.items()}

    def _weight(self, name: str) -> Tensor:
        return _tensor(self._weights[name], copy=False).to(self._dtype)


def whole_logits(path: Path, batch: Batch, dtype: Precision, attention: Attention, experts: Experts) -> Array:
    """Run a checkpoint as a user of transformers does: loaded whole by its own `from_pretrained`.

    Args:
        path: a checkpoint's directory.
        batch: what it is run on; without a cache, since transformers detects packed sequences only then.
        dtype: what the weights are loaded as.
        attention: transformers' attention implementation; experts likewise.

    Returns:
        The architecture's `logits`, or the final hidden state of the bare model.
    """
    config = transformers.MixtralConfig.from_pretrained(path)
    (architecture,) = config.architectures or ["MixtralForCausalLM"]
    with _running(None):
        model = getattr(transformers, architecture).from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention, experts_implementation=experts
        )
        return _numpy(_logits(model.eval()(**_inputs(batch))))


@contextmanager
def _running(threads: int | None) -> Iterator[None]:
    """Switch gradients off and set torch's threads, for a while."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _recording_attention(attention: str, seen: dict[str, Tensor]) -> Iterator[None]:
    """Register an attention that records beside transformers' own."""
    delegate = ALL_ATTENTION_FUNCTIONS.get_interface(attention, mixtral.eager_attention_forward)
    ALL_ATTENTION_FUNCTIONS[RECORDING] = recording_attention(delegate, mixtral.repeat_kv, seen)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[RECORDING]


def _inputs(batch: Batch) -> dict[str, Any]:
    """Give a batch the names of transformers' forward; the positions that it takes by itself are one row for all."""
    mask, positions = batch.attention_mask, batch.position_ids
    if positions is None:
        positions = np.arange(batch.input_ids.shape[1])[None]
    return {
        "input_ids": _tensor(batch.input_ids),
        "attention_mask": None if mask is None else _tensor(mask),
        "position_ids": _tensor(positions),
        "use_cache": False,
    }


def _logits(output: Any) -> Tensor:
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return logits


def _tensor(array: Array, *, copy: bool = True) -> Tensor:
    """Copy an array, whose memory may be a read-only file, into a tensor; bfloat16 by its bits.

    Args:
        array: any.
        copy: False to share its memory where that can be written and is in order.
    """
    if copy or not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _numpy(tensor: Tensor) -> Array:
    """Give a tensor as an array; bfloat16 by its bits."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
