"""One block again, operation by operation: each alone, on what a trace recorded as its input, in NumPy.

An operation that is fed what Flax fed it shows its own fault and nobody else's, whatever was wrong before it.
Imports NumPy, flax_mixtral's configuration and parity's own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.oracle.model import EXACT, Ops, Oracle
from parity.points import POINTS, block_points
from parity.trace import Array, Batch, Trace

__all__ = ["BASE_OPS", "Block", "block_names", "compute", "rounded", "to_bfloat16"]

FLOAT32_POINTS = frozenset({"router_probs", "router_ids", "router_weights"})
"""What stays wide in a bfloat16 model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What a replay starts from.

    Args:
        config: the model's.
        weights: Hugging Face's legacy names to [out, in] arrays.
        batch: gives mask and positions.
        layer: 0-based; num_hidden_layers stands for the head.
        x_BTD: what the block was fed.
        inputs: the points that each operation was fed.
        observed: the points that are to be explained; `inputs` again unless operations were run alone.
        ids_MA: the experts that were used.
        dtype: of the run.
        ops: the operations.
        inside: recompute the experts for `moe_out` rather than take their recorded outputs.
    """

    config: MixtralConfig
    weights: Mapping[str, Array]
    batch: Batch
    layer: int
    x_BTD: Array
    inputs: Trace
    observed: Trace
    ids_MA: Array
    dtype: str
    ops: Ops = EXACT
    inside: bool = False

    def weight(self, module: str) -> Array:
        """Give a kernel of this layer."""
        return self.weights[f"{self.prefix}layers.{self.layer}.{module}.weight"]

    @property
    def prefix(self) -> str:
        """What the decoder's tensors' names begin with."""
        return "" if self.config.architecture == "MixtralModel" else "model."

    def fed(self, point: str) -> Array:
        """Give an operation's recorded input in float64, or compute it where it was not recorded."""
        recorded = self.inputs.arrays.get(point)
        return compute(self, point) if recorded is None else _wide(recorded)

    def states_MD(self) -> Array:
        """Give the experts' input token by token."""
        return self.fed("post_attn_norm").reshape(-1, self.config.hidden_size)


def compute(block: Block, point: str) -> Array:
    """Compute one point from what its operation was fed, in float64; rounded as the run's dtype rounds it."""
    with np.errstate(all="ignore"):  # a hypothesis may divide by zero; what it gives is compared all the same
        if point.startswith("expert."):
            number, name = point.split(".")[1:]
            exact = _expert(block, int(number), name)
        else:
            exact = OPERATIONS[point](block)
    return to_bfloat16(exact) if block.dtype == "bfloat16" and point not in FLOAT32_POINTS else exact


def block_names(config: MixtralConfig) -> Iterator[str]:
    """Walk the points that `compute` knows, in the order of computation; those inside attention are rarely recorded."""
    for name, _ in block_points(config):
        if name == "attn_context":
            yield from (point.name for point in POINTS if point.place == "operation")
        if name != "lens":
            yield name


def _rotated(block: Block, point: str) -> Array:
    ops, positions_BT = block.ops, block.ops.positions(block.batch)
    frequencies_P, factor = ops.frequencies(block.config, int(positions_BT.max()) + 1)
    return ops.rotate(block.fed(point), *ops.tables(frequencies_P, factor, positions_BT))


def _scores(block: Block) -> Array:
    keys_BSNH = block.ops.repeat(block.fed("k_rot"), block.config.num_attention_heads)
    return block.ops.scores(block.fed("q_rot"), keys_BSNH)


def _probs(block: Block) -> Array:
    visible_BTS = block.ops.visible(block.batch, block.config.sliding_window)
    return block.ops.attention_softmax(block.fed("attn_scores"), visible_BTS)


def _context(block: Block) -> Array:
    return block.ops.mix(block.fed("attn_probs"), block.ops.repeat(block.fed("v"), block.config.num_attention_heads))


def _heads(name: str) -> Callable[[Block], Array]:
    def projected(block: Block) -> Array:
        normed_BTD = block.fed("input_norm")
        flat = block.ops.project(normed_BTD, block.weight(f"self_attn.{name}_proj"))
        return flat.reshape(*normed_BTD.shape[:2], -1, block.config.head_dim)

    return projected


def _attn_out(block: Block) -> Array:
    context_BTNH = block.fed("attn_context")
    return block.ops.project(context_BTNH.reshape(*context_BTNH.shape[:2], -1), block.weight("self_attn.o_proj"))


def _norm(block: Block, x_BTD: Array, module: str) -> Array:
    return block.ops.norm(x_BTD, block.weight(module), block.config.rms_norm_eps)


def _expert_kernel(block: Block, expert: int, name: str) -> Array:
    return block.weight(f"block_sparse_moe.experts.{expert}.{name}")


def _expert(block: Block, expert: int, name: str) -> Array:
    """Compute a point of one expert on the tokens that it was recorded on."""
    ops, stem, rows_R = block.ops, f"expert.{expert}.", block.observed.rows[expert]
    if name == "act":
        gate_RF, up_RF = block.fed(stem + "gate"), block.fed(stem + "up")
        return ops.product(ops.activate(block.config.hidden_act, gate_RF), up_RF)
    if name == "down":
        return ops.project(block.fed(stem + "act"), _expert_kernel(block, expert, "w2"))
    x_MD = block.states_MD().copy()
    given_R, x_RD, _ = ops.dispatch(x_MD, block.ids_MA, block.fed("router_weights"), expert)
    x_MD[given_R] = x_RD
    return ops.project(x_MD[rows_R], _expert_kernel(block, expert, {"gate": "w1", "up": "w3"}[name]))


