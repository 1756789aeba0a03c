"""What is kept of transformers' modules while they run: hooks on their outputs and inputs, and one around attention.

Nothing is patched. torch itself is imported in parity.sides.torch_hf alone; its modules and tensors come from there.
"""

from collections.abc import Callable
from typing import Any

from parity.trace import Array

__all__ = ["EXPERT_INPUTS", "gradient_of", "observe_router", "record", "record_gradients", "recording_attention"]

Tensor = Any
Module = Any
Seen = dict[str, Tensor]

OUTPUTS = {
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "post_attn_norm",
    "mlp": "moe_out",
}
"""The points that are the output of a module of `MixtralDecoderLayer`."""

EXPERT_INPUTS = ("expert_inputs", "used_ids", "used_weights")

INPUTS = {
    "post_attention_layernorm": ("resid_mid",),
    "mlp.experts": EXPERT_INPUTS,
}
"""What is kept of a module's arguments."""


def record(layer: Module, seen: Seen, routing: Array | None) -> None:
    """Attach the hooks that keep what a block computes; they go with the block."""
    for path, point in OUTPUTS.items():
        layer.get_submodule(path).register_forward_hook(
            lambda module, args, output, point=point: seen.update({point: output})
        )
    for path, points in INPUTS.items():
        layer.get_submodule(path).register_forward_pre_hook(
            lambda module, args, points=points: seen.update(zip(points, args, strict=True))
        )
    observe_router(layer, seen, routing)


def record_gradients(layer: Module, seen: Seen, routing: Array | None) -> None:
    """Attach the hooks that keep a block's input, output and routing, and the gradients of the first two."""

    def keep(point: str, x_BTD: Tensor) -> None:
        x_BTD.retain_grad()
        seen[point] = x_BTD

    layer.register_forward_pre_hook(lambda module, args: keep("resid_in", args[0]))
    layer.register_forward_hook(lambda module, args, output: keep("resid_out", output))
    observe_router(layer, seen, routing)


def observe_router(layer: Module, seen: Seen, routing: Array | None) -> Any:
    """Attach the hook that keeps a block's routing, and replaces it where another one is forced; give its handle."""
    gate = layer.get_submodule("mlp.gate")
    return gate.register_forward_hook(lambda module, args, output: _route(output, seen, routing))


def recording_attention(
    delegate: Callable[..., tuple[Tensor, Tensor]], repeat_kv: Callable[[Tensor, int], Tensor], seen: Seen
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Give an attention that keeps what goes in and out.

    Args:
        delegate: transformers' own attention, which the arithmetic is left to.
        repeat_kv: transformers' own.
        seen: where it is kept.
    """

    def attend(module: Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        context, weights = delegate(module, query, key, *args, **kwargs)
        seen.update(q_rot=query.transpose(1, 2), k_rot=key.transpose(1, 2), attn_context=context)
        # Only where every rounding is written out can operations be compared one by one: in eager attention (whose
        # scores are computed here as it does, before the mask), and where experts are summed in float32.
        if weights is not None and module.config._experts_implementation != "eager":
            keys = repeat_kv(key, query.shape[1] // key.shape[1])
            seen.update(attn_scores=query @ keys.transpose(2, 3) * kwargs["scaling"], attn_probs=weights)
        return context, weights

    return attend


def gradient_of(tensor: Tensor) -> Tensor:
    """Give a tensor's gradient; zeros where nothing led to it."""
    return tensor.new_zeros(tensor.shape) if tensor.grad is None else tensor.grad


def _route(output: tuple[Tensor, Tensor, Tensor], seen: Seen, routing: Array | None) -> tuple[Tensor, Tensor, Tensor]:
    """Record the router's own choice, and replace it where another one is forced."""
    logits_ME, weights_MA, ids_MA = output
    probs_ME = logits_ME.float().softmax(dim=-1)
    used_MA = ids_MA
    if routing is not None:
        used_MA = ids_MA.new_tensor(routing)
        weights_MA = probs_ME.gather(-1, used_MA)
        weights_MA = weights_MA / weights_MA.sum(dim=-1, keepdim=True)
    seen.update(router_logits=logits_ME, router_probs=probs_ME, router_ids=ids_MA, router_weights=weights_MA)
    return logits_ME, weights_MA, used_MA
