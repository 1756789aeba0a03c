"""Where a wrong leaf really came from: exact matches with the source under a table of transformations.

A match is one of bits, so that nothing is guessed; hashes that survive a permutation find the candidates cheaply.
Imports NumPy, flax_mixtral's configuration and parity's own.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.diagnosis.cause import UNKNOWN, Cause
from parity.diagnosis.faulty_weights import string_order
from parity.diagnosis.leaf_hashes import bits, multiset_hash, row_hashes
from parity.trace import Array

__all__ = ["ORIGINS", "Origin", "weight_causes"]

Leaves = Mapping[str, Array]

CHANCE = 5.0
"""Standard deviations up to which a correlation with the source is none: of n values by chance it is 1 / sqrt(n)."""

PARTNERS = {
    "moe.experts.gate": ("moe.experts.up", "w1-w3-swapped"),
    "moe.experts.up": ("moe.experts.gate", "w1-w3-swapped"),
    "attention.k.kernel": ("attention.v.kernel", "k-v-swapped"),
    "attention.v.kernel": ("attention.k.kernel", "k-v-swapped"),
    "input_norm.scale": ("post_attention_norm.scale", "norms-swapped"),
    "post_attention_norm.scale": ("input_norm.scale", "norms-swapped"),
}
"""The leaf that each is taken for, and what that is called."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One wrong leaf.

    Args:
        config: the model's.
        source: all right leaves; flax: all leaves as they are.
        path: its own.
    """

    config: MixtralConfig
    source: Leaves
    flax: Leaves
    path: str

    @property
    def layer(self) -> int | None:
        """Its layer, None outside the blocks."""
        found = re.search(r"(?:^|\.)layers\.(\d+)\.", self.path)
        return int(found[1]) if found else None

    @property
    def kind(self) -> str:
        """Its path below the layer, or below the model."""
        return re.sub(r"^(model\.)?(layers\.\d+\.)?", "", self.path)

    @property
    def is_expert(self) -> bool:
        """Whether it is stacked along E."""
        return self.kind.startswith("moe.experts.")

    def sibling(self, kind: str, layer: int | None = None) -> str:
        """Give the path of another leaf of this layer, or of another layer."""
        path = self.path.removesuffix(self.kind) + kind
        return path if layer is None else path.replace(f"layers.{self.layer}.", f"layers.{layer}.")

    def kernels(self, leaves: Leaves) -> Iterator[Array]:
        """Give the leaf as [in, out] matrices: one, or one for each expert."""
        array = leaves[self.path]
        if self.is_expert:
            yield from array
        elif self.kind == "attention.o.kernel":
            yield array.reshape(-1, array.shape[-1])
        else:
            yield array.reshape(len(array), -1)


@dataclass(frozen=True, slots=True)
class Origin:
    """One explanation of a wrong leaf.

    Args:
        slug: the fault's name in the catalogue.
        says: what is compared.
        find: gives the evidence, or None where it does not fit.
    """

    slug: str
    says: str
    find: Callable[[Leaf], str | None]


def weight_causes(config: MixtralConfig, source: Leaves, flax: Leaves, differing: Sequence[str]) -> list[Cause]:
    """Say of each wrong leaf where it came from.

    Args:
        config: the model's.
        source: the right leaves by path.
        flax: the leaves as they are.
        differing: the paths of those that differ.

    Returns:
        One cause for each fault and layer, in the order of `differing`, its evidence naming every leaf; "unknown"
        where no origin fits.
    """
    found: dict[tuple[str, int | None], list[tuple[str, str]]] = {}
    for path in differing:
        leaf = Leaf(config, source, flax, path)
        slug, evidence = _explain(leaf)
        found.setdefault((slug, leaf.layer), []).append((path, evidence))
    return [Cause(slug, layer, leaves[0][0], _sentence(leaves)) for (slug, layer), leaves in found.items()]


def _explain(leaf: Leaf) -> tuple[str, str]:
    right, wrong = leaf.source[leaf.path], leaf.flax[leaf.path]
    if right.shape != wrong.shape or right.dtype != wrong.dtype:
        return UNKNOWN, f"{wrong.dtype} {list(wrong.shape)} where the source has {right.dtype} {list(right.shape)}"
    for origin in ORIGINS:
        if (evidence := origin.find(leaf)) is not None:
            return origin.slug, evidence
    return UNKNOWN, _unknown(leaf)


def _sentence(leaves: Sequence[tuple[str, str]]) -> str:
    by_evidence: dict[str, list[str]] = {}
    for path, evidence in leaves:
        by_evidence.setdefault(evidence, []).append(path)
    return "; ".join(f"{' and '.join(paths)}: {evidence}" for evidence, paths in by_evidence.items())


# --- the origins ----------------------------------------------------------------------------------------------------


def _equal(one: Array, other: Array) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and np.array_equal(bits(one), bits(other))


def _partner(slug: str) -> Callable[[Leaf], str | None]:
    def find(leaf: Leaf) -> str | None:
        partner, name = PARTNERS.get(leaf.kind, ("", ""))
        if name == slug and _equal(leaf.flax[leaf.path], leaf.source[leaf.sibling(partner)]):
            return f"equals the source's {partner} of this layer bit for bit"
        return None

    return find


def _experts_from(leaf: Leaf) -> list[int | None]:
    """Say which of the source's experts each of Flax's is, by hash; itself first where several are alike."""
    sources = [row_hashes(kernel).tobytes() for kernel in leaf.kernels(leaf.source)]
    numbers: list[int | None] = []
    for own, kernel in enumerate(leaf.kernels(leaf.flax)):
        key = row_hashes(kernel).tobytes()
        numbers.append(own if sources[own] == key else sources.index(key) if key in sources else None)
    return numbers


def _permuted_experts(leaf: Leaf) -> str | None:
    if not leaf.is_expert:
        return None
    order = _experts_from(leaf)
    return None if None in order else f"its experts are the source's in the order {order}"


def _router_rows(leaf: Leaf) -> str | None:
    if leaf.kind != "moe.router.kernel":
        return None
    sources = [column.tobytes() for column in np.ascontiguousarray(leaf.source[leaf.path].T)]
    columns = [column.tobytes() for column in np.ascontiguousarray(leaf.flax[leaf.path].T)]
    if not set(columns) <= set(sources):
        return None
    return f"its columns are the source's in the order {[sources.index(column) for column in columns]}"


def _string_sorted_layer(leaf: Leaf) -> str | None:
    if leaf.layer is None:
        return None
    other = string_order(leaf.config.num_hidden_layers)[leaf.layer]
    if other == leaf.layer or not _equal(leaf.flax[leaf.path], leaf.source[leaf.sibling(leaf.kind, other)]):
        return None
    return f"equals layer {other} of the source, which stands here when numbers are sorted as text"


def _not_transposed(leaf: Leaf) -> str | None:
    if leaf.flax[leaf.path].ndim < 2 or leaf.kind == "embed_tokens.embedding":
        return None
    pairs = list(zip(leaf.kernels(leaf.flax), leaf.kernels(leaf.source), strict=True))
    if all(np.array_equal(bits(flax).ravel(), bits(right.T).ravel()) for flax, right in pairs):
        rows, columns = pairs[0][0].shape
        how = "transposed" if rows == columns else "read in torch's order [out, in] without a transposition"
        return f"equals the source {how} ({rows} x {columns})"
    return None


def _rope_rows(leaf: Leaf) -> str | None:
    if leaf.kind not in ("attention.q.kernel", "attention.k.kernel"):
        return None
    flax, right = leaf.flax[leaf.path], leaf.source[leaf.path]
    H = right.shape[-1]
    halves = np.arange(H).reshape(2, H // 2).T.ravel()  # 0, P, 1, P + 1, ...
    for order, says in ((halves, "halves to neighbours"), (np.argsort(halves), "neighbours to halves")):
        if _equal(flax, right[..., order]):
            return f"equals the source with the {H} lanes of each head reordered from {says}"
    return None


def _shifted_rows(leaf: Leaf) -> str | None:
    if leaf.kind not in ("embed_tokens.embedding", "lm_head.kernel"):
        return None
    axis = 0 if leaf.kind == "embed_tokens.embedding" else 1
    flax_V, source_V = (
        row_hashes(leaves[leaf.path] if axis else leaves[leaf.path].T) for leaves in (leaf.flax, leaf.source)
    )
    middle = len(flax_V) // 2
    for place in np.flatnonzero(source_V == flax_V[middle]):
        by = middle - int(place)
        kept = slice(max(by, 0), len(flax_V) + min(by, 0))
        if by and np.array_equal(flax_V[kept], np.roll(source_V, by)[kept]):
            return f"row v is the source's row v {-by:+d}, for {kept.stop - kept.start} of {len(flax_V)} rows"
    return None


def _tied_head(leaf: Leaf) -> str | None:
    if leaf.kind != "lm_head.kernel":
        return None
    embedding_VD = leaf.source["model.embed_tokens.embedding"]
    return "equals the embedding transposed" if _equal(leaf.flax[leaf.path], embedding_VD.T) else None


def _through_float16(leaf: Leaf) -> str | None:
    flax, right = leaf.flax[leaf.path], leaf.source[leaf.path]
    with np.errstate(over="ignore"):
        narrow = right.astype(np.float16).astype(right.dtype)
    if not _equal(flax, narrow):
        return None
    changed = int((bits(flax) != bits(right)).sum())
    infinite = int(np.isinf(flax.astype(np.float32)).sum())
    return f"equals the source after float16: {changed} of {flax.size} values changed, {infinite} are infinite"


def _mixed_rows(leaf: Leaf) -> str | None:
    """Find every output row of a wrong expert among those of all the layer's experts, gate and up together."""
    if not leaf.is_expert:
        return None
    kinds = ("moe.experts.gate", "moe.experts.up") if leaf.kind != "moe.experts.down" else (leaf.kind,)
    siblings = [Leaf(leaf.config, leaf.source, leaf.flax, leaf.sibling(kind)) for kind in kinds]
    known = np.concatenate([row_hashes(kernel) for one in siblings for kernel in one.kernels(leaf.source)])
    rows_EF = np.stack([row_hashes(kernel) for kernel in leaf.kernels(leaf.flax)])
    right_EF = np.stack([row_hashes(kernel) for kernel in leaf.kernels(leaf.source)])
    if np.isin(rows_EF, known).all():
        moved = int((rows_EF != right_EF).sum())
        return f"all {rows_EF.size} rows are rows of this layer's experts, {moved} of them at another place"
    if multiset_hash(leaf.flax[leaf.path]) == multiset_hash(leaf.source[leaf.path]):
        return f"the same {leaf.flax[leaf.path].size} values in another arrangement"
    return None


