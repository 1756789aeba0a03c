"""Hugging Face with one tensor per expert: what transformers 4.36 and later write.

Source: transformers 5.23, models/mixtral/modeling_mixtral.py and conversion_mapping.py ("mixtral").
"""

from convert.rules import Layout, Rule

__all__ = ["HF_LEGACY", "SHARED"]

SHARED = (
    Rule("{model}embed_tokens.weight", "embed_tokens.embedding", "V D -> V D"),
    Rule("{model}layers.{L}.input_layernorm.weight", "layers.{L}.input_norm.scale", "D -> D"),
    Rule("{model}layers.{L}.self_attn.q_proj.weight", "layers.{L}.attention.q.kernel", "(N H) D -> D N H"),
    Rule("{model}layers.{L}.self_attn.k_proj.weight", "layers.{L}.attention.k.kernel", "(K H) D -> D K H"),
    Rule("{model}layers.{L}.self_attn.v_proj.weight", "layers.{L}.attention.v.kernel", "(K H) D -> D K H"),
    Rule("{model}layers.{L}.self_attn.o_proj.weight", "layers.{L}.attention.o.kernel", "D (N H) -> N H D"),
    Rule("{model}layers.{L}.post_attention_layernorm.weight", "layers.{L}.post_attention_norm.scale", "D -> D"),
    Rule("{model}norm.weight", "final_norm.scale", "D -> D"),
    Rule("lm_head.weight", "lm_head.kernel", "V D -> D V"),
    Rule("score.weight", "score.kernel", "C D -> D C"),
    Rule("score.bias", "score.bias", "C -> C"),
    Rule("qa_outputs.weight", "qa_outputs.kernel", "C D -> D C"),
    Rule("qa_outputs.bias", "qa_outputs.bias", "C -> C"),
)
"""All but router and experts, which is where the two Hugging Face layouts part."""

_MOE = "{model}layers.{L}.block_sparse_moe."

HF_LEGACY = Layout(
    name="hf-legacy",
    stem="model",
    format="pt",
    rules=(
        *SHARED,
        Rule(_MOE + "gate.weight", "layers.{L}.moe.router.kernel", "E D -> D E"),
        Rule(_MOE + "experts.{E}.w1.weight", "layers.{L}.moe.experts.gate", "F D -> E D F"),
        Rule(_MOE + "experts.{E}.w3.weight", "layers.{L}.moe.experts.up", "F D -> E D F"),
        Rule(_MOE + "experts.{E}.w2.weight", "layers.{L}.moe.experts.down", "D F -> E F D"),
    ),
)
