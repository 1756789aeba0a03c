"""The model under every transform: each gives what the plain model gives. test_tree_mode.py runs this file again."""

from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

from flax_mixtral import Mixtral
from flax_mixtral.experts import Choice
from parity.metrics import Precision
from parity.trace import Array
from parity.verdict import MARGIN_LIMIT
from tests.flax_mixtral.models import IDS, TINY, Exact, by_path, drawn, exact_answer, forward, margin_of
from tests.flax_mixtral.transforms import GRADIENTS, LOGITS, Row, logits, loss

CONFIG = replace(TINY, attention_dropout=0.25, router_jitter_noise=0.1, router_aux_loss_coef=0.0)


@dataclass(frozen=True)
class Plain:
    """A model and another one, what the first gives without further transforms, and the exact answer."""

    model: Mixtral
    other: Mixtral
    logits: Array
    gradients: dict[str, Array]
    exact: Exact


@cache
def plain(dtype: Precision) -> Plain:
    model, other = (cast(drawn(CONFIG, seed), dtype) for seed in (0, 1))
    exact = exact_answer(model, IDS)
    found = forward(model, IDS)
    for logits_ME, ids_MA in zip(found.router_logits, exact.routing, strict=True):
        # Else a rounding decides which expert a token goes to, and the comparison is of two different models.
        chosen_MA = jax.lax.top_k(logits_ME, CONFIG.num_experts_per_tok)[1]
        np.testing.assert_array_equal(np.sort(chosen_MA), np.sort(ids_MA))
    gradients = compiled(lambda model, _, ids_BT: jax.grad(loss)(model, ids_BT))(model, other, IDS)
    return Plain(model, other, np.asarray(found.logits), by_path(gradients), exact)


def cast(model: Mixtral, dtype: Precision) -> Mixtral:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), model)


def compiled(row: Row) -> Row:
    # What is in question is the program that a transform makes, not how hard the compiler works on it. The lambda gives
    # all of them one name, so that equal programs are compiled once.
    return jax.jit(lambda *inputs: row(*inputs), compiler_options={"xla_backend_optimization_level": 0})


def assert_within_noise(plain: Array, found: Array, exact: Array, dtype: Precision) -> None:
    found_margin = margin_of(plain, found, exact, dtype)
    assert found_margin.value <= MARGIN_LIMIT[dtype], found_margin


DTYPES = pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])


@DTYPES
@pytest.mark.parametrize("transform", LOGITS)
def test_logits_are_the_plain_ones(transform: str, dtype: Precision) -> None:
    p = plain(dtype)
    found_BTV = compiled(LOGITS[transform])(p.model, p.other, IDS)
    assert found_BTV.dtype == p.logits.dtype
    assert_within_noise(p.logits, np.asarray(found_BTV), p.exact.logits, dtype)


@DTYPES
@pytest.mark.parametrize("transform", GRADIENTS)
def test_gradients_are_the_plain_ones(transform: str, dtype: Precision) -> None:
    p = plain(dtype)
    found = by_path(compiled(GRADIENTS[transform])(p.model, p.other, IDS))
    assert found.keys() == p.gradients.keys()
    for path, gradient in found.items():
        assert_within_noise(p.gradients[path], gradient, p.exact.gradients[path], dtype)


@pytest.mark.parametrize(
    ("experts", "dtype"), [("dense", "bfloat16"), pytest.param("blocks", "float32", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("transform", [*LOGITS, *GRADIENTS])
def test_it_traces_to_the_same_shapes_and_dtypes(transform: str, experts: Choice, dtype: Precision) -> None:
    """Costs no compilation: so much of every row in bfloat16, and in tree mode, is in the default run."""
    model = cast(drawn(CONFIG, experts=experts), dtype)
    found = jax.eval_shape((LOGITS | GRADIENTS)[transform], model, model, IDS)
    if transform in LOGITS:
        assert (found.shape, found.dtype) == ((*IDS.shape, CONFIG.vocab_size), dtype)
    else:
        assert jax.tree.map(jnp.shape, nnx.state(found)) == jax.tree.map(jnp.shape, nnx.state(model))


@pytest.mark.slow
@pytest.mark.parametrize("transform", LOGITS)
def test_skipping_experts_gives_the_same(transform: str) -> None:
    p = plain("float32")
    model, other = (drawn(CONFIG, seed, experts="blocks") for seed in (0, 1))
    found_BTV = compiled(LOGITS[transform])(model, other, IDS)
    assert_within_noise(p.logits, np.asarray(found_BTV), p.exact.logits, "float32")


@DTYPES
def test_op_by_op_is_what_jit_gives(dtype: Precision) -> None:
    p = plain(dtype)
    assert_within_noise(p.logits, np.asarray(logits(p.model, IDS)), p.exact.logits, dtype)


def test_eval_shape_builds_no_array() -> None:
    built = nnx.eval_shape(lambda: Mixtral(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(built))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert jax.tree.map(jnp.shape, nnx.state(built)) == jax.tree.map(jnp.shape, nnx.state(drawn(CONFIG)))


def test_gradients_reach_every_parameter() -> None:
    for path, gradient in plain("float32").gradients.items():
        assert np.any(gradient), f"{path} got no gradient"


def test_checkify_reports_a_planted_nan() -> None:
    model = drawn(CONFIG)
    check = jax.jit(checkify.checkify(logits, errors=checkify.nan_checks))
    check(model, IDS)[0].throw()
    scale = model.model.final_norm.scale
    scale[...] = scale[...].at[3].set(jnp.nan)
    with pytest.raises(checkify.JaxRuntimeError, match="nan generated"):
        check(model, IDS)[0].throw()


def test_training_noise_needs_a_key_and_follows_it() -> None:
    model = plain("float32").model
    first, second = (forward(model, IDS, key=jax.random.key(seed)).logits for seed in (0, 1))
    assert not np.allclose(first, plain("float32").logits)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, forward(model, IDS, key=jax.random.key(0)).logits)


def test_the_comparison_sees_a_thousandth_of_one_logit() -> None:
    p = plain("float32")
    planted_BTV = p.logits.copy()
    planted_BTV[1, 2, 3] *= 1.001
    with pytest.raises(AssertionError, match="Margin"):
        assert_within_noise(p.logits, planted_BTV, p.exact.logits, "float32")