def _run_expert(block: Block, expert: int, x_RD: Array) -> Array:
    """Compute an expert's output from its input."""
    ops, cast = block.ops, rounded(block.dtype)
    gate_RF, up_RF = (cast(ops.project(x_RD, _expert_kernel(block, expert, name))) for name in ("w1", "w3"))
    act_RF = cast(ops.product(ops.activate(block.config.hidden_act, gate_RF), up_RF))
    return cast(ops.project(act_RF, _expert_kernel(block, expert, "w2")))


def _moe_out(block: Block) -> Array:
    """Combine the experts' outputs: recorded ones, which exist for real tokens, or recomputed ones."""
    x_MD, weights_MA = block.states_MD(), block.fed("router_weights")
    sum_MD = np.zeros_like(x_MD)
    for expert in range(block.config.num_local_experts):
        rows_R, x_RD, weights_R = block.ops.dispatch(x_MD, block.ids_MA, weights_MA, expert)
        if block.inside:
            down_RD = _run_expert(block, expert, x_RD)
        else:
            recorded_R = block.inputs.rows[expert]
            kept_R = np.isin(rows_R, recorded_R)
            rows_R, weights_R = rows_R[kept_R], weights_R[kept_R]
            down_RD = block.fed(f"expert.{expert}.down")[np.searchsorted(recorded_R, rows_R)]
        sum_MD = block.ops.combine(sum_MD, rows_R, weights_R, down_RD)
    return sum_MD.reshape(block.fed("post_attn_norm").shape)


def _router_logits(block: Block) -> Array:
    return block.ops.project(block.states_MD(), block.weight("block_sparse_moe.gate"))


def _weigh(block: Block) -> Array:
    return block.ops.weigh(block.fed("router_logits"), block.fed("router_probs"), block.ids_MA)


def _logits(block: Block) -> Array:
    """Apply the head; the oracle's own, since only its product can be wrong."""
    head = Oracle(block.config, block.weights, replace(block.ops, norm=lambda x_BTD, scale_D, eps: x_BTD))
    return head.head(block.fed("final_norm"), block.batch)["logits"]


OPERATIONS: dict[str, Callable[[Block], Array]] = {
    "input_norm": lambda block: _norm(block, _wide(block.x_BTD), "input_layernorm"),
    **{name: _heads(name) for name in ("q", "k", "v")},
    "q_rot": lambda block: _rotated(block, "q"),
    "k_rot": lambda block: _rotated(block, "k"),
    "attn_scores": _scores,
    "attn_probs": _probs,
    "attn_context": _context,
    "attn_out": _attn_out,
    "resid_mid": lambda block: block.ops.residual(_wide(block.x_BTD), block.fed("input_norm"), block.fed("attn_out")),
    "post_attn_norm": lambda block: _norm(block, block.fed("resid_mid"), "post_attention_layernorm"),
    "router_logits": _router_logits,
    "router_probs": lambda block: block.ops.router_softmax(block.fed("router_logits")),
    "router_ids": lambda block: block.ops.choose(block.fed("router_probs"), block.config.num_experts_per_tok),
    "router_weights": _weigh,
    "moe_out": _moe_out,
    "resid_out": lambda block: block.ops.residual(
        block.fed("resid_mid"), block.fed("post_attn_norm"), block.fed("moe_out")
    ),
    "final_norm": lambda block: block.ops.norm(
        _wide(block.x_BTD), block.weights[f"{block.prefix}norm.weight"], block.config.rms_norm_eps
    ),
    "logits": _logits,
}
"""What gives each point; an expert's are in `_expert`."""


def to_bfloat16(x: Array) -> Array:
    """Round to bfloat16 and widen again."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def rounded(dtype: str) -> Callable[[Array], Array]:
    """Give the rounding of a dtype; float32 is left exact, as the noise is measured on torch."""
    return to_bfloat16 if dtype == "bfloat16" else lambda x: x


def _wide(x: Array) -> Array:
    return x if x.dtype.kind in "iu" else x.astype(np.float64)


def _norm_bfloat16(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    return EXACT.norm(x_BTD, np.ones(1), eps).astype(ml_dtypes.bfloat16).astype(np.float64) * scale_D.astype(np.float64)


def _tables_bfloat16(frequencies_P: Array, factor: float, positions_BT: Array) -> tuple[Array, Array]:
    cos_BTH, sin_BTH = EXACT.tables(frequencies_P, factor, positions_BT)
    return to_bfloat16(cos_BTH), to_bfloat16(sin_BTH)


def _rotate_bfloat16(x_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
    """Round both products, as Hugging Face does."""
    still_BTNH = to_bfloat16(x_BTNH * cos_BTH[:, :, None])
    return still_BTNH + to_bfloat16(EXACT.rotate(x_BTNH, np.zeros_like(cos_BTH), sin_BTH))


def _scores_bfloat16(q_BTNH: Array, k_BSNH: Array) -> Array:
    """Round the products, then their multiples by 1/sqrt(H), which torch takes in float32."""
    root = q_BTNH.shape[-1] ** 0.5
    return to_bfloat16(to_bfloat16(EXACT.scores(q_BTNH, k_BSNH) * root) / root)


BASE_OPS = {
    "float32": EXACT,
    "bfloat16": replace(
        EXACT,
        norm=_norm_bfloat16,
        tables=_tables_bfloat16,
        rotate=_rotate_bfloat16,
        scores=_scores_bfloat16,
        attention_softmax=lambda scores, visible: to_bfloat16(EXACT.attention_softmax(scores, visible)),
        activate=lambda name, gate_RF: to_bfloat16(EXACT.activate(name, gate_RF)),
    ),
}
"""The operations of a correct side: in bfloat16 with Hugging Face's rounding points."""
