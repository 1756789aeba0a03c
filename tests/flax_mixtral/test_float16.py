"""The whole model in float16 on a CPU, loading included: as exact as transformers' is on the same weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from flax_mixtral import Mixtral, causal_lm_loss, generate
from flax_mixtral.arrays import arrays_of
from flax_mixtral.experts import Backend
from parity.verdict import MARGIN_LIMIT
from tests.flax_mixtral.models import both, ids_and_mask

IDS, _ = ids_and_mask("none")
Found = dict[str, Any]

LIMIT = MARGIN_LIMIT["bfloat16"]
"""Times transformers' error: what a comparison allows in the other half precision."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float16") / "torch"
    both(path, dtype="float16", num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def exact(folder: Path) -> Found:
    return logits_and_gradients(Mixtral.from_pretrained(folder, dtype=jnp.float32, experts="dense"))


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    model: Any = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float16)
    ids = torch.from_numpy(IDS)
    output = model(ids, labels=ids)
    output.loss.backward()
    # Written as if they were the parameters, their gradients come back in our tree.
    for parameter in model.parameters():
        parameter.data = parameter.grad
    path = tmp_path_factory.mktemp("gradients") / "torch"
    model.save_pretrained(path)
    return {"logits": output.logits.detach().numpy(), **arrays_of(Mixtral.from_pretrained(path))}


def logits_and_gradients(model: Mixtral) -> Found:
    @jax.jit
    def run(model: Mixtral) -> tuple[Mixtral, jax.Array]:
        def loss(model: Mixtral) -> tuple[jax.Array, jax.Array]:
            logits_BTV = model(IDS).logits
            assert logits_BTV is not None
            return causal_lm_loss(logits_BTV, jnp.asarray(IDS)), logits_BTV

        return jax.grad(loss, has_aux=True)(model)

    gradients, logits_BTV = run(model)
    return {"logits": logits_BTV, **arrays_of(gradients)}


def error(found: Any, exact: Any) -> float:
    """Give the root mean square of the error, as a share of what is exact."""
    wide = np.asarray(exact, np.float64)
    return float(np.sqrt(np.mean((np.asarray(found, np.float64) - wide) ** 2) / np.mean(wide**2)))


def test_loading_keeps_or_widens_it(folder: Path) -> None:
    kept, widened = (arrays_of(Mixtral.from_pretrained(folder, dtype=dtype)) for dtype in (None, jnp.float32))
    for name, array in kept.items():
        assert array.dtype == jnp.float16
        np.testing.assert_array_equal(array, widened[name])


@pytest.mark.parametrize(
    "experts", ["blocks", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "ragged"))]
)
def test_logits_and_gradients_are_as_exact_as_transformers(
    folder: Path, exact: Found, theirs: Found, experts: Backend
) -> None:
    found = logits_and_gradients(Mixtral.from_pretrained(folder, experts=experts))
    ratios = {name: error(found[name], exact[name]) / error(theirs[name], exact[name]) for name in exact}
    assert all(array.dtype == jnp.float16 for array in found.values())
    assert max(ratios.values()) < LIMIT, ratios


@pytest.mark.slow
def test_three_digits_less_are_seen(folder: Path, exact: Found, theirs: Found) -> None:
    found = logits_and_gradients(Mixtral.from_pretrained(folder, dtype=jnp.bfloat16))
    ratios = [error(found[name], exact[name]) / error(theirs[name], exact[name]) for name in exact]
    assert min(ratios) > LIMIT


def test_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    ids, mask = ids_and_mask()
    found = generate(Mixtral.from_pretrained(folder), ids, 12, attention_mask=mask, eos_token_id=())
    model: Any = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float16)
    expected = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=10_000,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(found, expected.numpy())
