"""Linen's Mixtral, and the mistake of google/flax #3665 with its cure, as docs/control-flow.md tells them."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, traverse_util

from flax_mixtral.arrays import arrays_of
from flax_mixtral.experts import Choice
from flax_mixtral.linen import Mixtral
from flax_mixtral.tree import slots
from tests.flax_mixtral.models import IDS, TINY, drawn, forward

MASK = jnp.ones((2, 7), int).at[1, :3].set(0)
PAGE = Path(__file__).parents[2] / "docs" / "control-flow.md"


def page() -> dict[str, Any]:
    """Run the page's code, but for the last block, whose names stand for the reader's own."""
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "linen": linen}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[:-1]:
        exec(block, names)
    return names


@cache
def initial() -> Any:
    return jax.jit(Mixtral(TINY).init)(jax.random.key(0), IDS)


def paths(variables: Any) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(variables["params"], sep=".").items()}


def test_parameters_have_the_paths_and_shapes_of_the_tree() -> None:
    expected = {slot.path: slot.shape for slot in slots(TINY)}
    assert paths(initial()) == expected
    assert paths(jax.eval_shape(Mixtral(TINY).init, jax.random.key(0), IDS)) == expected


@pytest.mark.parametrize("experts", ["dense", "blocks"])
def test_no_leaf_of_init_is_a_tracer(experts: Choice) -> None:
    variables = Mixtral(TINY, experts=experts).init(jax.random.key(0), IDS)
    assert page()["leaked"](variables) == []


def test_apply_is_the_nnx_model() -> None:
    model = drawn(TINY)
    params = traverse_util.unflatten_dict(arrays_of(model), sep=".")
    found = jax.jit(Mixtral(TINY).apply)({"params": params}, IDS, MASK)
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(forward(model, IDS, MASK)), strict=True):
        np.testing.assert_array_equal(ours, plain)


def test_init_draws_as_the_nnx_model_does() -> None:
    params = initial()["params"]
    assert not np.any(params["model"]["final_norm"]["scale"] - 1)
    spread = np.std(params["model"]["layers"]["1"]["moe"]["experts"]["up"])
    assert abs(spread - TINY.initializer_range) < 0.1 * TINY.initializer_range
    assert not np.allclose(params["model"]["layers"]["0"]["moe"]["router"]["kernel"], 0)


def test_a_misshaped_parameter_is_refused() -> None:
    params = {**initial()["params"], "lm_head": {"kernel": jnp.zeros((12, 30))}}
    with pytest.raises(Exception, match="shape"):
        Mixtral(TINY).apply({"params": params}, IDS)


# --- google/flax #3665 ----------------------------------------------------------------------------------------------

X = jnp.linspace(-1, 1, 6 * 4).reshape(6, 4)
CHOSEN = jnp.array([0, 2, 1, 1, 0, 2])


@pytest.mark.parametrize("mistake", ["Mistaken", "MistakenCond"])
def test_the_mistake_is_silent_and_the_tracer_leaves_show_it(mistake: str) -> None:
    variables = page()[mistake](experts=3, width=4).init(jax.random.key(0), X, CHOSEN)
    assert page()["leaked"](variables)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.tree.map(lambda leaf: leaf + 1, variables)


@pytest.mark.parametrize("mistake", ["Mistaken", "MistakenCond"])
def test_every_token_gets_the_same_expert(mistake: str) -> None:
    kernel_EDF = jax.random.normal(jax.random.key(0), (3, 4, 4))
    params = {f"Dense_{number}": {"kernel": kernel_DF} for number, kernel_DF in enumerate(kernel_EDF)}
    found_MF = page()[mistake](experts=3, width=4).apply({"params": params}, X, CHOSEN)
    np.testing.assert_allclose(found_MF, X @ kernel_EDF[0], atol=1e-6)


def test_a_skip_makes_no_parameters_and_linens_cond_refuses_that() -> None:
    class Skipping(linen.Module):
        @linen.compact
        def __call__(self, x_MD: jax.Array) -> Any:
            expert = linen.Dense(4)
            return linen.cond(x_MD.any(), lambda expert, x: expert(x), lambda expert, x: x, expert, x_MD)

    with pytest.raises(TypeError, match="must have the same pytree structure"):
        Skipping().init(jax.random.key(0), X)


def test_a_python_list_cannot_be_indexed_by_a_traced_number() -> None:
    with pytest.raises(jax.errors.TracerIntegerConversionError):
        jax.lax.scan(lambda x, number: (x, [1, 2, 3][number]), 0, jnp.arange(3))


@pytest.mark.parametrize("cure", ["Cured", "CuredCond"])
def test_the_cure_gives_each_token_its_own_expert(cure: str) -> None:
    module = page()[cure](experts=3, width=4)
    variables = module.init(jax.random.key(0), X, CHOSEN)
    assert page()["leaked"](variables) == []
    kernel_EDF = variables["params"]["kernel"]
    expected_MF = jnp.stack([x_D @ kernel_EDF[e] for x_D, e in zip(X, CHOSEN, strict=True)])
    np.testing.assert_allclose(module.apply(variables, X, CHOSEN), expected_MF, rtol=1e-6)


def test_a_module_s_call_lies_outside_of_control_flow_even_under_transforms() -> None:
    module: Any = Mixtral(TINY)
    variables = initial()

    def step(total: jax.Array, ids_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_TV = module.apply(variables, ids_T[None]).logits[0]
        return total + logits_TV.sum(), logits_TV

    _, logits_BTV = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(()), IDS))()
    plain_BTV = jax.jit(module.apply)(variables, IDS).logits
    np.testing.assert_allclose(logits_BTV, plain_BTV, atol=1e-6)
