"""A wrong leaf is traced to where it came from; every origin of the table is planted by editing mappings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import Checkpoint
from flax_mixtral.config import MixtralConfig
from parity.diagnosis.leaf_hashes import multiset_hash, row_hashes
from parity.diagnosis.weight_causes import ORIGINS, weight_causes
from parity.trace import Array
from parity.weights import compare_weights
from tests.checkpoints import write_checkpoint

Leaves = dict[str, Array]
LAYER = "model.layers.2."
EXPERTS = LAYER + "moe.experts."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[MixtralConfig, Leaves]]:
    made: dict[str, tuple[MixtralConfig, Leaves]] = {}

    def make(**overrides: Any) -> tuple[MixtralConfig, Leaves]:
        key = repr(overrides)
        if key not in made:
            path = tmp_path_factory.mktemp("weights") / "torch"
            write_checkpoint(path, **{"num_hidden_layers": 12, **overrides})
            source = Checkpoint.open(path)
            made[key] = source.config, dict(source.view("flax"))
        return made[key]

    return make


def found(config: MixtralConfig, source: Leaves, wrong: Leaves) -> list[tuple[str, int | None]]:
    flax = {**source, **wrong}
    differing = [difference.name for difference in compare_weights(source, flax, lambda name: None)[1]]
    causes = weight_causes(config, source, flax, differing)
    assert all(cause.point in differing and cause.evidence for cause in causes)
    return [(cause.fault, cause.layer) for cause in causes]


def exchanged(source: Leaves, one: str, other: str) -> Leaves:
    return {LAYER + one: source[LAYER + other], LAYER + other: source[LAYER + one]}


def neighbours(kernel: Array) -> Array:
    out = np.empty_like(kernel)
    pairs = kernel.shape[-1] // 2
    out[..., 0::2], out[..., 1::2] = kernel[..., :pairs], kernel[..., pairs:]
    return out


def halves(kernel: Array) -> Array:
    return np.concatenate([kernel[..., 0::2], kernel[..., 1::2]], axis=-1)


def rows_interleaved(source: Leaves) -> Leaves:
    fused = np.concatenate([source[EXPERTS + "gate"], source[EXPERTS + "up"]], axis=-1)
    return {EXPERTS + "gate": fused[..., 0::2], EXPERTS + "up": fused[..., 1::2]}


def with_expert(array: Array, expert: int, value: Array | float) -> Array:
    changed = array.copy()
    changed[expert] = value
    return changed


def noise(like: Array, scale: float) -> Array:
    return np.random.default_rng(5).normal(0, scale, like.shape).astype(like.dtype)


def of_layer(source: Leaves, give: Callable[[str], Array], part: str = "") -> Leaves:
    return {name: give(name) for name in source if name.startswith(LAYER + part)}


FAULTS: dict[str, Callable[[Leaves], Leaves]] = {
    "w1-w3-swapped": lambda source: exchanged(source, "moe.experts.gate", "moe.experts.up"),
    "k-v-swapped": lambda source: exchanged(source, "attention.k.kernel", "attention.v.kernel"),
    "norms-swapped": lambda source: exchanged(source, "input_norm.scale", "post_attention_norm.scale"),
    "layers-sorted-as-strings": lambda source: of_layer(source, lambda n: source[n.replace("layers.2.", "layers.10.")]),
    "kernel-not-transposed reshaped": lambda source: {
        LAYER + "attention.q.kernel": source[LAYER + "attention.q.kernel"].reshape(24, 60).T.reshape(24, 6, 10)
    },
    "kernel-not-transposed experts": lambda source: {
        EXPERTS + "down": source[EXPERTS + "down"].transpose(0, 2, 1).reshape(source[EXPERTS + "down"].shape)
    },
    "rope-rows-permuted": lambda source: {
        LAYER + f"attention.{name}.kernel": neighbours(source[LAYER + f"attention.{name}.kernel"]) for name in "qk"
    },
    "rope-rows-permuted back": lambda source: {
        LAYER + "attention.q.kernel": halves(source[LAYER + "attention.q.kernel"])
    },
    "experts-permuted": lambda source: of_layer(source, lambda n: np.roll(source[n], 1, axis=0), "moe.experts"),
    "experts-permuted all one": lambda source: of_layer(source, lambda n: source[n][[1] * 5], "moe.experts"),
    "experts-permuted router": lambda source: {
        LAYER + "moe.router.kernel": source[LAYER + "moe.router.kernel"][:, [1, 0, 2, 4, 3]]
    },
    "expert-rows-mixed": rows_interleaved,
    "expert-rows-mixed two": lambda source: {
        EXPERTS + "gate": source[EXPERTS + "gate"].transpose(0, 2, 1).reshape(40, 5, 24).transpose(1, 2, 0)
    },
    "expert-uninitialised": lambda source: of_layer(
        source, lambda n: with_expert(source[n], 3, noise(source[n][3], 0.02)), "moe.experts"
    ),
    "expert-uninitialised zeros": lambda source: of_layer(
        source, lambda n: with_expert(source[n], 4, 0.0), "moe.experts"
    ),
}
"""Leaves of layer 2 as a fault has them, by slug; what follows the slug tells variants apart."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_layer_is_traced(checkpoint: Callable[..., tuple[MixtralConfig, Leaves]], name: str) -> None:
    config, source = checkpoint()
    assert found(config, source, FAULTS[name](source)) == [(name.split()[0], 2)]


