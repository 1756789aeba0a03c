"""Any layout and container to any other and back, bit for bit, for random configurations."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import Checkpoint, convert, save
from convert.layouts import LAYOUTS
from flax_mixtral.config import MixtralConfig
from flax_mixtral.tree import slots

FORMS = (*((layout, "safetensors") for layout in LAYOUTS), ("flax", "orbax"), ("hf-legacy", "bin"), ("mistral", "bin"))
DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)


@st.composite
def configs(draw: st.DrawFn) -> MixtralConfig:
    key_heads, experts = draw(st.integers(1, 3)), draw(st.integers(1, 11))
    return MixtralConfig(
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 20)),
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 11)),
        num_key_value_heads=key_heads,
        num_attention_heads=key_heads * draw(st.integers(1, 3)),
        head_dim=2 * draw(st.integers(1, 5)),
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        sliding_window=draw(st.none() | st.integers(1, 100)),
    )


def random_leaves(config: MixtralConfig, seed: int, dtype: Any) -> dict[str, np.ndarray]:
    """Any bits at all, NaNs with payloads among them."""
    rng, size = np.random.default_rng(seed), np.dtype(dtype).itemsize
    return {
        slot.path: rng.integers(0, 256, (int(np.prod(slot.shape)), size), np.uint8).view(dtype).reshape(slot.shape)
        for slot in slots(config)
    }


def rewrite(src: Path, dst: Path, form: tuple[str, str]) -> None:
    layout, container = form
    if container == "bin":
        convert(src, dst, to=layout)
        (file,) = dst.glob("*.safetensors")
        view = Checkpoint.open(dst).view(layout)
        codes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        tensors = {
            name: torch.from_numpy(x.view(f"i{x.itemsize}").copy()).view(codes[x.dtype.name])
            for name, x in view.items()
        }
        torch.save(tensors, dst / ("pytorch_model.bin" if layout == "hf-legacy" else "consolidated.00.pth"))
        file.unlink()
    else:
        convert(src, dst, to=layout, container=container)


def leaves(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (x.dtype.name, x.shape, x.tobytes()) for n, x in Checkpoint.open(path).view("flax").items()}


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=configs(),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    forms=st.lists(st.sampled_from(FORMS), min_size=2, max_size=4),
)
def test_a_walk_through_forms_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, config: MixtralConfig, seed: int, dtype: Any, forms: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("pairs")
    save(root / "0", random_leaves(config, seed, dtype), config)
    wanted = leaves(root / "0")
    for i, form in enumerate(forms):
        rewrite(root / str(i), root / str(i + 1), form)
        assert leaves(root / str(i + 1)) == wanted
        config_file = json.loads((root / str(i + 1) / "config.json").read_text())
        assert MixtralConfig.from_hf(config_file) == config


@pytest.mark.parametrize("there", FORMS, ids="-".join)
@pytest.mark.parametrize("back", FORMS, ids="-".join)
def test_every_pair(there: tuple[str, str], back: tuple[str, str], tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=7, hidden_size=6, intermediate_size=5, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, num_local_experts=3,
    )  # fmt: skip
    save(tmp_path / "0", random_leaves(config, 0, ml_dtypes.bfloat16), config)
    for i, form in enumerate((there, back)):
        rewrite(tmp_path / str(i), tmp_path / str(i + 1), form)
    assert leaves(tmp_path / "2") == leaves(tmp_path / "0")
