"""Models for the tests here, what one gives exactly, and how far another one may be from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from convert import Checkpoint
from flax_mixtral import MODELS, Mixtral, MixtralConfig, MixtralOutput
from flax_mixtral.arrays import Mould, arrays_of
from flax_mixtral.experts import Choice
from flax_mixtral.heads import Model
from flax_mixtral.tree import slots
from parity.gradients import training_labels
from parity.metrics import UNIT_ROUNDOFF, Margin, Precision, margin
from parity.oracle.model import Oracle
from parity.trace import Array, Batch
from tests.checkpoints import write_checkpoint

__all__ = ["IDS", "TINY", "Exact", "both", "by_path", "drawn", "exact_answer", "forward", "ids_and_mask", "margin_of"]

TINY = MixtralConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_local_experts=5,
)
IDS = jnp.arange(14).reshape(2, 7) * 3 % TINY.vocab_size


@jax.jit
def forward(model: Model, *inputs: Any, **named: Any) -> MixtralOutput:
    """Call the model under jit: op by op, most of a small model's time is compiling single operations."""
    return model(*inputs, **named)


def both(path: Path, **overrides: Any) -> tuple[transformers.PreTrainedModel, Model]:
    """Write a checkpoint, and give transformers' model and ours of it."""
    torch_model = write_checkpoint(path, **overrides)
    config = MixtralConfig.from_hf(torch_model.config.to_dict() | {"architectures": [type(torch_model).__name__]})
    return torch_model, MODELS[config.architecture].from_pretrained(path)


def ids_and_mask(padding: str = "left", vocabulary: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Give three rows of 17 tokens, two of them padded with 0, and their mask."""
    mask = np.ones((3, 17), np.int64)
    if padding == "left":
        mask[0, :4] = mask[1, :11] = 0
    elif padding == "right":
        mask[0, -4:] = mask[1, -11:] = 0
    ids = np.random.default_rng(5).integers(1, vocabulary, mask.shape)
    return ids * mask, mask


def drawn(config: MixtralConfig, seed: int = 0, experts: Choice = "auto") -> Mixtral:
    """Build a model with NumPy's random numbers: compiling JAX's, one program per shape, takes many seconds."""
    rng = np.random.default_rng(seed)
    arrays = {slot.path: rng.normal(0, 0.3, slot.shape).astype(np.float32) for slot in slots(config)}
    return Mould(lambda rngs: Mixtral(config, rngs=rngs, experts=experts)).fill(arrays)


class Exact(NamedTuple):
    """What a model gives in float64: logits, the gradient of its loss by every leaf, and each layer's experts."""

    logits: Array
    gradients: dict[str, Array]
    routing: Sequence[Array]


def exact_answer(model: Mixtral, ids_BT: Any) -> Exact:
    """Ask the oracle, on the model's own parameters."""
    arrays = {path: np.asarray(array) for path, array in arrays_of(model).items()}
    oracle = Oracle(model.config, Checkpoint.of_arrays(model.config, arrays).view("hf-legacy"))
    batch = Batch("plain", np.asarray(ids_BT))
    x_BTD = oracle.embed(batch)
    for layer in range(model.config.num_hidden_layers):
        x_BTD = oracle.block(layer, x_BTD, batch)["resid_out"]
    found = oracle.gradients(batch, training_labels(batch))
    by_leaf = Checkpoint.of_arrays(model.config, found.parameters).view("flax")
    return Exact(oracle.head(x_BTD, batch)["logits"], dict(by_leaf), found.routing)


def by_path(tree: Any) -> dict[str, Array]:
    """Give a module's or a state's parameters by their dotted paths."""
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(tree))}


def margin_of(plain: Array, found: Array, exact: Array, dtype: Precision) -> Margin:
    """Hold a result to the harness's rule: as close to the exact answer as the plain one, but for its limit."""
    assert found.shape == plain.shape
    plain_RC, found_RC, exact_RC = (array.reshape(-1, array.shape[-1]) for array in (plain, found, exact))
    return margin(plain_RC, found_RC, exact_RC, UNIT_ROUNDOFF[dtype])
