"""Tensors in memory: the view's values, mapped where the file has them in order, and taken over by JAX as they lie."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from convert import Checkpoint, convert
from convert.casting import CASTS, cast
from convert.memory import CACHE_LINE_BYTES, InMemory
from flax_mixtral import Mixtral
from flax_mixtral.arrays import Mould
from tests.checkpoints import write_checkpoint

PAGED: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 3,
    "num_hidden_layers": 2,
}
"""Sizes of which all but the norms and the router fill whole pages."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in three layouts."""
    root = tmp_path_factory.mktemp("memory")
    write_checkpoint(root / "hf-legacy", **PAGED)
    for layout in ("flax", "mistral"):
        convert(root / "hf-legacy", root / layout, to=layout)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("layout", ["hf-legacy", "flax", "mistral"])
def test_values_are_the_views(
    layout: str, dtype: str | None, paths: dict[str, Path], threads: ThreadPoolExecutor
) -> None:
    view = Checkpoint.open(paths[layout]).view("flax")
    held = InMemory(view, CASTS.get(dtype or "keep"), threads)
    assert list(held) == list(view)
    for name, array in held.items():
        wanted = view[name] if dtype is None else cast(view[name], CASTS[dtype])[0]
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        assert array.tobytes() == np.ascontiguousarray(wanted).tobytes()
        assert array.flags.c_contiguous
        assert array.ctypes.data % CACHE_LINE_BYTES == 0


def test_what_lies_in_order_is_mapped_and_taken_over(paths: dict[str, Path], threads: ThreadPoolExecutor) -> None:
    view = Checkpoint.open(paths["flax"]).view("flax")
    held = InMemory(view, None, threads)
    mapped = {name for name, array in held.items() if not array.flags.writeable}
    assert len(mapped) == len(held), "the layout flax keeps every tensor on a cache line"
    model = Mould(lambda rngs: Mixtral(view.checkpoint.config, rngs=rngs, experts="blocks")).fill(held, alias=True)
    stored, gate = held["model.layers.1.moe.experts.gate"], model.model.layers[1].moe.experts.gate
    assert isinstance(gate, nnx.List)
    for expert, kernel in enumerate(gate):
        assert kernel[...].unsafe_buffer_pointer() == stored[expert].ctypes.data


def test_a_mapped_model_may_be_donated(paths: dict[str, Path]) -> None:
    before = (paths["flax"] / "flax_model.safetensors").read_bytes()
    state = nnx.state(Mixtral.from_pretrained(paths["flax"]))
    doubled = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2, state), donate_argnums=0)(state)
    again = nnx.state(Mixtral.from_pretrained(paths["flax"]))
    for twice, once in zip(jax.tree.leaves(doubled), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(twice, 2 * np.asarray(once))
    assert (paths["flax"] / "flax_model.safetensors").read_bytes() == before


def test_filling_reads_every_tensor_once(paths: dict[str, Path]) -> None:
    view = Checkpoint.open(paths["hf-legacy"]).view("flax")
    read: list[str] = []

    class Noted(Mapping[str, NDArray[Any]]):
        """A mapping that reads on access, as a view does; its `in` reads, too."""

        def __getitem__(self, name: str) -> NDArray[Any]:
            read.append(name)
            return view[name]

        def __iter__(self) -> Iterator[str]:
            return iter(view)

        def __len__(self) -> int:
            return len(view)

    Mould(lambda rngs: Mixtral(view.checkpoint.config, rngs=rngs)).fill(Noted())
    assert sorted(read) == sorted(view)
