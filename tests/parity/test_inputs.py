"""The suites, and what they admit they cannot show."""

import numpy as np
import pytest

from flax_mixtral import MixtralConfig, RopeConfig
from parity.inputs import SUITES, Suite, suite, unexercised

CONFIG = MixtralConfig(vocab_size=101, pad_token_id=0)


@pytest.mark.parametrize("name", SUITES)
def test_rows_are_padded_on_both_sides_and_positions_count_real_tokens(name: Suite) -> None:
    batches = suite(name, CONFIG, seed=0)
    for batch in batches:
        assert batch.attention_mask is not None
        assert batch.position_ids is not None
        real = batch.real_BT
        assert not real.all()
        assert ((batch.input_ids == CONFIG.pad_token_id) == ~real).all()
        for row, positions in zip(real, batch.position_ids, strict=True):
            np.testing.assert_array_equal(positions[row], np.arange(row.sum()))
    assert (batches[0].input_ids < CONFIG.vocab_size).all()


def test_the_seed_decides_the_ids() -> None:
    one, same, other = (suite("quick", CONFIG, seed=seed)[0].input_ids for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_what_no_input_reaches_is_said() -> None:
    windowed = MixtralConfig(sliding_window=4096)
    assert "sliding window" in unexercised(suite("standard", windowed, 0), windowed)[0]
    assert unexercised(suite("long", windowed, 0), windowed) == []
    dynamic = MixtralConfig(rope=RopeConfig(rope_type="dynamic", factor=2.0), max_position_embeddings=600)
    assert "dynamic" in unexercised(suite("standard", dynamic, 0), dynamic)[0]
    assert unexercised(suite("long", dynamic, 0), dynamic) == []
