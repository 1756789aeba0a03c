"""The oracle against small cases worked out by hand, and against transformers in float32 over every option."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from flax_mixtral.config import HIDDEN_ACTS, MixtralConfig
from parity.oracle import operations as exact
from parity.oracle.activations import ACTIVATIONS
from parity.oracle.model import EXACT, next_token_loss, pooled_tokens
from parity.oracle.rope import inverse_frequencies, rope_tables, rotate_half
from parity.points import block_points
from parity.trace import Array, Batch, Trace, expert_rows
from tests.checkpoints import SIZES
from tests.parity.both_sides import BATCHES, ROPE, Both, both_sides

BETWEEN = {"attn_scores", "attn_probs"}
"""Recorded by torch for the comparison of single operations; a block of the oracle has no use for them."""

SANITY = 1e-5
"""Relative RMS error that float32 explains and a fault of logic does not; the worst measured is 3e-6, in rotation."""


def relative_rms(torch_array: Array, oracle_array: Array) -> float:
    assert torch_array.shape == oracle_array.shape
    error = torch_array.astype(np.float64) - oracle_array
    return float(np.sqrt((error**2).mean() / ((oracle_array**2).mean() or 1)))


# --- by hand --------------------------------------------------------------------------------------------------------


def test_the_lowest_index_wins_among_tied_experts() -> None:
    probs_ME = exact.softmax(np.array([[0.0, 2.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]]))

    np.testing.assert_array_equal(exact.choose(probs_ME, 2), [[1, 3], [0, 1]])


def test_weights_are_the_chosen_probabilities_renormalised() -> None:
    probs_ME = np.array([[0.5, 0.2, 0.3]])

    np.testing.assert_allclose(exact.weigh(np.log(probs_ME), probs_ME, np.array([[2, 1]])), [[0.6, 0.4]])


def test_a_window_of_three_shows_a_query_itself_and_two_keys_before() -> None:
    visible_TS = exact.visible_keys(Batch("b", np.zeros((1, 5), int)), 3)[0].astype(int)

    np.testing.assert_array_equal(
        visible_TS, [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    )


@pytest.mark.parametrize("second", [0, 1, 3], ids=["back", "again", "ahead"])
def test_positions_that_jump_start_a_packed_sequence_unless_there_is_an_attention_mask(second: int) -> None:
    ids_BT, positions_BT = np.zeros((1, 4), int), np.array([[0, 1, second, second + 1]])
    packed = exact.visible_keys(Batch("b", ids_BT, position_ids=positions_BT), None)[0].astype(int)
    masked = exact.visible_keys(Batch("b", ids_BT, np.ones((1, 4), int), positions_BT), None)[0].astype(int)

    np.testing.assert_array_equal(packed, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(masked, np.tri(4))


def test_a_query_that_sees_nothing_attends_to_every_key_alike() -> None:
    visible_BTS = exact.visible_keys(Batch("b", np.zeros((1, 3), int), np.array([[0, 1, 1]])), None)
    weights_TS = exact.attention_softmax(np.log(np.arange(1.0, 10).reshape(1, 1, 3, 3)), visible_BTS)[0, 0]

    np.testing.assert_allclose(weights_TS, [[1 / 3, 1 / 3, 1 / 3], [0.0, 1.0, 0.0], [0.0, 8 / 17, 9 / 17]])


def test_key_heads_are_repeated_not_tiled() -> None:
    x_BSKH = np.array([10.0, 20.0]).reshape(1, 1, 2, 1)

    np.testing.assert_array_equal(exact.repeat_heads(x_BSKH, 6)[0, 0, :, 0], [10, 10, 10, 20, 20, 20])


def test_a_quarter_turn_exchanges_the_halves_of_a_head() -> None:
    cos_BTH, sin_BTH = rope_tables(np.array([np.pi / 2, 0.0]), 1.0, np.array([[0, 1]]))
    rotated_TH = rotate_half(np.tile([1.0, 2.0, 3.0, 4.0], (1, 2, 1, 1)), cos_BTH, sin_BTH)[0, :, 0]

    np.testing.assert_allclose(rotated_TH, [[1, 2, 3, 4], [-3, 2, 1, 4]], atol=1e-15)


def test_the_norm_divides_by_the_root_mean_square() -> None:
    normed = exact.rms_norm(np.array([[[3.0, 4.0]]]), np.array([1.0, 10.0], np.float32), 0.0)

    np.testing.assert_allclose(normed, [[[3 / 12.5**0.5, 40 / 12.5**0.5]]])


def test_an_expert_gets_its_tokens_and_their_weights() -> None:
    x_MD, ids_MA = np.arange(6.0).reshape(3, 2), np.array([[0, 2], [1, 0], [2, 1]])
    rows_R, x_RD, weights_R = exact.dispatch(x_MD, ids_MA, np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]]), 0)
    sum_MD = exact.combine(np.ones((3, 2)), rows_R, weights_R, 10 * x_RD)

    np.testing.assert_array_equal(rows_R, [0, 1])
    np.testing.assert_allclose(sum_MD, [[1, 10], [9, 13], [1, 1]])


def test_a_sequence_is_pooled_at_its_rightmost_token_that_is_no_padding() -> None:
    batch = Batch("b", np.array([[5, 6, 0, 0], [0, 0, 5, 6], [0, 0, 0, 0]]))

    np.testing.assert_array_equal(pooled_tokens(batch, 0), [1, 3, 0])
    np.testing.assert_array_equal(pooled_tokens(batch, None), [3, 3, 3])


def test_the_loss_of_even_logits_is_the_logarithm_of_the_vocabulary() -> None:
    logits_BTV = np.zeros((1, 4, 7))

    assert next_token_loss(logits_BTV, Batch("b", np.array([[1, 2, 3, 4]]))) == pytest.approx(np.log(7))
    assert np.isnan(next_token_loss(logits_BTV, Batch("b", np.array([[1, 2, 3, 4]]), np.array([[1, 0, 0, 0]]))))


def test_what_a_padding_token_predicts_is_no_part_of_the_loss() -> None:
    batch = Batch("b", np.array([[0, 0, 3, 4, 5]]), np.array([[0, 0, 1, 1, 1]]))
    logits_BTV = np.random.default_rng(0).normal(size=(1, 5, 7))
    other_BTV = logits_BTV.copy()
    other_BTV[:, :2] = 9
    other_BTV[0, 1, 3] = -9

    assert next_token_loss(other_BTV, batch) == next_token_loss(logits_BTV, batch)


# --- rope -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [19, 24, 25, 32, 33, 87])
@pytest.mark.parametrize("rope", sorted(ROPE))
def test_inverse_frequencies_are_those_of_transformers(rope: str, length: int) -> None:
    parameters = {"rope_type": rope, **ROPE[rope]}
    theirs = transformers.MixtralConfig(**{**SIZES, "max_position_embeddings": 32, "rope_parameters": parameters})
    config = MixtralConfig.from_hf(theirs.to_dict())
    positions_BT = np.arange(length)[None]
    module = MixtralRotaryEmbedding(theirs)
    torch_cos, torch_sin = module(torch.zeros(1), torch.from_numpy(positions_BT))

    frequencies_P, factor = inverse_frequencies(config, length)
    cos_BTH, sin_BTH = rope_tables(frequencies_P, factor, positions_BT)

    np.testing.assert_allclose(module.inv_freq.numpy(), frequencies_P, rtol=1e-6)
    assert module.attention_scaling == pytest.approx(factor, rel=1e-12)
    np.testing.assert_allclose(torch_cos.numpy(), cos_BTH, atol=2e-5)
    np.testing.assert_allclose(torch_sin.numpy(), sin_BTH, atol=2e-5)


@pytest.mark.parametrize(("rope", "trained"), [("dynamic", 32), ("longrope", 24)])
def test_rope_stretches_only_beyond_the_trained_length(rope: str, trained: int) -> None:
    theirs = {**SIZES, "max_position_embeddings": 32, "rope_parameters": {"rope_type": rope, **ROPE[rope]}}
    config = MixtralConfig.from_hf(transformers.MixtralConfig(**theirs).to_dict())
    short, trained_P, beyond = (inverse_frequencies(config, length)[0] for length in (2, trained, trained + 1))

    np.testing.assert_array_equal(short, trained_P)
    assert (beyond != trained_P).any()


# --- against transformers -------------------------------------------------------------------------------------------


def every_point(both: Both, batch: Batch) -> dict[str, float]:
    """Compare all points of all blocks on torch's input, forced to torch's choice; then head and losses."""
    torch_side, oracle = both.torch(), both.oracle()
    errors: dict[str, float] = {}
    x_BTD = torch_side.embed(batch)
    np.testing.assert_array_equal(x_BTD, oracle.embed(batch))
    router_logits = []
    for layer in range(both.config.num_hidden_layers):
        torch_trace = torch_side.block(layer, x_BTD, batch)
        oracle_trace = oracle.block(layer, x_BTD, batch, torch_trace["router_ids"])
        compare(torch_trace, oracle_trace, f"{layer}.", errors)
        np.testing.assert_array_equal(np.sort(torch_trace["router_ids"]), np.sort(oracle_trace["router_ids"]))
        assert set(torch_trace.arrays) == {name for name, _ in block_points(both.config)} - {"lens"} | BETWEEN
        router_logits.append(torch_trace["router_logits"])
        x_BTD = torch_trace["resid_out"]
    torch_head = torch_side.head(x_BTD, batch)
    compare(torch_head, oracle.head(x_BTD, batch), "", errors)
    if both.config.architecture == "MixtralForCausalLM":
        logits = torch_head["logits"]
        torch_losses = torch_side.losses(logits, router_logits, batch)
        compare(torch_losses, oracle.losses(logits, router_logits, batch), "", errors)
    return errors


def compare(torch_trace: Trace, oracle_trace: Trace, where: str, errors: dict[str, float]) -> None:
    assert set(torch_trace.arrays) - BETWEEN == set(oracle_trace.arrays)
    assert set(torch_trace.rows) == set(oracle_trace.rows)
    for expert, rows in torch_trace.rows.items():
        np.testing.assert_array_equal(rows, oracle_trace.rows[expert])
    for name, exact_array in oracle_trace.arrays.items():
        if name != "router_ids":
            errors[where + name] = relative_rms(torch_trace[name], exact_array)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"rope-{rope}-{batch}": (batch, {"rope": rope}) for rope in ROPE for batch in ("short", "late")},
    "plain": ("plain", {}),
    "left-padded": ("left", {}),
    "left-padded-counted": ("left-counted", {}),
    "right-padded": ("right", {}),
    "packed": ("packed", {}),
    "window": ("plain", {"sliding_window": 8}),
    "window-1": ("plain", {"sliding_window": 1}),
    "window-as-long-as-input": ("plain", {"sliding_window": 37}),
    "window-left-padded": ("left", {"sliding_window": 7}),
    "window-packed": ("packed", {"sliding_window": 7}),
    "longrope-packed": ("packed", {"rope": "longrope"}),
    "heads-not-grouped": ("plain", {"num_key_value_heads": 6}),
    "one-key-head": ("plain", {"num_key_value_heads": 1}),
    "head-dim-null": ("plain", {"head_dim": None}),
    "head-dim-wide": ("plain", {"head_dim": 14}),
    "one-expert": ("plain", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "every-expert": ("left", {"num_local_experts": 4, "num_experts_per_tok": 4}),
    "twelve-experts": ("left", {"num_local_experts": 12, "num_experts_per_tok": 3}),
    "tied": ("plain", {"tie_word_embeddings": True}),
    "eps": ("plain", {"rms_norm_eps": 1e-2}),
    "bare": ("left", {"architecture": "MixtralModel"}),
    "sequence": ("right", {"architecture": "MixtralForSequenceClassification", "pad_token_id": 0, "num_labels": 4}),
    "sequence-left": ("left", {"architecture": "MixtralForSequenceClassification", "pad_token_id": 0}),
    "tokens": ("left", {"architecture": "MixtralForTokenClassification", "num_labels": 3}),
    "answers": ("right", {"architecture": "MixtralForQuestionAnswering"}),
    **{f"act-{name}": ("plain", {"hidden_act": name, "num_hidden_layers": 1}) for name in sorted(HIDDEN_ACTS)},
}
"""Name of the case: the batch, and what differs from the sizes of tests.checkpoints."""


@pytest.mark.parametrize("case", CASES)
def test_transformers_in_float32_is_near_the_oracle(tmp_path: Path, case: str) -> None:
    batch, overrides = CASES[case]
    overrides = {"num_hidden_layers": 2, "max_position_embeddings": 32, **overrides}
    errors = every_point(both_sides(tmp_path / "checkpoint", **overrides), BATCHES[batch])

    assert {name: error for name, error in errors.items() if not error <= SANITY} == {}


def test_the_table_of_activations_is_complete() -> None:
    assert set(ACTIVATIONS) == HIDDEN_ACTS


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both_sides(tmp_path_factory.mktemp("oracle") / "checkpoint", num_hidden_layers=2)


def test_every_point_is_float64_and_finite_even_on_padding(both: Both) -> None:
    oracle, batch = both.oracle(), BATCHES["left"]
    trace = oracle.block(0, oracle.embed(batch).astype(np.float32), batch)

    for name, array in trace.arrays.items():
        assert array.dtype == (np.int64 if name == "router_ids" else np.float64), name
        assert np.isfinite(array).all(), name


def test_in_float32_the_oracle_is_near_itself_in_float64(both: Both) -> None:
    batch = BATCHES["left"]
    x_BTD = both.oracle().embed(batch)
    exact_trace, float32_trace = (
        both.oracle().block(0, x_BTD, batch),
        both.oracle(dtype="float32").block(0, x_BTD, batch),
    )

    for name, array in float32_trace.arrays.items():
        if name != "router_ids":
            assert array.dtype == np.float32, name
            assert relative_rms(array, exact_trace[name]) < SANITY, name


def test_experts_are_recorded_on_their_rows_and_every_token_is_routed(both: Both) -> None:
    oracle, batch = both.oracle(), BATCHES["left"]
    trace = oracle.block(0, oracle.embed(batch), batch)
    rows = expert_rows(trace["router_ids"], batch, both.config.num_local_experts)

    for expert, wanted in enumerate(rows):
        np.testing.assert_array_equal(trace.rows[expert], wanted)
        assert len(trace[f"expert.{expert}.down"]) == len(wanted)
    assert (np.abs(trace["moe_out"]).sum(axis=-1) > 0).all()


def test_a_forced_routing_is_used_and_the_own_choice_still_recorded(both: Both) -> None:
    oracle, batch = both.oracle(), BATCHES["plain"]
    x_BTD = oracle.embed(batch)
    free = oracle.block(0, x_BTD, batch)
    forced_MA = (free["router_ids"] + 1) % both.config.num_local_experts
    forced = oracle.block(0, x_BTD, batch, forced_MA)
    chosen_MA = np.take_along_axis(forced["router_probs"], forced_MA, axis=-1)

    np.testing.assert_array_equal(forced["router_ids"], free["router_ids"])
    np.testing.assert_allclose(forced["router_weights"], chosen_MA / chosen_MA.sum(axis=-1, keepdims=True))
    assert (forced["moe_out"] != free["moe_out"]).any(axis=-1).all()


def test_one_operation_can_be_replaced(both: Both) -> None:
    batch = BATCHES["plain"]
    not_turned = dataclasses.replace(EXACT, rotate=lambda x_BTNH, cos_BTH, sin_BTH: x_BTNH)
    x_BTD = both.oracle().embed(batch)
    right, wrong = both.oracle().block(0, x_BTD, batch), both.oracle(ops=not_turned).block(0, x_BTD, batch)

    np.testing.assert_array_equal(wrong["q"], right["q"])
    np.testing.assert_array_equal(wrong["q_rot"][:, 0], right["q_rot"][:, 0])
    assert (wrong["q_rot"][:, 1:] != right["q_rot"][:, 1:]).any()
