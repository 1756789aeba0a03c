"""Attention in blocks of queries, and products that read their kernel where it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mixtral import attention
from flax_mixtral.attention import attend, visible_keys
from flax_mixtral.config import MixtralConfig
from flax_mixtral.projection import project

B, T, N, K, H = 2, 11, 6, 3, 4


def _inputs() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    mask_BT = jnp.ones((B, T), jnp.int32).at[1, :3].set(0)
    return q, k, v, visible_keys(MixtralConfig(sliding_window=5), (B, T), mask_BT, None)


def _temporary_bytes(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


@pytest.mark.parametrize("queries", [1, 2, 4, 5])
def test_queries_in_blocks_attend_as_all_at_once(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    def total(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed_BTNH = attend(q, k, v, visible)
        return jnp.sum(mixed_BTNH**2), mixed_BTNH

    with_gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (_, at_once), expected = with_gradients(*_inputs())
    monkeypatch.setattr(attention, "QUERIES", queries)
    (_, in_blocks), found = with_gradients(*_inputs())
    np.testing.assert_allclose(in_blocks, at_once, rtol=1e-6, atol=1e-6)
    for gradient, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-5, atol=1e-5)


def test_scores_of_many_queries_are_never_held_at_once() -> None:
    many = 4 * attention.QUERIES
    shapes = [jax.ShapeDtypeStruct((1, many, heads, H), jnp.float32) for heads in (N, K, K)]
    visible = jax.ShapeDtypeStruct((1, many, many), jnp.bool)
    assert _temporary_bytes(jax.jit(attend).lower(*shapes, visible).compile()) < N * many * many * 4


@pytest.mark.parametrize(
    ("equation", "x", "kernel"),
    [
        ("BTNH,NHD->BTD", (1, 1, 16, 64), (16, 64, 512)),
        ("BTD,DNH->BTNH", (1, 1, 512), (512, 16, 64)),
        ("RD,DF->RF", (1, 512), (512, 1024)),
    ],
)
def test_a_kernel_is_multiplied_where_it_lies(equation: str, x: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, kernel)]
    compiled = jax.jit(project, static_argnums=0).lower(equation, *shapes).compile()
    assert _temporary_bytes(compiled) < np.prod(kernel) * 4


@pytest.mark.parametrize(
    ("equation", "x", "kernel"),
    [
        ("BTNH,NHD->BTD", (2, 3, 4, 5), (4, 5, 6)),
        ("BTD,DNH->BTNH", (2, 3, 6), (6, 4, 5)),
        ("BTD,VD->BTV", (2, 3, 6), (7, 6)),
        ("BTKGH,BSKH->BKGTS", (2, 3, 4, 2, 5), (2, 6, 4, 5)),
        ("BKGTS,BSKH->BTKGH", (2, 4, 2, 3, 6), (2, 6, 4, 5)),
    ],
)
def test_a_product_is_what_einsum_makes_of_its_equation(
    equation: str, x: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=shape).astype(np.float32) for shape in (x, kernel)]
    found = project(equation, *map(jnp.asarray, drawn))
    np.testing.assert_allclose(found, np.einsum(equation, *drawn), rtol=1e-5, atol=1e-5)
