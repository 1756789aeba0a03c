"""The comparison points: names, order and axes in one table. Walk, verdict, reports and docs read it.

Imports flax_mixtral's neutral modules only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flax_mixtral.config import Architecture, MixtralConfig

__all__ = ["POINTS", "Point", "block_points", "head_points", "kind_of", "operation_points"]

Place = Literal["embed", "block", "expert", "operation", "head", "whole", "cache"]
Kind = Literal["arithmetic", "exact", "ids"]


@dataclass(frozen=True, slots=True)
class Point:
    """One place in the model where the sides are compared.

    `axes` names the array's dimensions (letters of flax_mixtral.axes); the rows of an expert's arrays are the tokens
    that it is given, `R`. `kind` says how: by the oracle's margin, as equal, or as sets of expert ids.
    """

    name: str
    place: Place
    axes: str
    says: str
    kind: Kind = "arithmetic"


POINTS = (
    Point("embed", "embed", "B T D", "token embedding", "exact"),
    Point("input_norm", "block", "B T D", "RMS norm before attention"),
    Point("q", "block", "B T N H", "query projection"),
    Point("k", "block", "B T K H", "key projection"),
    Point("v", "block", "B T K H", "value projection"),
    Point("q_rot", "block", "B T N H", "queries after rotary embedding"),
    Point("k_rot", "block", "B T K H", "keys after rotary embedding"),
    Point("attn_scores", "operation", "B N T S", "scaled scores before the mask"),
    Point("attn_probs", "operation", "B N T S", "softmax of the visible scores"),
    Point("attn_context", "block", "B T N H", "values mixed by attention, head by head"),
    Point("attn_out", "block", "B T D", "output projection of attention"),
    Point("resid_mid", "block", "B T D", "residual stream after attention"),
    Point("post_attn_norm", "block", "B T D", "RMS norm before the experts"),
    Point("router_logits", "block", "M E", "router's projection"),
    Point("router_probs", "block", "M E", "softmax over experts, float32"),
    Point("router_ids", "block", "M A", "experts chosen for each token", "ids"),
    Point("router_weights", "block", "M A", "their weights, renormalised"),
    Point("expert.{E}.gate", "expert", "R F", "gate projection of one expert"),
    Point("expert.{E}.up", "expert", "R F", "up projection"),
    Point("expert.{E}.act", "expert", "R F", "activation(gate) * up"),
    Point("expert.{E}.down", "expert", "R D", "down projection, before the routing weight"),
    Point("moe_out", "block", "B T D", "experts' outputs combined"),
    Point("resid_out", "block", "B T D", "residual stream after the block"),
    Point("lens", "block", "logits", "final norm and head applied to resid_out: logits layer by layer"),
    Point("final_norm", "head", "B T D", "RMS norm after the last block"),
    Point("logits", "head", "logits", "the head's output"),
    Point("loss", "whole", "", "cross entropy of the next token, mean over real tokens"),
    Point("aux_loss", "whole", "", "load-balancing loss over all layers"),
    Point("prefill_logits", "cache", "B T V", "logits after a prompt that fills the cache"),
    Point("decode_logits", "cache", "B T V", "logits of tokens fed one by one through the cache"),
    Point("tokens", "cache", "B T", "greedy continuation", "ids"),
)

LOGIT_AXES: dict[Architecture, str | None] = {
    "MixtralModel": None,
    "MixtralForCausalLM": "B T V",
    "MixtralForSequenceClassification": "B C",
    "MixtralForTokenClassification": "B T C",
    "MixtralForQuestionAnswering": "B T C",
}
"""What `logits` stands for under each head; the bare model has none, hence neither `lens`."""


def block_points(config: MixtralConfig) -> Iterator[tuple[str, Point]]:
    """Walk the names and points of one block in the order of computation, expert by expert."""
    experts = [point for point in POINTS if point.place == "expert"]
    for point in _present("block", config):
        if point.name == "moe_out":
            for expert in range(config.num_local_experts):
                yield from ((row.name.format(E=expert), row) for row in experts)
        yield point.name, point


def operation_points(config: MixtralConfig) -> Iterator[tuple[str, Point]]:
    """Walk the points that are compared operation by operation, in the order of computation."""
    between = [(point.name, point) for point in POINTS if point.place == "operation"]
    for name, point in block_points(config):
        if name == "attn_context":
            yield from between
        if point.kind == "arithmetic" and name != "lens":
            yield name, point


def head_points(config: MixtralConfig) -> Iterator[tuple[str, Point]]:
    """Walk the names and points after the last block."""
    yield from ((point.name, point) for point in _present("head", config))
    if config.architecture == "MixtralForCausalLM":
        yield from ((point.name, point) for point in _present("whole", config))


def kind_of(point: str) -> str:
    """Take the expert's number, or a gradient's layer, out of a point's name: "expert.3.gate" is an "expert.gate"."""
    return re.sub(r"^expert\.(\d+|{E})\.", "expert.", re.sub(r"^grad\.(model\.)?(layers\.\d+\.)?", "grad.", point))


def _present(place: Place, config: MixtralConfig) -> Iterator[Point]:
    for point in POINTS:
        if point.place != place:
            continue
        if point.axes == "logits":
            axes = LOGIT_AXES[config.architecture]
            if axes is not None:
                yield Point(point.name, point.place, axes, point.says, point.kind)
        else:
            yield point