def _uninitialised(leaf: Leaf) -> str | None:
    if not leaf.is_expert:
        return None
    order = _experts_from(leaf)
    lost = [expert for expert, source in enumerate(order) if source is None]
    kernels, sources = (list(leaf.kernels(leaves)) for leaves in (leaf.flax, leaf.source))
    says = [says for expert in lost if (says := _initial(kernels[expert], sources[expert], leaf.config)) is not None]
    if len(says) != len(lost):
        return None
    return f"experts {lost} of {len(order)} match nothing in the source: {says[0]}"


def _initial(kernel: Array, source: Array, config: MixtralConfig) -> str | None:
    """Say what a kernel looks like that was never loaded: constant, or uncorrelated with what it should be."""
    flat, right = kernel.astype(np.float64).ravel(), source.astype(np.float64).ravel()
    if (flat == flat[0]).all():
        return f"every value is {flat[0]:g}"
    if not np.isfinite(flat).all():
        return None
    correlation = float(np.corrcoef(flat, right)[0, 1])
    if abs(correlation) > CHANCE / flat.size**0.5:
        return None
    return (
        f"standard deviation {flat.std():.3g}, initializer_range {config.initializer_range:g}, correlation with the "
        f"source {correlation:.2g}"
    )


def _lost_head(leaf: Leaf) -> str | None:
    if leaf.kind != "lm_head.kernel":
        return None
    says = _initial(leaf.flax[leaf.path], leaf.source[leaf.path], leaf.config)
    return None if says is None else f"matches nothing in the source: {says}"


