"""Each activation against transformers' own, in float32 and bfloat16."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN

from flax_mixtral.activations import ACTIVATIONS, activate

X = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0, 1e-8, -1e-8, 30.0, -30.0, 88.0, -88.0]]).astype(np.float32)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_it_is_as_close_to_float64_as_torch_is(name: str) -> None:
    exact = ACT2FN[name](torch.from_numpy(X.astype(np.float64))).numpy()
    torch_error = np.abs(ACT2FN[name](torch.from_numpy(X)).numpy() - exact)
    flax_error = np.abs(np.asarray(activate(name, jnp.asarray(X))) - exact)
    one_rounding = np.finfo(np.float32).eps * np.maximum(np.abs(exact), 1)
    assert (flax_error <= np.maximum(10 * torch_error.max(), one_rounding)).all()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_bfloat16_is_computed_in_float32_and_rounded_once(name: str) -> None:
    x = jnp.asarray(X, jnp.bfloat16)
    assert (activate(name, x) == activate(name, x.astype(jnp.float32)).astype(jnp.bfloat16)).all()


def test_only_activations_with_trained_parameters_are_left_out() -> None:
    assert set(ACT2CLS) - set(ACTIVATIONS) == {"prelu", "xielu"}
