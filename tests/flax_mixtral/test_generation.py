"""Tokens against transformers' `generate`, and what only ours does: streams, keys, one compilation each."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from flax_mixtral import Mixtral, generate, generation
from flax_mixtral.generation import choose
from tests.flax_mixtral.models import both, ids_and_mask

NEVER = 10_000
"""No token of the small vocabulary."""

ENDS = list(range(0, 101, 7))
"""Of the fixture's configuration; most tests pass their own."""


def tokens_of(torch_model: Any, ids: np.ndarray, mask: np.ndarray, new: int, **named: Any) -> np.ndarray:
    with torch.no_grad():
        found = torch_model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=new,
            do_sample=False,
            **{"eos_token_id": NEVER, "pad_token_id": 0, **named},
        )
    return found.numpy()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Mixtral]:
    torch_model, model = both(tmp_path_factory.mktemp("plain") / "torch", eos_token_id=ENDS)
    assert isinstance(model, Mixtral)
    return torch_model, model


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"sliding_window": 5},
        {"sliding_window": 20},
        {"num_key_value_heads": 1, "head_dim": 34},
        {"tie_word_embeddings": True},
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 20,
        },
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 20,
                "short_factor": [1 + 0.1 * i for i in range(5)],
                "long_factor": [2 + 0.3 * i for i in range(5)],
            }
        },
    ],
    ids=["plain", "window", "window-reached-late", "one-kv-head", "tied", "dynamic", "longrope"],
)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, overrides: dict[str, Any], padding: str) -> None:
    torch_model, model = both(tmp_path / "torch", **overrides)
    assert isinstance(model, Mixtral)
    ids, mask = ids_and_mask(padding)
    found = generate(model, ids, 24, attention_mask=mask, eos_token_id=())
    np.testing.assert_array_equal(found, tokens_of(torch_model, ids, mask, 24))


def test_rows_end_at_any_end_and_are_padded_after(pair: tuple[Any, Mixtral]) -> None:
    torch_model, model = pair
    ids, mask = ids_and_mask()
    free = generate(model, ids, 16, attention_mask=mask, eos_token_id=())[:, ids.shape[1] :]
    ends = [int(free[0, 3]), int(free[1, 6])]
    for pad in (0, ends[0]):
        found = generate(model, ids, 16, attention_mask=mask, eos_token_id=ends, pad_token_id=pad)
        expected = tokens_of(torch_model, ids, mask, 16, eos_token_id=ends, pad_token_id=pad)
        np.testing.assert_array_equal(found, expected)
    everywhere = [int(row[2]) for row in free]
    found = generate(model, ids, 16, attention_mask=mask, eos_token_id=everywhere)
    expected = tokens_of(torch_model, ids, mask, 16, eos_token_id=everywhere, pad_token_id=everywhere[0])
    np.testing.assert_array_equal(found, expected)
    assert found.shape[1] <= ids.shape[1] + 3, "every row has ended"


def test_without_a_mask_padding_is_told_by_its_token(pair: tuple[Any, Mixtral]) -> None:
    _, model = pair
    ids, mask = ids_and_mask()
    found = generate(model, ids, 8, pad_token_id=0, eos_token_id=7)  # padding that also ends a row is not guessed
    masked = generate(model, ids, 8, attention_mask=mask, pad_token_id=0, eos_token_id=7)
    np.testing.assert_array_equal(found, masked)


def test_the_configurations_end_is_the_default(pair: tuple[Any, Mixtral]) -> None:
    _, model = pair
    ids, mask = ids_and_mask()
    found = generate(model, ids, 40, attention_mask=mask)
    np.testing.assert_array_equal(found, generate(model, ids, 40, attention_mask=mask, eos_token_id=ENDS))
    assert found.shape[1] < ids.shape[1] + 40


def compiled_by_generations(model: Mixtral) -> tuple[int, int]:
    """Count the programs for prefill and for decode of three generations that differ in length and sampling alone."""
    programs: tuple[Any, Any] = (generation._prefill, generation._decode)  # whose type does not list what jit adds
    for program in programs:
        program.clear_cache()
    ids, mask = ids_and_mask()
    for new, temperature in ((9, 0.0), (30, 0.0), (9, 0.7)):
        key = jax.random.key(0) if temperature else None
        generate(model, ids, new, attention_mask=mask, temperature=temperature, key=key, eos_token_id=())
    prefill, decode = (program._cache_size() for program in programs)
    return prefill, decode


def test_prefill_and_decode_are_compiled_once_each(pair: tuple[Any, Mixtral]) -> None:
    assert compiled_by_generations(pair[1]) == (1, 1)


def test_a_shape_that_leaks_is_counted(pair: tuple[Any, Mixtral], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SLOTS", 1)  # the cache then is as long as prompt and new tokens together
    assert compiled_by_generations(pair[1]) == (2, 2)


def test_tokens_are_streamed_as_they_come(pair: tuple[Any, Mixtral]) -> None:
    _, model = pair
    ids, mask = ids_and_mask()
    seen: list[np.ndarray] = []
    found = generate(model, ids, 5, attention_mask=mask, stream=seen.append, eos_token_id=())
    np.testing.assert_array_equal(np.stack(seen, axis=1), found[:, ids.shape[1] :])


def test_sampling_follows_its_key(pair: tuple[Any, Mixtral]) -> None:
    _, model = pair
    ids, mask = ids_and_mask()

    def sample(seed: int, **named: Any) -> np.ndarray:
        key = jax.random.key(seed)
        return generate(model, ids, 12, attention_mask=mask, temperature=1.5, key=key, eos_token_id=(), **named)

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()
    greedy = generate(model, ids, 12, attention_mask=mask, eos_token_id=())
    np.testing.assert_array_equal(sample(0, top_k=1), greedy)
    np.testing.assert_array_equal(sample(0, top_p=1e-6), greedy)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.6), (7, 0.8), (50, 0.95)])
def test_sampled_shares_are_the_probabilities_that_transformers_keeps(top_k: int | None, top_p: float | None) -> None:
    logits = np.random.default_rng(2).normal(0, 2, (1, 12)).astype(np.float32)
    kept = torch.from_numpy(logits) / 1.3
    if top_k is not None:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p is not None:
        kept = TopPLogitsWarper(top_p)(None, kept)
    expected = torch.softmax(kept, -1).numpy()[0]
    rows = jnp.tile(jnp.asarray(logits), (20_000, 1))
    drawn = np.asarray(choose(rows, jax.random.key(3), 1.3, top_k=top_k, top_p=top_p))
    shares = np.bincount(drawn, minlength=12) / len(drawn)
    np.testing.assert_array_equal(shares > 0, expected > 0)
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(0.25 / len(drawn)))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": 1.0}, "needs key="),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 3}, "needs a temperature above 0"),
        ({"temperature": 1.0, "key": jax.random.key(0), "top_k": 0, "top_p": 1.5}, "top_k = 0(.|\n)*top_p = 1.5"),
        ({"attention_mask": np.ones((3, 4))}, "shape"),
        ({"attention_mask": ids_and_mask("right")[1]}, r"rows \[0, 1\] end in padding"),
        ({"input_ids": np.zeros((0, 4))}, "input_ids has shape"),
        ({"input_ids": np.zeros(4)}, "input_ids has shape"),
    ],
)
def test_what_has_no_meaning_is_refused(pair: tuple[Any, Mixtral], named: dict[str, Any], message: str) -> None:
    ids, _ = ids_and_mask()
    with pytest.raises(ValueError, match=message):
        generate(pair[1], **{"input_ids": ids, "max_new_tokens": 3, **named})
