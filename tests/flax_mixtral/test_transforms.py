"""The model under JAX's own transforms, with NNX in graph mode and in tree mode."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_mixtral import Mixtral, MixtralConfig, causal_lm_loss
from tests.flax_mixtral.models import forward

CONFIG = MixtralConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_local_experts=5,
    attention_dropout=0.25,
    router_jitter_noise=0.1,
    initializer_range=0.3,
)
IDS = jnp.arange(14).reshape(2, 7) * 3 % 31


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return nnx.jit(lambda: Mixtral(CONFIG, rngs=nnx.Rngs(0)))()


def logits(model: Mixtral, ids: jax.Array) -> jax.Array:
    found = model(ids).logits
    assert found is not None
    return found


def test_jit_gives_what_op_by_op_gives(model: Mixtral) -> None:
    np.testing.assert_allclose(forward(model, IDS).logits, logits(model, IDS), atol=1e-5)


def test_gradients_are_finite_and_reach_every_parameter(model: Mixtral) -> None:
    def loss(model: Mixtral) -> jax.Array:
        return causal_lm_loss(logits(model, IDS), IDS) + 0.1 * model(IDS).aux_loss

    gradients = nnx.to_flat_state(nnx.state(jax.jit(jax.grad(loss))(model)))
    assert gradients
    for path, gradient in gradients:
        assert np.isfinite(gradient[...]).all(), path
        assert np.any(gradient[...]), f"{path} got no gradient"


def test_vmap_over_rows_is_a_batch(model: Mixtral) -> None:
    rows = jax.jit(jax.vmap(lambda ids: logits(model, ids[None])[0]))(IDS)
    np.testing.assert_allclose(rows, forward(model, IDS).logits, atol=1e-5)


def test_training_noise_needs_a_key_and_follows_it(model: Mixtral) -> None:
    plain = forward(model, IDS).logits
    first, second = (forward(model, IDS, key=jax.random.key(seed)).logits for seed in (0, 1))
    assert not np.allclose(first, plain)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, forward(model, IDS, key=jax.random.key(0)).logits)


def test_tree_mode_passes_the_same_tests() -> None:
    tests = [f"{__file__}::{name}" for name in TREE_MODE]
    environment = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(TREE_MODE)} passed" in done.stdout


TREE_MODE = (
    "test_gradients_are_finite_and_reach_every_parameter",
    "test_vmap_over_rows_is_a_batch",
)