ENDS: dict[str, Callable[[Leaves], Leaves]] = {
    "lm-head-wrong": lambda source: {"lm_head.kernel": source["model.embed_tokens.embedding"].T},
    "lm-head-wrong lost": lambda source: {"lm_head.kernel": noise(source["lm_head.kernel"], 0.02)},
    "lm-head-wrong zeros": lambda source: {"lm_head.kernel": np.zeros_like(source["lm_head.kernel"])},
    "vocab-rows-shifted": lambda source: {
        "model.embed_tokens.embedding": np.roll(source["model.embed_tokens.embedding"], 1, axis=0)
    },
    "vocab-rows-shifted head": lambda source: {"lm_head.kernel": np.roll(source["lm_head.kernel"], -1, axis=1)},
    "vocab-rows-shifted with a new row": lambda source: {
        "lm_head.kernel": np.insert(source["lm_head.kernel"][:, :-1], 0, 0, axis=1)
    },
}


@pytest.mark.parametrize("name", ENDS)
def test_a_wrong_end_is_traced(checkpoint: Callable[..., tuple[MixtralConfig, Leaves]], name: str) -> None:
    config, source = checkpoint()
    assert found(config, source, ENDS[name](source)) == [(name.split()[0], None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float16_on_the_way_is_traced_with_its_overflow(
    checkpoint: Callable[..., tuple[MixtralConfig, Leaves]], dtype: str
) -> None:
    config, source = checkpoint(dtype=dtype)
    source = dict(source)
    kernel = source[LAYER + "attention.o.kernel"].copy()
    kernel.reshape(-1)[[3, 5]] = 7e4, 1e-9
    source[LAYER + "attention.o.kernel"] = kernel
    with np.errstate(over="ignore"):
        wrong = of_layer(source, lambda n: source[n].astype(np.float16).astype(source[n].dtype))
    assert set(found(config, source, wrong)) == {("weights-through-float16", 2)}
    (cause,) = weight_causes(config, source, {**source, **wrong}, [LAYER + "attention.o.kernel"])
    assert "1 are infinite" in cause.evidence


def test_a_square_kernel_left_as_it_lies_is_traced(checkpoint: Callable[..., tuple[MixtralConfig, Leaves]]) -> None:
    config, source = checkpoint(hidden_size=60)
    kernel = source[LAYER + "attention.q.kernel"]
    wrong = {LAYER + "attention.q.kernel": kernel.reshape(60, 60).T.reshape(kernel.shape)}
    assert found(config, source, wrong) == [("kernel-not-transposed", 2)]


def test_another_layer_is_told_although_no_order_explains_it(
    checkpoint: Callable[..., tuple[MixtralConfig, Leaves]],
) -> None:
    config, source = checkpoint()
    wrong = {LAYER + "attention.o.kernel": source["model.layers.5.attention.o.kernel"]}
    (cause,) = weight_causes(config, source, {**source, **wrong}, list(wrong))
    assert cause.fault == "unknown"
    assert "equals layer 5" in cause.evidence


def test_one_flipped_bit_is_unknown_and_says_what_was_ruled_out(
    checkpoint: Callable[..., tuple[MixtralConfig, Leaves]],
) -> None:
    config, source = checkpoint()
    for leaf in ("attention.o.kernel", "moe.experts.up", "input_norm.scale"):
        array = source[LAYER + leaf].copy()
        array.reshape(-1)[7] = np.nextafter(array.reshape(-1)[7], np.float32(9))
        (cause,) = weight_causes(config, source, {**source, LAYER + leaf: array}, [LAYER + leaf])
        assert cause.fault == "unknown"
        assert "1 of " in cause.evidence
        assert "ruled out: w1-w3-swapped" in cause.evidence


def test_equal_weights_have_no_cause(checkpoint: Callable[..., tuple[MixtralConfig, Leaves]]) -> None:
    config, source = checkpoint()
    assert found(config, source, {}) == []


def test_every_origin_is_planted() -> None:
    told = {"weights-through-float16"}
    assert {origin.slug for origin in ORIGINS} == {name.split()[0] for name in (*FAULTS, *ENDS)} | told


def test_hashes_survive_what_they_should_and_nothing_else(tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    order = np.random.default_rng(1).permutation(11)
    np.testing.assert_array_equal(row_hashes(kernel)[order], row_hashes(kernel[:, order]))
    assert multiset_hash(kernel) == multiset_hash(kernel[:, order].T)
    changed = kernel.copy()
    changed[3, 4] = np.nextafter(changed[3, 4], np.float32(9))
    assert list(np.flatnonzero(row_hashes(kernel) != row_hashes(changed))) == [4]
    assert multiset_hash(kernel) != multiset_hash(changed)
