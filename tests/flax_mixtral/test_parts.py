"""Outside jit a part is compiled once for all layers; under a trace nothing stands between."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from flax_mixtral import MixtralConfig, decoder
from flax_mixtral.parts import apply_part
from tests.flax_mixtral.models import drawn, forward

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled() -> Iterator[list[float]]:
    """Seconds of every compilation while the test runs."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


def config(layers: int) -> MixtralConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "head_dim": 10, "vocab_size": 31}
    return MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, num_hidden_layers=layers)  # type: ignore[arg-type]


def test_more_layers_compile_nothing_more(compiled: list[float]) -> None:
    ids = np.arange(7)[None]
    shallow, deep = (drawn(config(layers), experts="blocks") for layers in (1, 4))
    eager, jitted = (np.asarray(run.logits) for run in (shallow(ids), forward(shallow, ids)))
    np.testing.assert_allclose(eager, jitted, rtol=1e-4, atol=1e-4)
    compiled.clear()
    deep(ids)
    # The context, the head and the loss know the configuration, or the number of layers.
    assert len(compiled) == 3
    compiled.clear()
    with mock.patch.object(decoder, "apply_part", lambda part, *args, static=(): part(*args)):
        deep(ids)
    assert len(compiled) > 3, "the count can fail"


def test_under_a_trace_the_part_itself_is_called() -> None:
    seen = []

    def part(x: Any) -> Any:
        seen.append(x)
        return x + 1

    for _ in range(2):
        assert apply_part(part, np.float32(1)) == 2
    assert len(seen) == 1
    for _ in range(2):
        assert jax.jit(lambda x: apply_part(part, x))(np.float32(1)) == 2
    assert len(seen) == 3
