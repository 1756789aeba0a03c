"""The oracle's backward pass: the exact gradients of the training loss, by hand, in NumPy float64.

Goes through the blocks of the oracle's forward from the last to the first and holds one of them at a time. Which
experts a token goes to is constant, as in autograd. Imports NumPy, flax_mixtral's neutral modules and parity's own
only.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parity.gradients import Gradients, Losses
from parity.oracle import derivatives as backward
from parity.oracle import operations as exact
from parity.oracle.activations import ACTIVATIONS
from parity.oracle.rope import inverse_frequencies, rope_tables
from parity.trace import Array, Batch, Trace

if TYPE_CHECKING:
    from parity.oracle.model import Oracle

__all__ = ["OracleForward", "differentiate", "forward"]

ByName = dict[str, Array]


class OracleForward(NamedTuple):
    """What the forward leaves behind for the way back.

    Args:
        stream: L + 1 arrays [B, T, D]: the input of each block, and the last one's output.
        share_E: the share of real tokens routed to each expert, over all layers.
        routing: L arrays [M, A] of expert ids.
        losses: of the batch.
    """

    stream: list[Array]
    share_E: Array
    routing: list[Array]
    losses: Losses


def forward(oracle: "Oracle", batch: Batch, labels_BT: Array, routing: Sequence[Array] | None = None) -> OracleForward:
    """Run the whole model up to its training loss.

    Args:
        oracle: for MixtralForCausalLM.
        batch: what it is run on.
        labels_BT: the token itself, or -100 where none is predicted; the shift is done here.
        routing: L arrays [M, A], the experts of each token; None for the oracle's own choice.
    """
    config, real_M = oracle.config, batch.real_M
    stream, used, mean_E = [oracle.embed(batch)], [], np.zeros(config.num_local_experts)
    count_E = np.zeros(config.num_local_experts)
    for layer in range(config.num_hidden_layers):
        trace = oracle.block(layer, stream[-1], batch, None if routing is None else routing[layer])
        used.append(trace["router_ids"] if routing is None else routing[layer])
        count_E += np.bincount(used[-1][real_M].ravel(), minlength=len(count_E))
        mean_E += trace["router_probs"][real_M].sum(axis=0)
        stream.append(trace["resid_out"])
    tokens = int(real_M.sum()) * config.num_hidden_layers
    share_E = count_E / tokens
    predicted = _predictions(oracle, stream[-1], batch, labels_BT)
    chosen_X = predicted.probs_XV[np.arange(len(predicted.targets_X)), predicted.targets_X]
    loss = -np.log(chosen_X).mean()
    aux_loss = len(share_E) * (share_E * mean_E / tokens).sum()
    total = loss + config.router_aux_loss_coef * aux_loss
    return OracleForward(stream, share_E, used, Losses(np.asarray(loss), np.asarray(aux_loss), np.asarray(total)))


def differentiate(
    oracle: "Oracle", batch: Batch, labels_BT: Array, routing: Sequence[Array] | None = None
) -> Gradients:
    """Differentiate the training loss with respect to every parameter and to the input of every block.

    Args:
        oracle: for MixtralForCausalLM.
        batch: what it is run on.
        labels_BT: the token itself, or -100 where none is predicted.
        routing: L arrays [M, A] of expert ids; None for the oracle's own choice.

    Returns:
        Gradients under the names of Hugging Face's legacy layout, float64.
    """
    found = forward(oracle, batch, labels_BT, routing)
    by_name: ByName = {}
    grad_BTD = _head_backward(oracle, found.stream[-1], batch, labels_BT, by_name)
    stream = [grad_BTD]
    for layer in reversed(range(oracle.config.num_hidden_layers)):
        grad_BTD = _block_backward(oracle, layer, found, batch, grad_BTD, by_name)
        stream.append(grad_BTD)
    _embedding_backward(oracle, batch, grad_BTD, by_name)
    return Gradients(found.losses, by_name, tuple(reversed(stream)), tuple(found.routing))


class _Predictions(NamedTuple):
    """The tokens that have something to predict: [B, T] bool, and for each its state, probabilities and target."""

    where_BT: Array
    final_XD: Array
    probs_XV: Array
    targets_X: Array


def _predictions(oracle: "Oracle", x_BTD: Array, batch: Batch, labels_BT: Array) -> _Predictions:
    where_BT = np.zeros(labels_BT.shape, bool)
    where_BT[:, :-1] = labels_BT[:, 1:] >= 0
    head = oracle.head(x_BTD, batch)
    targets_X = labels_BT[:, 1:][where_BT[:, :-1]]
    return _Predictions(where_BT, head["final_norm"][where_BT], exact.softmax(head["logits"][where_BT]), targets_X)


def _head_backward(oracle: "Oracle", x_BTD: Array, batch: Batch, labels_BT: Array, by_name: ByName) -> Array:
    """Go back through loss, head and final norm."""
    predicted = _predictions(oracle, x_BTD, batch, labels_BT)
    grad_XV = backward.cross_entropy_backward(predicted.probs_XV, predicted.targets_X)
    name = "model.embed_tokens.weight" if oracle.config.tie_word_embeddings else "lm_head.weight"
    grad_XD, by_name[name] = backward.project_backward(grad_XV, predicted.final_XD, oracle.weight(name))
    grad_BTD = np.zeros_like(x_BTD, oracle.dtype)
    grad_BTD[predicted.where_BT] = grad_XD
    return _norm_backward(oracle, "model.norm.weight", x_BTD, grad_BTD, by_name)


def _norm_backward(oracle: "Oracle", name: str, x_BTD: Array, grad_BTD: Array, by_name: ByName) -> Array:
    scale_D = oracle.weight(name)
    grad_x_BTD, by_name[name] = backward.rms_norm_backward(grad_BTD, x_BTD, scale_D, oracle.config.rms_norm_eps)
    return grad_x_BTD


def _block_backward(
    oracle: "Oracle", layer: int, found: OracleForward, batch: Batch, grad_BTD: Array, by_name: ByName
) -> Array:
    """Go back through one block: both branches add to what the residual stream carries."""
    prefix, x_BTD = f"model.layers.{layer}.", found.stream[layer].astype(oracle.dtype)
    trace = oracle.block(layer, x_BTD, batch, found.routing[layer])
    grad_normed_BTD = _moe_backward(oracle, layer, trace, found, batch, grad_BTD, by_name)
    name = f"{prefix}post_attention_layernorm.weight"
    grad_mid_BTD = grad_BTD + _norm_backward(oracle, name, trace["resid_mid"], grad_normed_BTD, by_name)
    grad_normed_BTD = _attention_backward(oracle, layer, trace, batch, grad_mid_BTD, by_name)
    name = f"{prefix}input_layernorm.weight"
    return grad_mid_BTD + _norm_backward(oracle, name, x_BTD, grad_normed_BTD, by_name)


def _moe_backward(
    oracle: "Oracle", layer: int, trace: Trace, found: OracleForward, batch: Batch, grad_BTD: Array, by_name: ByName
) -> Array:
    """Go back through experts, routing weights and router, and through the auxiliary loss of this layer."""
    config, ids_MA = oracle.config, found.routing[layer]
    path = f"model.layers.{layer}.block_sparse_moe"
    x_MD = trace["post_attn_norm"].reshape(-1, config.hidden_size)
    grad_MD = grad_BTD.reshape(x_MD.shape)
    weights_MA = trace["router_weights"]
    grad_x_MD, grad_weights_MA = np.zeros_like(x_MD), np.zeros_like(weights_MA)
    for expert in range(config.num_local_experts):
        rows_R, slots_R = np.nonzero(ids_MA == expert)
        down_RD, grad_x_RD = _expert_backward(
            oracle, f"{path}.experts.{expert}", x_MD[rows_R], grad_MD[rows_R], weights_MA[rows_R, slots_R], by_name
        )
        grad_x_MD[rows_R] += grad_x_RD
        grad_weights_MA[rows_R, slots_R] = (down_RD * grad_MD[rows_R]).sum(axis=-1)
    # Probabilities renormalised over the chosen experts are the softmax of the chosen logits.
    grad_logits_ME = np.zeros_like(trace["router_logits"])
    np.put_along_axis(grad_logits_ME, ids_MA, backward.softmax_backward(grad_weights_MA, weights_MA), axis=-1)
    tokens = int(batch.real_M.sum()) * config.num_hidden_layers
    grad_logits_ME += config.router_aux_loss_coef * backward.load_balancing_backward(
        trace["router_probs"], found.share_E, batch.real_M, tokens
    )
    name = f"{path}.gate.weight"
    grad_router_MD, by_name[name] = backward.project_backward(grad_logits_ME, x_MD, oracle.weight(name))
    return (grad_x_MD + grad_router_MD).reshape(grad_BTD.shape)


def _expert_backward(
    oracle: "Oracle", path: str, x_RD: Array, grad_RD: Array, weights_R: Array, by_name: ByName
) -> tuple[Array, Array]:
    """Go back through one expert; give its unweighted output and the gradient of its input, both [R, D]."""
    gate_FD, up_FD, down_DF = (oracle.weight(f"{path}.{name}.weight") for name in ("w1", "w3", "w2"))
    gate_RF, up_RF = exact.project(x_RD, gate_FD), exact.project(x_RD, up_FD)
    active_RF = ACTIVATIONS[oracle.config.hidden_act](gate_RF)
    down_RD = exact.project(active_RF * up_RF, down_DF)
    grad_down_RD = weights_R[:, None] * grad_RD
    grad_RF, by_name[f"{path}.w2.weight"] = backward.project_backward(grad_down_RD, active_RF * up_RF, down_DF)
    grad_gate_RF = grad_RF * up_RF * backward.ACTIVATION_SLOPES[oracle.config.hidden_act](gate_RF)
    from_gate_RD, by_name[f"{path}.w1.weight"] = backward.project_backward(grad_gate_RF, x_RD, gate_FD)
    from_up_RD, by_name[f"{path}.w3.weight"] = backward.project_backward(grad_RF * active_RF, x_RD, up_FD)
    return down_RD, from_gate_RD + from_up_RD


def _attention_backward(
    oracle: "Oracle", layer: int, trace: Trace, batch: Batch, grad_BTD: Array, by_name: ByName
) -> Array:
    """Go back from attention's output to its normalised input."""
    config, path = oracle.config, f"model.layers.{layer}.self_attn"
    q_BTNH, k_BSKH, v_BSKH, context_BTNH = (trace[name] for name in ("q_rot", "k_rot", "v", "attn_context"))
    flat = context_BTNH.reshape(*grad_BTD.shape[:2], -1)
    name = f"{path}.o_proj.weight"
    grad_context, by_name[name] = backward.project_backward(grad_BTD, flat, oracle.weight(name))
    k_BSNH, v_BSNH = (exact.repeat_heads(x, config.num_attention_heads) for x in (k_BSKH, v_BSKH))
    visible_BTS = exact.visible_keys(batch, config.sliding_window)
    weights_BNTS = exact.attention_softmax(exact.attention_scores(q_BTNH, k_BSNH), visible_BTS)
    grad_q_BTNH, grad_k_BSNH, grad_v_BSNH = backward.attention_backward(
        grad_context.reshape(q_BTNH.shape), weights_BNTS, q_BTNH, k_BSNH, v_BSNH, visible_BTS
    )
    positions_BT = exact.position_ids(batch)
    turn = rope_tables(*inverse_frequencies(config, int(positions_BT.max()) + 1), positions_BT)
    heads = config.num_key_value_heads
    by_projection = {
        "q_proj": backward.rotate_half_backward(grad_q_BTNH, *turn),
        "k_proj": backward.rotate_half_backward(backward.sum_repeated_heads(grad_k_BSNH, heads), *turn),
        "v_proj": backward.sum_repeated_heads(grad_v_BSNH, heads),
    }
    grad_normed_BTD = np.zeros_like(grad_BTD)
    for projection, grad in by_projection.items():
        name = f"{path}.{projection}.weight"
        flat_grad = grad.reshape(*grad_BTD.shape[:2], -1)
        grad_x_BTD, by_name[name] = backward.project_backward(flat_grad, trace["input_norm"], oracle.weight(name))
        grad_normed_BTD += grad_x_BTD
    return grad_normed_BTD


def _embedding_backward(oracle: "Oracle", batch: Batch, grad_BTD: Array, by_name: ByName) -> None:
    """Add each token's gradient to its row, beside what a tied head has put there.

    Source: torch.nn.Embedding: the row of `padding_idx` is not trained, which transformers sets to pad_token_id.
    """
    name, pad = "model.embed_tokens.weight", oracle.config.pad_token_id
    looked_up_VD = np.zeros(oracle.weight(name).shape, grad_BTD.dtype)
    np.add.at(looked_up_VD, batch.input_ids, grad_BTD)
    if pad is not None:
        looked_up_VD[pad] = 0
    by_name[name] = by_name.get(name, 0) + looked_up_VD
