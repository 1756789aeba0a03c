"""The walk of the torch side against the whole model of transformers, bit for bit."""

from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parity.gradients import training_labels
from parity.metrics import Precision
from parity.sides.torch_hf import RECORDING, Attention, Experts, TorchSide, whole_logits
from parity.trace import Array, Batch, Trace
from tests.parity.both_sides import BATCHES, Both, both_sides


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both_sides(tmp_path_factory.mktemp("torch") / "checkpoint", rope="dynamic", max_position_embeddings=32)


def walk(side: TorchSide, batch: Batch) -> tuple[list[Array], Trace]:
    """Run all blocks: the streams before and after each, and the head's trace."""
    streams = [side.embed(batch)]
    for layer in range(side.config.num_hidden_layers):
        streams.append(side.block(layer, streams[-1], batch)["resid_out"])
    return streams, side.head(streams[-1], batch)


def float32(tensor: torch.Tensor) -> Array:
    return tensor.detach().float().numpy()


@pytest.mark.parametrize("batch", ["plain", "left", "packed"])
@pytest.mark.parametrize("experts", get_args(Experts))
@pytest.mark.parametrize("attention", get_args(Attention))
@pytest.mark.parametrize("dtype", get_args(Precision))
def test_the_walk_is_the_whole_model_bit_for_bit(
    both: Both, dtype: Precision, attention: Attention, experts: Experts, batch: str
) -> None:
    given = BATCHES[batch]
    model = transformers.MixtralForCausalLM.from_pretrained(
        both.path, dtype=getattr(torch, dtype), attn_implementation=attention, experts_implementation=experts
    )
    arrays = (given.input_ids, given.attention_mask, given.position_ids)
    ids, mask, positions = (None if array is None else torch.from_numpy(array) for array in arrays)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True)

    streams, head = walk(both.torch(dtype=dtype, attention=attention, experts=experts), given)

    for stream, hidden in zip(streams[:-1], whole.hidden_states[:-1], strict=True):
        np.testing.assert_array_equal(stream.astype(np.float32), float32(hidden))
    np.testing.assert_array_equal(head["final_norm"].astype(np.float32), float32(whole.hidden_states[-1]))
    np.testing.assert_array_equal(head["logits"].astype(np.float32), float32(whole.logits))


@pytest.mark.parametrize(
    "overrides",
    [
        {"architecture": "MixtralModel"},
        {"architecture": "MixtralForSequenceClassification", "pad_token_id": 0, "num_labels": 4},
        {"architecture": "MixtralForTokenClassification", "num_labels": 3},
        {"architecture": "MixtralForQuestionAnswering"},
        {"tie_word_embeddings": True},
        {"sliding_window": 8, "rope": "longrope"},
    ],
    ids=lambda overrides: "-".join(str(value) for value in overrides.values()),
)
def test_each_head_is_the_whole_models(tmp_path: Path, overrides: dict[str, Any]) -> None:
    both = both_sides(tmp_path / "checkpoint", num_hidden_layers=2, max_position_embeddings=32, **overrides)
    head = walk(both.torch(), BATCHES["left"])[1]

    logits = head["final_norm" if both.config.architecture == "MixtralModel" else "logits"]
    np.testing.assert_array_equal(logits, whole_logits(both.path, BATCHES["left"], "float32", "eager", "grouped_mm"))


