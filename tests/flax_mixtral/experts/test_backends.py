"""The backends of the experts: against a loop in NumPy float64, against each other, and under transforms."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from flax_mixtral.config import MixtralConfig
from flax_mixtral.experts import BACKENDS, Backend, Kernels, apply_experts, blocks, choose_backend
from flax_mixtral.experts.blocks import block_sizes

D, E, F, A = 6, 5, 8, 2
EMPTY = 2
"""An expert that `routed` gives no token."""

Given = tuple[jax.Array, jax.Array, jax.Array, Kernels]


def routed(M: int) -> np.ndarray:
    """Route M tokens unevenly: all to expert 4, none to expert 2."""
    return np.stack([np.full(M, 4), np.arange(M) * 7 % 4 % 3 + (np.arange(M) * 7 % 4 % 3 == EMPTY)], axis=1)


def given(M: int, dtype: Any = jnp.float32) -> Given:
    rng = np.random.default_rng(M)
    x, *kernels = (jnp.asarray(rng.normal(0, 0.6, shape), dtype) for shape in ((M, D), (E, D, F), (E, D, F), (E, F, D)))
    weights_MA = rng.dirichlet(np.ones(A), M).astype(np.float32)
    return x, jnp.asarray(weights_MA), jnp.asarray(routed(M), jnp.int32), Kernels(*kernels)


def held(kernels: Kernels, backend: Backend) -> Kernels:
    """Give stacked kernels as a backend wants them."""
    return Kernels(*map(tuple, kernels)) if backend == "blocks" else kernels


@pytest.fixture(autouse=True)
def _mesh() -> Iterator[None]:
    """Set a mesh of one device, for `parallel`; see test_mesh.py for more of them."""
    with jax.set_mesh(jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))):
        yield


@partial(jax.jit, static_argnames="backend")
def run(x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, backend: Backend) -> jax.Array:
    return apply_experts(x_MD, weights_MA, ids_MA, held(kernels, backend), "silu", backend)


@partial(jax.jit, static_argnames="backend")
def gradients(
    x_MD: jax.Array, weights_MA: jax.Array, ids_MA: jax.Array, kernels: Kernels, backend: Backend
) -> tuple[jax.Array, jax.Array, Kernels]:
    """Differentiate a sum in which every output has a weight of its own."""
    marks_MD = jnp.cos(jnp.arange(x_MD.size)).reshape(x_MD.shape)

    def total(x_MD: jax.Array, weights_MA: jax.Array, kernels: Kernels) -> jax.Array:
        return jnp.sum(run(x_MD, weights_MA, ids_MA, kernels, backend) * marks_MD)

    return jax.grad(total, argnums=(0, 1, 2))(x_MD, weights_MA, kernels)


def exact(x_MD: Any, weights_MA: Any, ids_MA: Any, kernels: Any) -> np.ndarray:
    x_MD, weights_MA = np.asarray(x_MD, np.float64), np.asarray(weights_MA, np.float64)
    gate, up, down = (np.asarray(kernel, np.float64) for kernel in kernels)
    out_MD = np.zeros_like(x_MD)
    for m, a in np.ndindex(*ids_MA.shape):
        e = int(ids_MA[m, a])
        gate_F = x_MD[m] @ gate[e]
        out_MD[m] += weights_MA[m, a] * (gate_F / (1 + np.exp(-gate_F)) * (x_MD[m] @ up[e]) @ down[e])
    return out_MD


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("M", [1, 3, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_the_exact_ones_but_for_rounding(backend: Backend, M: int, dtype: Any) -> None:
    arrays = given(M, dtype)
    found = run(*arrays, backend=backend)
    assert found.dtype == dtype
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), exact(*arrays), rtol=0, atol=8 * unit)


@pytest.mark.parametrize("M", [1, 20])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "dense"])
def test_gradients_agree(backend: Backend, M: int) -> None:
    arrays = given(M)
    found, expected = (gradients(*arrays, backend=name) for name in (backend, "dense"))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert all(np.any(kernel[4]) and not np.any(kernel[EMPTY]) for kernel in found[2])


@pytest.mark.parametrize("planted", [np.inf, np.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_nobody_uses_may_hold_anything(backend: Backend, planted: float) -> None:
    x_MD, weights_MA, ids_MA, kernels = given(20)
    broken = Kernels(*(jnp.asarray(kernel).at[EMPTY].set(planted) for kernel in kernels))
    for function in (run, gradients):
        clean, found = (
            jax.tree.leaves(function(x_MD, weights_MA, ids_MA, k, backend=backend)) for k in (kernels, broken)
        )
        for one, other in zip(clean, found, strict=True):
            np.testing.assert_array_equal(one, other)
    used = Kernels(*(jnp.asarray(kernel).at[4].set(planted) for kernel in kernels))
    assert not np.isfinite(run(x_MD, weights_MA, ids_MA, used, backend=backend)).any(), "every token uses expert 4"


@pytest.mark.parametrize("backend", ["dense", "blocks"])
def test_one_tokens_overflow_is_its_own(backend: Backend) -> None:
    x_MD, weights_MA, ids_MA, kernels = given(20, jnp.float16)
    others = ids_MA[:, 1] != 1
    loud = Kernels(*(jnp.asarray(kernel).at[1].multiply(3e4) for kernel in kernels))
    found = run(x_MD, weights_MA, ids_MA, loud, backend=backend)
    assert not np.isfinite(found[~others]).all()
    np.testing.assert_array_equal(found[others], run(x_MD, weights_MA, ids_MA, kernels, backend=backend)[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_change_nothing(backend: Backend) -> None:
    x_MD, weights_MA, ids_MA, kernels = given(6)
    plain = run(x_MD, weights_MA, ids_MA, kernels, backend=backend)

    def one(x_D: jax.Array, weights_A: jax.Array, ids_A: jax.Array) -> jax.Array:
        return run(x_D[None], weights_A[None], ids_A[None], kernels, backend=backend)[0]

    def step(carry: None, row: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        return carry, one(*row)

    rows = (x_MD, weights_MA, ids_MA)
    for name, found in {
        "vmap": jax.jit(jax.vmap(one))(*rows),
        "scan": jax.jit(lambda *rows: jax.lax.scan(step, None, rows)[1])(*rows),
    }.items():
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-6, err_msg=name)

    def total(x_MD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(run(x_MD, weights_MA, ids_MA, kernels, backend=backend)))

    gradient_MD = jax.jit(jax.grad(total))(x_MD)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(total)))(x_MD), gradient_MD, rtol=0, atol=1e-6)
    tangent = jax.jit(lambda x_MD: jax.jvp(total, (x_MD,), (x_MD,))[1])(x_MD)
    np.testing.assert_allclose(tangent, jnp.vdot(gradient_MD, x_MD), rtol=1e-5)


def test_the_choice_is_by_the_size_of_an_expert_on_a_cpu() -> None:
    def config(hidden_size: int) -> MixtralConfig:
        return MixtralConfig(hidden_size=hidden_size, num_attention_heads=4, num_key_value_heads=2)

    assert choose_backend("auto", config(1024)) == "blocks"
    assert choose_backend("auto", config(4)) == "dense"
    assert choose_backend("ragged", config(1024)) == "ragged"
    with pytest.raises(ValueError, match="expected one of auto, dense, blocks, ragged"):
        choose_backend("sparse", config(4))  # type: ignore[arg-type]  # what a user may write


def test_calls_outside_jit_compile_an_expert_once() -> None:
    compiled: Any = blocks.one_expert  # whose type does not list what jit adds
    compiled.clear_cache()
    x_MD, weights_MA, ids_MA, kernels = given(20)
    for _ in range(3):
        apply_experts(x_MD, weights_MA, ids_MA, held(kernels, "blocks"), "silu", "blocks")
    before = compiled._cache_size()
    apply_experts(x_MD * 2, weights_MA, ids_MA, held(kernels, "blocks"), "silu", "blocks")
    assert compiled._cache_size() == before == 1, "for all experts of all calls"


def test_blocks_are_of_few_sizes_around_the_average() -> None:
    assert block_sizes(512, 128) == (32, 64, 96, 112, 128, 144, 160, 192, 256)
    assert block_sizes(4096, 1024) == block_sizes(512, 128), "no block is larger"
    assert block_sizes(20, 8.0) == (2, 8, 16), "so that the expert of all tokens above has two blocks"
    assert block_sizes(1, 0.25) == (1,)