ORIGINS = (
    Origin("w1-w3-swapped", "gate for up of the same layer, or up for gate", _partner("w1-w3-swapped")),
    Origin("k-v-swapped", "k for v of the same layer, or v for k", _partner("k-v-swapped")),
    Origin("norms-swapped", "one norm for the other of the same layer", _partner("norms-swapped")),
    Origin("layers-sorted-as-strings", "the same leaf of the layer that text order puts here", _string_sorted_layer),
    Origin("kernel-not-transposed", "the same values read as [out, in]", _not_transposed),
    Origin("rope-rows-permuted", "lanes of q and k heads from halves to neighbours or back", _rope_rows),
    Origin("experts-permuted", "every expert is one of the source's", _permuted_experts),
    Origin("experts-permuted", "every router column is one of the source's", _router_rows),
    Origin("vocab-rows-shifted", "rows of embedding or head shifted", _shifted_rows),
    Origin("lm-head-wrong", "the head is the embedding", _tied_head),
    Origin("weights-through-float16", "a round trip through float16", _through_float16),
    Origin("expert-rows-mixed", "every row, or every value, is one of the source's experts'", _mixed_rows),
    Origin("expert-uninitialised", "wrong experts are constant or uncorrelated with the source", _uninitialised),
    Origin("lm-head-wrong", "the head is constant or uncorrelated with the source", _lost_head),
)
"""Every origin that is tried, in this order: the first that fits is named."""


def _unknown(leaf: Leaf) -> str:
    """Say what is known all the same: another layer, the same values, or how much is changed."""
    flax, right = leaf.flax[leaf.path], leaf.source[leaf.path]
    for layer in range(leaf.config.num_hidden_layers) if leaf.layer is not None else ():
        if layer != leaf.layer and _equal(flax, leaf.source[leaf.sibling(leaf.kind, layer)]):
            return f"equals layer {layer} of the source, in no order that is known"
    changed = int((bits(flax) != bits(right)).sum())
    same = "the same values in another order" if multiset_hash(flax) == multiset_hash(right) else "other values"
    slugs = ", ".join(dict.fromkeys(origin.slug for origin in ORIGINS))
    return f"{changed} of {flax.size} differ, {same}; ruled out: {slugs}"
