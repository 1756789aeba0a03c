"""The parameter tree as a table: every leaf's path and axes. Model, converter and docs read it here.

Kernels are [in, out]. Experts are stacked along E. `{L}` in a path is the layer number.
Imports the standard library only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from flax_mixtral.axes import axis_sizes
from flax_mixtral.config import Architecture, MixtralConfig

__all__ = ["BASE", "HEADS", "Leaf", "Slot", "leaves", "slots"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One parameter: its path in the tree and one axis letter per dimension."""

    path: str
    axes: str


@dataclass(frozen=True, slots=True)
class Slot:
    """One leaf of one model: the filled-in path, the table row it came from, the layer and the shape."""

    path: str
    leaf: Leaf
    layer: int | None
    shape: tuple[int, ...]


BASE = (
    Leaf("embed_tokens.embedding", "V D"),
    Leaf("layers.{L}.input_norm.scale", "D"),
    Leaf("layers.{L}.attention.q.kernel", "D N H"),
    Leaf("layers.{L}.attention.k.kernel", "D K H"),
    Leaf("layers.{L}.attention.v.kernel", "D K H"),
    Leaf("layers.{L}.attention.o.kernel", "N H D"),
    Leaf("layers.{L}.post_attention_norm.scale", "D"),
    Leaf("layers.{L}.moe.router.kernel", "D E"),
    Leaf("layers.{L}.moe.experts.gate", "E D F"),
    Leaf("layers.{L}.moe.experts.up", "E D F"),
    Leaf("layers.{L}.moe.experts.down", "E F D"),
    Leaf("final_norm.scale", "D"),
)
"""The decoder. A model with a head holds it under `model.`, the bare model at the root."""

HEADS: dict[Architecture, tuple[Leaf, ...]] = {
    "MixtralModel": (),
    "MixtralForCausalLM": (Leaf("lm_head.kernel", "D V"),),
    "MixtralForSequenceClassification": (Leaf("score.kernel", "D C"),),
    "MixtralForTokenClassification": (Leaf("score.kernel", "D C"), Leaf("score.bias", "C")),
    "MixtralForQuestionAnswering": (Leaf("qa_outputs.kernel", "D C"), Leaf("qa_outputs.bias", "C")),
}


def leaves(config: MixtralConfig) -> tuple[Leaf, ...]:
    """List the rows that a configuration uses: a tied head and a switched-off bias have no leaf."""
    head = HEADS[config.architecture]
    if config.architecture == "MixtralForCausalLM" and config.tie_word_embeddings:
        head = ()
    if config.architecture == "MixtralForTokenClassification" and not config.token_classification_bias:
        head = head[:1]
    prefix = "" if config.architecture == "MixtralModel" else "model."
    return (*(Leaf(prefix + leaf.path, leaf.axes) for leaf in BASE), *head)


def slots(config: MixtralConfig) -> Iterator[Slot]:
    """Walk every leaf of a model in order: embedding, layer by layer, final norm, head."""
    sizes = axis_sizes(config)
    rows = leaves(config)
    per_layer = [leaf for leaf in rows if "{L}" in leaf.path]
    first = rows.index(per_layer[0])

    def slot(leaf: Leaf, layer: int | None) -> Slot:
        shape = tuple(sizes[axis] for axis in leaf.axes.split())
        return Slot(leaf.path.format(L=layer), leaf, layer, shape)

    yield from (slot(leaf, None) for leaf in rows[:first])
    for layer in range(config.num_hidden_layers):
        yield from (slot(leaf, layer) for leaf in per_layer)
    yield from (slot(leaf, None) for leaf in rows[first + len(per_layer) :])