def test_losses_are_the_whole_models(both: Both) -> None:
    batch = BATCHES["left"]
    assert batch.attention_mask is not None
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    both.model.set_attn_implementation("eager")
    labels = torch.from_numpy(training_labels(batch))
    with torch.no_grad():
        whole = both.model(ids, attention_mask=mask, labels=labels, output_router_logits=True, use_cache=False)
    losses = both.torch().losses(whole.logits.numpy(), [logits.numpy() for logits in whole.router_logits], batch)

    aux_share = both.config.router_aux_loss_coef * whole.aux_loss
    np.testing.assert_array_equal(losses["aux_loss"], whole.aux_loss.numpy())
    np.testing.assert_allclose(losses["loss"], (whole.loss - aux_share).numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", get_args(Precision))
def test_arrays_have_the_sides_dtype_but_the_routers_which_stay_float32(both: Both, dtype: Precision) -> None:
    side = both.torch(dtype=dtype)
    trace = side.block(0, side.embed(BATCHES["left"]), BATCHES["left"])
    model_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    kept: dict[str, Any] = {"router_probs": np.float32, "router_weights": np.float32, "router_ids": np.int64}

    assert {name: array.dtype for name, array in trace.arrays.items()} == {
        name: np.dtype(kept.get(name, model_dtype)) for name in trace.arrays
    }


def test_recorded_pieces_fit_together(both: Both) -> None:
    side, batch = both.torch(experts="eager"), BATCHES["plain"]
    x_BTD = side.embed(batch)
    trace = side.block(1, x_BTD, batch)
    weights_MA, ids_MA = trace["router_weights"], trace["router_ids"]
    sum_MD = np.zeros((batch.input_ids.size, x_BTD.shape[-1]))
    for expert, rows in trace.rows.items():
        weight_R = np.where(ids_MA == expert, weights_MA, 0).sum(axis=1)[rows]
        sum_MD[rows] += weight_R[:, None] * trace[f"expert.{expert}.down"]

    np.testing.assert_allclose(trace["resid_mid"], x_BTD + trace["attn_out"])
    np.testing.assert_allclose(trace["resid_out"], trace["resid_mid"] + trace["moe_out"])
    np.testing.assert_allclose(trace["moe_out"].reshape(sum_MD.shape), sum_MD, atol=1e-5)
    np.testing.assert_array_equal(trace["q_rot"][:, 0], trace["q"][:, 0])


def test_forcing_the_own_choice_changes_nothing(both: Both) -> None:
    side, batch = both.torch(), BATCHES["left"]
    x_BTD = side.embed(batch)
    free = side.block(0, x_BTD, batch)
    forced = side.block(0, x_BTD, batch, free["router_ids"])

    for name, array in free.arrays.items():
        np.testing.assert_array_equal(forced[name], array, err_msg=name)


def test_a_forced_routing_is_used_and_the_own_choice_still_recorded(both: Both) -> None:
    side, batch = both.torch(), BATCHES["left"]
    x_BTD = side.embed(batch)
    free = side.block(0, x_BTD, batch)
    forced_MA = (free["router_ids"] + 1) % both.config.num_local_experts
    forced, exact = side.block(0, x_BTD, batch, forced_MA), both.oracle().block(0, x_BTD, batch, forced_MA)

    np.testing.assert_array_equal(forced["router_ids"], free["router_ids"])
    np.testing.assert_allclose(forced["router_weights"], exact["router_weights"], rtol=1e-4)
    np.testing.assert_allclose(forced["moe_out"], exact["moe_out"], atol=1e-4)


def test_a_batch_leaves_nothing_behind_for_the_next(both: Both) -> None:
    """The rotary embedding of transformers remembers the longest batch it saw; the side's must not."""
    side = both.torch()
    side.block(0, side.embed(BATCHES["late"]), BATCHES["late"])
    x_BTD = side.embed(BATCHES["plain"])
    after = side.block(0, x_BTD, BATCHES["plain"])
    alone = both.torch().block(0, x_BTD, BATCHES["plain"])

    np.testing.assert_array_equal(after["q_rot"], alone["q_rot"])


def test_global_state_is_as_before_even_after_a_failure(both: Both) -> None:
    threads, batch = torch.get_num_threads(), BATCHES["plain"]
    side = both.torch(threads=1)
    x_BTD = side.embed(batch)
    side.block(0, x_BTD, batch)
    with pytest.raises(RuntimeError):
        side.block(0, x_BTD[..., :-1], batch)

    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert RECORDING not in ALL_ATTENTION_FUNCTIONS
