"""The fixture `scene`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from parity.metrics import Precision
from tests.checkpoints import write_checkpoint
from tests.parity.diagnosis.scenes import LAYER, Scene, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Scene]:
    @cache
    def make(dtype: Precision = "float32", layer: int = LAYER, ties: bool = False, **overrides: Any) -> Scene:
        path = tmp_path_factory.mktemp("scene") / "torch"
        write_checkpoint(path, **{"num_hidden_layers": 12, "sliding_window": 37, **overrides})
        return make_scene(path, dtype, layer, ties)

    return make
