"""The oracle: Mixtral in NumPy float64, the exact answer that both frameworks are measured against.

Written from the Mixtral paper and Hugging Face's semantics, never from flax_mixtral's model code. Every operation is a
field of `Ops`, so that a block can be replayed with one of them replaced. One matrix at a time is held in float64.
Imports NumPy, flax_mixtral's neutral modules and parity's own only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flax_mixtral.config import Architecture, MixtralConfig
from parity.gradients import Gradients
from parity.oracle import operations as exact
from parity.oracle.activations import ACTIVATIONS
from parity.oracle.backward import differentiate
from parity.oracle.rope import inverse_frequencies, rope_tables, rotate_half
from parity.trace import Array, Batch, Trace, expert_rows, routed

__all__ = ["EXACT", "Ops", "Oracle"]

HEAD_MODULES: dict[Architecture, str | None] = {
    "MixtralModel": None,
    "MixtralForCausalLM": "lm_head",
    "MixtralForSequenceClassification": "score",
    "MixtralForTokenClassification": "score",
    "MixtralForQuestionAnswering": "qa_outputs",
}
"""The head's name in a checkpoint."""


def activate(name: str, gate_RF: Array) -> Array:
    """Apply the activation that `hidden_act` names."""
    return ACTIVATIONS[name](gate_RF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """The operations of a block in the order of computation; a hypothesis replaces one of them."""

    norm: Callable[[Array, Array, float], Array] = exact.rms_norm
    project: Callable[[Array, Array], Array] = exact.project
    positions: Callable[[Batch], Array] = exact.position_ids
    frequencies: Callable[[MixtralConfig, int], tuple[Array, float]] = inverse_frequencies
    tables: Callable[[Array, float, Array], tuple[Array, Array]] = rope_tables
    rotate: Callable[[Array, Array, Array], Array] = rotate_half
    visible: Callable[[Batch, int | None], Array] = exact.visible_keys
    repeat: Callable[[Array, int], Array] = exact.repeat_heads
    scores: Callable[[Array, Array], Array] = exact.attention_scores
    attention_softmax: Callable[[Array, Array], Array] = exact.attention_softmax
    mix: Callable[[Array, Array], Array] = exact.mix_values
    residual: Callable[[Array, Array, Array], Array] = exact.add_residual
    router_softmax: Callable[[Array], Array] = exact.softmax
    choose: Callable[[Array, int], Array] = exact.choose
    weigh: Callable[[Array, Array, Array], Array] = exact.weigh
    dispatch: Callable[[Array, Array, Array, int], tuple[Array, Array, Array]] = exact.dispatch
    activate: Callable[[str, Array], Array] = activate
    product: Callable[[Array, Array], Array] = exact.gate_times_up
    combine: Callable[[Array, Array, Array, Array], Array] = exact.combine


EXACT = Ops()


class Oracle:
    """A `Side` without rounding of its own.

    Args:
        config: the model.
        weights: a lazy mapping from Hugging Face's legacy names to [out, in] arrays of any float dtype.
        ops: the operations; `EXACT` but in a diagnosis.
        dtype: what everything is computed in.
    """

    name = "oracle"

    def __init__(
        self,
        config: MixtralConfig,
        weights: Mapping[str, Array],
        ops: Ops = EXACT,
        dtype: npt.DTypeLike = np.float64,
    ) -> None:
        self.config = config
        self.ops = ops
        self.dtype = np.dtype(dtype)
        self._weights = weights
        self._prefix = "" if config.architecture == "MixtralModel" else "model."

    def embed(self, batch: Batch) -> Array:
        """Look the tokens up: [B, T, D]."""
        embedding_VD = self._weights[f"{self._prefix}embed_tokens.weight"]
        return embedding_VD[batch.input_ids].astype(self.dtype)

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """Run one decoder block and record its points.

        `router_weights` belong to `router_ids`, or to `routing` where that is given.

        Source: transformers 5.23, modeling_mixtral.py, `MixtralDecoderLayer`.
        """
        trace = Trace()
        self._attention(layer, x_BTD.astype(self.dtype), batch, trace)
        self._router(layer, trace, routing)
        ids_MA = trace["router_ids"] if routing is None else routing
        trace.rows = dict(enumerate(expert_rows(ids_MA, batch, self.config.num_local_experts)))
        self._experts(layer, ids_MA, trace)
        trace.arrays["resid_out"] = self.ops.residual(trace["resid_mid"], trace["post_attn_norm"], trace["moe_out"])
        return trace

    def operations(self, layer: int, x_BTD: Array, given: Trace, batch: Batch) -> Trace:
        """Run every operation of a block alone, each on what torch recorded as its input; see `Operations`."""
        ops, config = self.ops, self.config
        seen = {name: array.astype(self.dtype) for name, array in given.arrays.items() if name != "router_ids"}
        points: dict[str, Array] = {}
        x_BTD = x_BTD.astype(self.dtype)
        points["input_norm"] = ops.norm(x_BTD, self._weight(layer, "input_layernorm"), config.rms_norm_eps)
        for name in ("q", "k", "v"):
            points[name] = ops.project(seen["input_norm"], self._weight(layer, f"self_attn.{name}_proj"))
            points[name] = points[name].reshape(*x_BTD.shape[:2], -1, config.head_dim)
        rotation = self._rope(batch)
        points["q_rot"], points["k_rot"] = ops.rotate(seen["q"], *rotation), ops.rotate(seen["k"], *rotation)
        heads = config.num_attention_heads
        points["attn_scores"] = ops.scores(seen["q_rot"], ops.repeat(seen["k_rot"], heads))
        visible_BTS = ops.visible(batch, config.sliding_window)
        points["attn_probs"] = ops.attention_softmax(seen["attn_scores"], visible_BTS)
        points["attn_context"] = ops.mix(seen["attn_probs"], ops.repeat(seen["v"], heads))
        context_BTX = seen["attn_context"].reshape(*x_BTD.shape[:2], -1)
        points["attn_out"] = ops.project(context_BTX, self._weight(layer, "self_attn.o_proj"))
        points["resid_mid"] = ops.residual(x_BTD, seen["input_norm"], seen["attn_out"])
        scale_D = self._weight(layer, "post_attention_layernorm")
        points["post_attn_norm"] = ops.norm(seen["resid_mid"], scale_D, config.rms_norm_eps)
        x_MD = seen["post_attn_norm"].reshape(-1, config.hidden_size)
        points["router_logits"] = ops.project(x_MD, self._weight(layer, "block_sparse_moe.gate"))
        points["router_probs"] = ops.router_softmax(seen["router_logits"])
        points["router_weights"] = ops.weigh(seen["router_logits"], seen["router_probs"], given["router_ids"])
        sum_MD = np.zeros_like(x_MD)
        for expert, rows_R in given.rows.items():
            path, at = f"block_sparse_moe.experts.{expert}", f"expert.{expert}"
            for name, weight in (("gate", "w1"), ("up", "w3")):
                points[f"{at}.{name}"] = ops.project(x_MD[rows_R], self._weight(layer, f"{path}.{weight}"))
            activated_RF = ops.activate(config.hidden_act, seen[f"{at}.gate"])
            points[f"{at}.act"] = ops.product(activated_RF, seen[f"{at}.up"])
            points[f"{at}.down"] = ops.project(seen[f"{at}.act"], self._weight(layer, f"{path}.w2"))
            hit_R, weights_R = routed(given, expert)
            sum_MD = ops.combine(sum_MD, rows_R[hit_R], weights_R[hit_R], seen[f"{at}.down"][hit_R])
        points["moe_out"] = sum_MD.reshape(x_BTD.shape)
        points["resid_out"] = ops.residual(seen["resid_mid"], seen["post_attn_norm"], seen["moe_out"])
        return Trace(points, given.rows)

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        """Apply final norm and head.

        Source: transformers 5.23, modeling_layers.py, `GenericFor*`; dropout is for training only.
        """
        scale_D = self._weights[f"{self._prefix}norm.weight"]
        final_BTD = self.ops.norm(x_BTD.astype(self.dtype), scale_D, self.config.rms_norm_eps)
        trace = Trace({"final_norm": final_BTD})
        module = HEAD_MODULES[self.config.architecture]
        if module is None:
            return trace
        tied = self.config.architecture == "MixtralForCausalLM" and self.config.tie_word_embeddings
        kernel = self._weights["model.embed_tokens.weight" if tied else f"{module}.weight"]
        states = final_BTD
        if self.config.architecture == "MixtralForSequenceClassification":
            states = final_BTD[np.arange(len(final_BTD)), pooled_tokens(batch, self.config.pad_token_id)]
        logits = self.ops.project(states, kernel)
        if self._head_has_bias():
            logits = logits + self._weights[f"{module}.bias"].astype(self.dtype)
        trace.arrays["logits"] = logits
        return trace

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        """Compute `loss` (without the auxiliary term) and `aux_loss`, both []."""
        loss = next_token_loss(logits.astype(self.dtype), batch)
        router_LME = [logits_ME.astype(self.dtype) for logits_ME in router_logits]
        return Trace({"loss": loss, "aux_loss": self._load_balancing_loss(router_LME, batch)})

    def gradients(self, batch: Batch, labels_BT: Array, routing: Sequence[Array] | None = None) -> Gradients:
        """See `Differentiable.gradients`; under Hugging Face's legacy names. Made for `EXACT` operations only."""
        return differentiate(self, batch, labels_BT, routing)

    def weight(self, name: str) -> Array:
        """Give a tensor by its legacy name, as it is stored."""
        return self._weights[name]

    def shaken(self, roundoff: float, seed: int) -> "Oracle":
        """Give an oracle whose weights are each off by a random relative error of that size: one rounding."""
        return Oracle(self.config, _Shaken(self._weights, roundoff, seed), self.ops, self.dtype)

    def _attention(self, layer: int, x_BTD: Array, batch: Batch, trace: Trace) -> None:
        """Record the points from `input_norm` to `resid_mid`."""
        ops, config, points = self.ops, self.config, trace.arrays
        normed_BTD = ops.norm(x_BTD, self._weight(layer, "input_layernorm"), config.rms_norm_eps)
        points["input_norm"] = normed_BTD
        for name in ("q", "k", "v"):
            flat = ops.project(normed_BTD, self._weight(layer, f"self_attn.{name}_proj"))
            points[name] = flat.reshape(*flat.shape[:2], -1, config.head_dim)
        cos_BTH, sin_BTH = self._rope(batch)
        points["q_rot"] = ops.rotate(points["q"], cos_BTH, sin_BTH)
        points["k_rot"] = ops.rotate(points["k"], cos_BTH, sin_BTH)
        heads = config.num_attention_heads
        scores_BNTS = ops.scores(points["q_rot"], ops.repeat(points["k_rot"], heads))
        weights_BNTS = ops.attention_softmax(scores_BNTS, ops.visible(batch, config.sliding_window))
        context_BTNH = ops.mix(weights_BNTS, ops.repeat(points["v"], heads))
        points["attn_context"] = context_BTNH
        flat = context_BTNH.reshape(*x_BTD.shape[:2], -1)
        points["attn_out"] = ops.project(flat, self._weight(layer, "self_attn.o_proj"))
        points["resid_mid"] = ops.residual(x_BTD, normed_BTD, points["attn_out"])

    def _rope(self, batch: Batch) -> tuple[Array, Array]:
        positions_BT = self.ops.positions(batch)
        frequencies_P, factor = self.ops.frequencies(self.config, int(positions_BT.max()) + 1)
        cos_BTH, sin_BTH = self.ops.tables(frequencies_P, factor, positions_BT)
        return cos_BTH.astype(self.dtype), sin_BTH.astype(self.dtype)

    def _router(self, layer: int, trace: Trace, routing: Array | None) -> None:
        """Record the points from `post_attn_norm` to `router_weights`."""
        ops, config, points = self.ops, self.config, trace.arrays
        scale_D = self._weight(layer, "post_attention_layernorm")
        normed_BTD = ops.norm(points["resid_mid"], scale_D, config.rms_norm_eps)
        points["post_attn_norm"] = normed_BTD
        x_MD = normed_BTD.reshape(-1, config.hidden_size)
        points["router_logits"] = ops.project(x_MD, self._weight(layer, "block_sparse_moe.gate"))
        points["router_probs"] = ops.router_softmax(points["router_logits"])
        points["router_ids"] = ops.choose(points["router_probs"], config.num_experts_per_tok)
        used_MA = points["router_ids"] if routing is None else routing
        points["router_weights"] = ops.weigh(points["router_logits"], points["router_probs"], used_MA)

    def _experts(self, layer: int, ids_MA: Array, trace: Trace) -> None:
        """Record each expert on its rows, and `moe_out` from exactly the tokens that are routed, padding as well."""
        ops, normed_BTD = self.ops, trace["post_attn_norm"]
        x_MD = normed_BTD.reshape(-1, self.config.hidden_size)
        sum_MD = np.zeros_like(x_MD)
        for expert in range(self.config.num_local_experts):
            rows_R, x_RD, weights_R = ops.dispatch(x_MD, ids_MA, trace["router_weights"], expert)
            only_recorded = np.setdiff1d(trace.rows[expert], rows_R)
            computed = np.concatenate([rows_R, only_recorded])
            outputs = self._expert(layer, expert, np.concatenate([x_RD, x_MD[only_recorded]]))
            sum_MD = ops.combine(sum_MD, rows_R, weights_R, outputs["down"][: len(rows_R)])
            order = np.argsort(computed)
            recorded = order[np.searchsorted(computed[order], trace.rows[expert])]
            for point, array in outputs.items():
                trace.arrays[f"expert.{expert}.{point}"] = array[recorded]
        trace.arrays["moe_out"] = sum_MD.reshape(normed_BTD.shape)

    def _expert(self, layer: int, expert: int, x_RD: Array) -> dict[str, Array]:
        """Run one expert: down(activation(gate x) * up x)."""
        ops, path = self.ops, f"block_sparse_moe.experts.{expert}"
        gate_RF = ops.project(x_RD, self._weight(layer, f"{path}.w1"))
        up_RF = ops.project(x_RD, self._weight(layer, f"{path}.w3"))
        act_RF = ops.product(ops.activate(self.config.hidden_act, gate_RF), up_RF)
        down_RD = ops.project(act_RF, self._weight(layer, f"{path}.w2"))
        return {"gate": gate_RF, "up": up_RF, "act": act_RF, "down": down_RD}

    def _load_balancing_loss(self, router_LME: Sequence[Array], batch: Batch) -> Array:
        """Multiply, expert by expert, the share of tokens routed to it with its mean probability, over all layers.

        Source: transformers 5.23, modeling_mixtral.py, `load_balancing_loss_func`.
        """
        E, real_M = self.config.num_local_experts, batch.real_M
        probs_XE = np.concatenate([self.ops.router_softmax(logits_ME)[real_M] for logits_ME in router_LME])
        ids_XA = self.ops.choose(probs_XE, self.config.num_experts_per_tok)
        share_E = np.bincount(ids_XA.ravel(), minlength=E) / len(probs_XE)
        return np.asarray(E * (share_E * probs_XE.mean(axis=0)).sum(), self.dtype)

    def _head_has_bias(self) -> bool:
        if self.config.architecture == "MixtralForTokenClassification":
            return self.config.token_classification_bias
        return self.config.architecture == "MixtralForQuestionAnswering"

    def _weight(self, layer: int, module: str) -> Array:
        return self._weights[f"{self._prefix}layers.{layer}.{module}.weight"]


class _Shaken(Mapping[str, Array]):
    """Weights in float64 with a random relative error, the same at every access."""

    def __init__(self, weights: Mapping[str, Array], roundoff: float, seed: int):
        self._weights, self._roundoff, self._seed = weights, roundoff, seed

    def __getitem__(self, name: str) -> Array:
        array = self._weights[name].astype(np.float64)
        rng = np.random.default_rng([self._seed, *name.encode()])
        return array * (1 + self._roundoff * rng.standard_normal(array.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def pooled_tokens(batch: Batch, pad_token_id: int | None) -> Array:
    """Find the token that a sequence is classified by, [B]: the rightmost one that is not padding.

    Source: transformers 5.23, modeling_layers.py, `GenericForSequenceClassification`: by id, not by attention mask;
        the first token where all are padding, the last one without a pad_token_id.
    """
    B, T = batch.input_ids.shape
    if pad_token_id is None:
        return np.full(B, T - 1)
    return np.asarray(np.where(batch.input_ids != pad_token_id, np.arange(T), 0).argmax(axis=-1))


def next_token_loss(logits_BTV: Array, batch: Batch) -> Array:
    """Average the cross entropy of each next token that is real and follows a real one; NaN where there is none.

    Source: transformers 5.23, loss/loss_utils.py, `ForCausalLMLoss`, with labels as `training_labels` gives them.
    """
    real_BT = batch.real_BT
    counted = real_BT[:, 1:] & real_BT[:, :-1]
    if not counted.any():
        return np.asarray(np.nan, logits_BTV.dtype)
    logits_XV, targets_X = logits_BTV[:, :-1][counted], batch.input_ids[:, 1:][counted]
    highest_X1 = logits_XV.max(axis=-1, keepdims=True)
    log_total_X = highest_X1[:, 0] + np.log(np.exp(logits_XV - highest_X1).sum(axis=-1))
    chosen_X = np.take_along_axis(logits_XV, targets_X[:, None], axis=-1)[:, 0]
    return np.asarray((log_total_X - chosen_X).mean(), logits_BTV.dtype)
