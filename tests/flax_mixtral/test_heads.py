"""Every head against transformers', and what a forward returns beside the logits."""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_mixtral import ConfigError, Mixtral, MixtralForSequenceClassification, causal_lm_loss
from tests.flax_mixtral.models import both, forward, ids_and_mask

# Float32 noise at logits of size 10; how exact they are is judged by the parity tests.
assert_close = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("MixtralModel", {}),
        ("MixtralForCausalLM", {}),
        ("MixtralForCausalLM", {"tie_word_embeddings": True}),
        ("MixtralForSequenceClassification", {"num_labels": 7, "pad_token_id": 0}),
        ("MixtralForTokenClassification", {"num_labels": 7}),
        ("MixtralForQuestionAnswering", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_every_head_gives_transformers_numbers(
    tmp_path: Path, architecture: str, overrides: dict[str, int | bool], padding: str
) -> None:
    torch_model, model = both(tmp_path / "torch", architecture=architecture, num_hidden_layers=2, **overrides)
    ids, mask = ids_and_mask(padding)
    with torch.no_grad():
        expected = torch_model(
            torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True, output_router_logits=True
        )
    found = forward(model, ids, mask)
    real = mask.astype(bool)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(np.asarray(ours)[real], theirs.numpy()[real])
    if architecture == "MixtralModel":
        assert found.logits is None
    elif architecture == "MixtralForSequenceClassification":
        assert_close(found.logits, expected.logits.numpy())
    elif architecture == "MixtralForQuestionAnswering":
        logits = torch.stack([expected.start_logits, expected.end_logits], -1).numpy()
        assert_close(np.asarray(found.logits)[real], logits[real])
    else:
        assert_close(np.asarray(found.logits)[real], expected.logits.numpy()[real])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_router_logits_and_both_losses(tmp_path: Path, padding: str) -> None:
    torch_model, model = both(tmp_path / "torch")
    ids, mask = ids_and_mask(padding)
    # A row's first token would be predicted from padding, whose hidden state no two attention kernels agree on.
    labels = np.where(mask * np.roll(mask, 1, axis=1), ids, -100)
    with torch.no_grad():
        expected = torch_model(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            labels=torch.from_numpy(labels),
            output_router_logits=True,
        )
    found = forward(model, ids, mask)
    real = mask.reshape(-1).astype(bool)
    for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        assert_close(np.asarray(ours)[real], theirs.numpy()[real])
    assert_close(found.aux_loss, expected.aux_loss.numpy(), atol=2e-6)
    loss = causal_lm_loss(found.logits, jnp.asarray(labels)) + model.config.router_aux_loss_coef * found.aux_loss
    assert_close(loss, expected.loss.numpy())


def test_position_ids_without_a_mask_pack_sequences(tmp_path: Path) -> None:
    torch_model, model = both(tmp_path / "torch", sliding_window=4)
    ids, _ = ids_and_mask("none")
    position = np.tile(np.concatenate([np.arange(6), np.arange(9), [0, 1]]), (3, 1))
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(ids), position_ids=torch.from_numpy(position), use_cache=False).logits
    packed = np.asarray(forward(model, ids, position_ids=position).logits)
    assert_close(packed, expected.numpy())
    alone = np.asarray(forward(model, ids[:, 6:15]).logits)
    assert_close(packed[:, 6:15], alone)


def test_sequence_classification_needs_a_padding_token(tmp_path: Path) -> None:
    _, model = both(tmp_path / "torch", architecture="MixtralForSequenceClassification")
    ids, mask = ids_and_mask("none")
    with pytest.raises(ValueError, match="pad_token_id"):
        model(ids, mask)
    assert forward(model, ids[:1]).logits.shape == (1, 2)


def test_a_checkpoint_of_another_head_is_refused(tmp_path: Path) -> None:
    both(tmp_path / "torch")
    with pytest.raises(ConfigError, match="MixtralForCausalLM"):
        MixtralForSequenceClassification.from_pretrained(tmp_path / "torch")


def test_saved_and_read_again_is_the_same_model(tmp_path: Path) -> None:
    _, model = both(tmp_path / "torch")
    assert isinstance(model, Mixtral)
    model.save_pretrained(tmp_path / "flax")
    ids, mask = ids_and_mask()
    again = Mixtral.from_pretrained(tmp_path / "flax")
    assert again.config == model.config
    np.testing.assert_array_equal(forward(again, ids, mask).logits, forward(model, ids, mask).logits)
