"""Hugging Face with the experts stacked and gate and up in one tensor: transformers 5.x in memory.

Source: transformers 5.23, models/mixtral/modeling_mixtral.py (MixtralExperts).
"""

from convert.layouts.hf_legacy import SHARED
from convert.rules import Layout, Rule

__all__ = ["HF_FUSED"]

_MLP = "{model}layers.{L}.mlp."

HF_FUSED = Layout(
    name="hf-fused",
    stem="model",
    format="pt",
    rules=(
        *SHARED,
        Rule(_MLP + "gate.weight", "layers.{L}.moe.router.kernel", "E D -> D E"),
        Rule(_MLP + "experts.gate_up_proj", "layers.{L}.moe.experts.gate", "E (0/2 F) D -> E D F"),
        Rule(_MLP + "experts.gate_up_proj", "layers.{L}.moe.experts.up", "E (1/2 F) D -> E D F"),
        Rule(_MLP + "experts.down_proj", "layers.{L}.moe.experts.down", "E D F -> E F D"),
    ),
)
