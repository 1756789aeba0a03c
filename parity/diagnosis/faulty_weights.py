"""Weights that are right in the file and used in the wrong place: the changes that a replay tries with them.

Imports NumPy and parity's own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from parity.diagnosis.change import Change
from parity.diagnosis.replay import Block
from parity.trace import Array

__all__ = [
    "Overlay",
    "gate_and_up",
    "key_and_value",
    "layer_by_string",
    "normed_output",
    "norms",
    "not_transposed",
    "rope_rows",
    "shifted_head",
    "string_order",
    "tied_head",
    "to_halves",
    "to_neighbours",
]

EXPERT = "block_sparse_moe.experts."


class Overlay(Mapping[str, Array]):
    """Weights of which some are others'.

    Args:
        weights: the right ones.
        give: gives a tensor by its name.
    """

    def __init__(self, weights: Mapping[str, Array], give: Callable[[str], Array]):
        self._weights, self._give = weights, give

    def __getitem__(self, name: str) -> Array:
        return self._give(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def reweighted(give: Callable[[Block, str], Array]) -> Callable[[Block], Block]:
    """Change a block's weights."""
    return lambda block: replace(block, weights=Overlay(block.weights, lambda name: give(block, name)))


def renamed(**names: str) -> Callable[[Block], Block]:
    """Exchange modules by the dotted parts of their names."""

    def give(block: Block, name: str) -> Array:
        return block.weights[".".join(names.get(part, part) for part in name.split("."))]

    return reweighted(give)


def gate_and_up(block: Block) -> Iterable[Change]:
    """Take w3 for w1 and w1 for w3."""
    yield Change("w1 and w3 exchanged", block=renamed(w1="w3", w3="w1"))


def key_and_value(block: Block) -> Iterable[Change]:
    """Take one projection for the other."""
    yield Change("k_proj and v_proj exchanged", block=renamed(k_proj="v_proj", v_proj="k_proj"))


def norms(block: Block) -> Iterable[Change]:
    """Take one norm's weight for the other's."""
    names = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
    yield Change("weights of the two norms exchanged", block=renamed(**names))


def to_halves(kernel: Array, head_dim: int) -> Array:
    """Reorder rows from neighbouring pairs to halves, head by head: [out, in]."""
    rows = kernel.reshape(-1, head_dim // 2, 2, kernel.shape[-1])
    return rows.swapaxes(1, 2).reshape(kernel.shape)


def to_neighbours(kernel: Array, head_dim: int) -> Array:
    """Reorder rows from halves to neighbouring pairs, head by head: [out, in]."""
    rows = kernel.reshape(-1, 2, head_dim // 2, kernel.shape[-1])
    return rows.swapaxes(1, 2).reshape(kernel.shape)


def rope_rows(block: Block) -> Iterable[Change]:
    """Permute the rows of q and k, of both or of one."""
    for detail, turn in (("halves to neighbours", to_neighbours), ("neighbours to halves", to_halves)):

        def give(block: Block, name: str, turn: Callable[[Array, int], Array] = turn) -> Array:
            permuted = name.endswith(("q_proj.weight", "k_proj.weight"))
            return turn(block.weights[name], block.config.head_dim) if permuted else block.weights[name]

        for at in (("q", "k"), ("q",), ("k",)):
            yield Change(f"rows of {' and '.join(at)} from {detail}", block=reweighted(give), at=at)


SQUARE = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "attn_out": "o_proj",
    "router_logits": "gate",
    "expert.gate": "w1",
    "expert.up": "w3",
    "expert.down": "w2",
}
"""The module that holds the kernel of each projected point."""


def not_transposed(block: Block) -> Iterable[Change]:
    """Use each kernel that is square as it lies."""

    def give(block: Block, name: str) -> Array:
        kernel = block.weights[name]
        return kernel.T if kernel.ndim == 2 and kernel.shape[0] == kernel.shape[1] else kernel

    config = block.config
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    rows = dict.fromkeys(("q", "attn_out"), config.num_attention_heads * H)
    rows |= dict.fromkeys(("k", "v"), config.num_key_value_heads * H) | {"router_logits": config.num_local_experts}
    rows |= dict.fromkeys(("expert.gate", "expert.up", "expert.down"), F)
    square = [point for point, size in rows.items() if size == D]
    if len(square) > 1:
        yield Change("every square kernel transposed", block=reweighted(give), at=(*square, "moe_out"))
    for point in square:
        at = (point, "moe_out") if point.startswith("expert.") else (point,)
        yield Change(f"{SQUARE[point]} transposed", block=reweighted(give), at=at)


def string_order(layers: int) -> list[int]:
    """Sort layer numbers as text: 0, 1, 10, 11, 2, ..."""
    return sorted(range(layers), key=str)


def layer_by_string(block: Block) -> Iterable[Change]:
    """Take the whole layer that stands at this place in the wrong order."""
    other = string_order(block.config.num_hidden_layers)[block.layer]
    if other == block.layer:
        return
    own = f"{block.prefix}layers.{block.layer}."

    def give(block: Block, name: str) -> Array:
        return block.weights[name.replace(own, f"{block.prefix}layers.{other}.")]

    yield Change(f"the weights of layer {other}", block=reweighted(give))


def normed_output(block: Block) -> Iterable[Change]:
    """Give the final norm of the sum as the last block's output."""
    if block.layer != block.config.num_hidden_layers - 1:
        return
    scale_D, eps = block.weights[f"{block.prefix}norm.weight"], block.config.rms_norm_eps

    def residual(stream_BTD: Array, normed_BTD: Array, branch_BTD: Array) -> Array:
        return block.ops.norm(stream_BTD + branch_BTD, scale_D, eps)

    yield Change("resid_out after the final norm", {"residual": residual})


def tied_head(block: Block) -> Iterable[Change]:
    """Tie the head to the embedding."""
    embedding_VD = block.weights.get("model.embed_tokens.weight")
    if embedding_VD is not None and not block.config.tie_word_embeddings:
        yield Change("the embedding as head", {"project": lambda x, kernel: x @ embedding_VD.astype(x.dtype).T})


def shifted_head(block: Block) -> Iterable[Change]:
    """Take each row of the head for the next one's or the one's before."""
    for by in (1, -1):
        yield Change(
            f"rows of the head shifted by {by:+d}",
            {"project": lambda x, kernel, by=by: x @ np.roll(kernel, by, axis=0).astype(x.dtype).T},
        )
