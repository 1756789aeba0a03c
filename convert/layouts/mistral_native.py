"""Mistral's own layouts: one tensor per expert (mistral-inference), and experts stacked in rows (the first release).

Rotary pairs are adjacent lanes here and half a head apart in Hugging Face and Flax, hence the "(N P 2)" of q and k.
Source: mistral-inference 1.x, transformer.py and moe.py; transformers 4.36, convert_mixtral_weights_to_hf.py.
"""

from convert.rules import Layout, Rule

__all__ = ["MISTRAL", "MISTRAL_STACKED"]

_SHARED = (
    Rule("tok_embeddings.weight", "embed_tokens.embedding", "V D -> V D"),
    Rule("layers.{L}.attention_norm.weight", "layers.{L}.input_norm.scale", "D -> D"),
    Rule("layers.{L}.attention.wq.weight", "layers.{L}.attention.q.kernel", "(N P 2) D -> D N (2 P)"),
    Rule("layers.{L}.attention.wk.weight", "layers.{L}.attention.k.kernel", "(K P 2) D -> D K (2 P)"),
    Rule("layers.{L}.attention.wv.weight", "layers.{L}.attention.v.kernel", "(K H) D -> D K H"),
    Rule("layers.{L}.attention.wo.weight", "layers.{L}.attention.o.kernel", "D (N H) -> N H D"),
    Rule("layers.{L}.ffn_norm.weight", "layers.{L}.post_attention_norm.scale", "D -> D"),
    Rule("norm.weight", "final_norm.scale", "D -> D"),
    Rule("output.weight", "lm_head.kernel", "V D -> D V"),
)

_MOE, _STACKED = "layers.{L}.feed_forward.", "layers.{L}.block_sparse_moe."

MISTRAL = Layout(
    name="mistral",
    stem="consolidated",
    format="pt",
    native=True,
    rules=(
        *_SHARED,
        Rule(_MOE + "gate.weight", "layers.{L}.moe.router.kernel", "E D -> D E"),
        Rule(_MOE + "experts.{E}.w1.weight", "layers.{L}.moe.experts.gate", "F D -> E D F"),
        Rule(_MOE + "experts.{E}.w3.weight", "layers.{L}.moe.experts.up", "F D -> E D F"),
        Rule(_MOE + "experts.{E}.w2.weight", "layers.{L}.moe.experts.down", "D F -> E F D"),
    ),
)

MISTRAL_STACKED = Layout(
    name="mistral-stacked",
    stem="consolidated",
    format="pt",
    native=True,
    rules=(
        *_SHARED,
        Rule(_STACKED + "gate.weight", "layers.{L}.moe.router.kernel", "E D -> D E"),
        Rule(_STACKED + "w1", "layers.{L}.moe.experts.gate", "(E F) D -> E D F"),
        Rule(_STACKED + "w3", "layers.{L}.moe.experts.up", "(E F) D -> E D F"),
        Rule(_STACKED + "w2", "layers.{L}.moe.experts.down", "(E F) D -> E F D"),  # of HF's w2 the transpose
    ),
)
