"""The comparison points of the backward pass: names, the order in which it reaches them, rows and channels.

Imports flax_mixtral's neutral modules and parity's table of points only.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from flax_mixtral.config import MixtralConfig
from flax_mixtral.tree import slots
from parity.points import Point

__all__ = ["KINDS", "STREAM", "GradientPoint", "backward_depth", "gradient_points"]

STREAM = "grad.resid"
"""The gradient of the residual stream before a block; without a layer, after the last one."""

KINDS = {
    "loss": "",
    "aux_loss": "",
    "training_loss": "",
    "lm_head.kernel": "D",
    "final_norm.scale": "",
    "moe.experts.down": "F",
    "moe.experts.gate": "D",
    "moe.experts.up": "D",
    "moe.router.kernel": "D",
    "post_attention_norm.scale": "",
    "attention.o.kernel": "N H",
    "attention.v.kernel": "D",
    "attention.k.kernel": "D",
    "attention.q.kernel": "D",
    "input_norm.scale": "",
    "resid": "B T",
    "embed_tokens.embedding": "V",
}
"""Every kind of point in the order of the backward pass, and the axes that make its rows: what goes in. All other axes
make its channels. A gain has no input axis: one row. Experts, the leading axis E, are judged one by one."""

_ORDER = {kind: number for number, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class GradientPoint:
    """One gradient that is compared.

    Args:
        layer: 0-based; None outside the blocks.
        leaf: the parameter's path in the Flax tree; None for the residual stream.
        point: name, and axes as rows and channels: [rows, channels], or [B, T, D].
        by_expert: whether the leaf's first axis counts experts.
    """

    layer: int | None
    leaf: str | None
    point: Point
    by_expert: bool


def gradient_points(config: MixtralConfig) -> list[GradientPoint]:
    """List every gradient of a MixtralForCausalLM in the order in which the backward pass reaches it."""
    return sorted(_points(config), key=lambda row: backward_depth(row.layer, row.point.name))


def backward_depth(layer: int | None, point: str) -> tuple[float, int]:
    """Order points as the backward pass reaches them: losses, head, blocks from the last one on, embedding."""
    kind = re.sub(r"^(grad\.)?(model\.)?(layers\.\d+\.)?", "", point)
    if layer is None:
        return (math.inf if kind == "embed_tokens.embedding" else -math.inf, _ORDER[kind])
    return (-layer, _ORDER[kind])


def _points(config: MixtralConfig) -> Iterator[GradientPoint]:
    stream = Point(STREAM, "whole", "B T D", "gradient of the residual stream")
    for layer in (*range(config.num_hidden_layers), None):
        yield GradientPoint(layer, None, stream, False)
    for slot in slots(config):
        kind = slot.leaf.path.removeprefix("model.").removeprefix("layers.{L}.")
        # Rows and channels are all that a verdict looks at; a matrix of either has one letter for each.
        says = f"gradient of {kind}, rows {KINDS[kind] or 'none'}"
        yield GradientPoint(
            slot.layer,
            slot.path,
            Point(f"grad.{slot.path}", "whole", "R C", says),
            slot.leaf.axes.startswith("E "),
        )
