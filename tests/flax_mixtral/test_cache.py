"""Prefill and decode with a cache against one forward without."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mixtral import Mixtral, MixtralConfig, RopeConfig, init_cache
from tests.flax_mixtral.models import drawn, forward

CONFIG = MixtralConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_local_experts=3,
)
B, T = 3, 14
IDS = np.random.default_rng(1).integers(0, 31, (B, T))
MASK = np.ones((B, T), np.int64)  # a full row, one padded on the left, one with a hole as well
MASK[1, :4] = MASK[2, :7] = MASK[2, 9] = 0


def build(**overrides: Any) -> Mixtral:
    return drawn(replace(CONFIG, **{"num_hidden_layers": 1 if overrides else 2, **overrides}))


def in_pieces(
    model: Mixtral, pieces: Sequence[int], mask: np.ndarray | None, position: np.ndarray | None, length: int
) -> np.ndarray:
    """Give the logits of calls that take so many tokens each."""
    cache, logits, at = init_cache(model.config, B, length, jnp.float32), [], 0
    for size in pieces:
        cut = np.s_[:, at : at + size]
        output = forward(
            model,
            IDS[cut],
            None if mask is None else mask[cut],
            None if position is None else position[cut],
            cache,
        )
        assert output.logits is not None
        assert output.cache is not None
        logits.append(np.asarray(output.logits))
        cache, at = output.cache, at + size
    assert int(cache.length) == sum(pieces)
    return np.concatenate(logits, axis=1)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 4},
    "head-dim-large": {"head_dim": 34},
    "window": {"sliding_window": 5},
    "window-of-one": {"sliding_window": 1},
    "window-of-the-length": {"sliding_window": T},
    "window-beyond": {"sliding_window": 100},
    "yarn": {"rope": RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_calls_with_a_cache_give_what_one_forward_gives(name: str) -> None:
    model = build(**VARIANTS[name])
    position = np.maximum(np.cumsum(MASK, axis=1) - 1, 0)
    whole = np.asarray(forward(model, IDS, MASK, position).logits)
    real = MASK.astype(bool)
    # A prefill, a second piece that goes around the window's end, and single tokens.
    cached = in_pieces(model, (3, 7, 1, 1, 1, 1), MASK, position, T)
    np.testing.assert_allclose(cached[real], whole[real], rtol=0, atol=1e-5)


def test_a_window_holds_only_the_window() -> None:
    config = replace(CONFIG, sliding_window=5)
    cache = init_cache(config, B, 1000, jnp.bfloat16)
    assert {array.shape for array in (*cache.k_BSKH, *cache.v_BSKH)} == {(B, 5, 2, 6)}
    assert {array.dtype for array in cache.k_BSKH} == {jnp.dtype(jnp.bfloat16)}
    assert init_cache(config, B, 3, jnp.float32).k_BSKH[0].shape[1] == 3


def test_positions_go_on_where_the_cache_ends() -> None:
    model = build()
    found = in_pieces(model, (7, 7), None, None, T + 9)
    np.testing.assert_allclose(found, forward(model, IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_stretching_rope_agrees_where_it_does_not_stretch_yet(rope_type: str) -> None:
    given: dict[str, Any] = {"factor": 2.0}
    if rope_type == "longrope":
        given = {"short_factor": (1.0, 1.1, 1.2), "long_factor": (2.0, 3.0, 4.0)}
        given["original_max_position_embeddings"] = T
    model = build(rope=RopeConfig(rope_type=rope_type, **given), max_position_embeddings=T)
    whole = np.asarray(forward(model, IDS).logits)
    np.testing.assert_allclose(in_pieces(model, (8, *[1] * 6), None, None, T), whole, rtol=0, atol=1e-5)


def test_a_full_cache_refuses_more_outside_jit() -> None:
    model = build()
    cache = init_cache(model.config, B, 4, jnp.float32)
    with pytest.raises(ValueError, match="4 slots, 0 of them taken, and cannot hold 5 more"):
        model(IDS[:, :5], cache=cache)


def test_gradients_flow_through_a_cache() -> None:
    model = build()

    def loss(model: Mixtral) -> jax.Array:
        first = model(IDS[:, :8], cache=init_cache(model.config, B, T, jnp.float32))
        return jnp.sum(jnp.square(model(IDS[:, 8:], cache=first.cache).logits))  # type: ignore[arg-type]

    def whole(model: Mixtral) -> jax.Array:
        return jnp.sum(jnp.square(model(IDS).logits[:, 8:]))  # type: ignore[index]

    found, expected = (jax.tree.leaves(jax.jit(jax.grad(f))(model)) for f in (loss, whole))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
