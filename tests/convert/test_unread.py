"""Tensors in memory: the view's values, mapped where the file has them in order, and taken over by JAX as they lie."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from convert import Checkpoint, convert
from convert.casting import CASTS, cast
from convert.unread import Unread
from flax_mixtral import Mixtral
from flax_mixtral.arrays import Mould
from tests.checkpoints import write_checkpoint
from tests.convert.edit import edit_tensors, stored

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


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("layout", ["hf-legacy", "flax", "mistral"])
def test_what_was_unread_has_the_views_values(layout: str, dtype: str | None, paths: dict[str, Path]) -> None:
    view = Checkpoint.open(paths[layout]).view("flax")
    for name in view:
        unread = Unread(view, name, None if dtype is None else CASTS[dtype])
        wanted = view[name] if dtype is None else cast(view[name], CASTS[dtype])[0]
        experts = {e: unread[e] for e in range(PAGED["num_local_experts"]) if ".experts." in name}
        for part, values in [(unread, wanted), *((one, wanted[e]) for e, one in experts.items())]:
            with part.read() as read:
                assert (read.dtype, read.shape, part.shape) == (values.dtype, values.shape, values.shape)
                assert read.tobytes() == values.tobytes()


def test_a_stack_of_several_dtypes_can_be_cast(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **PAGED)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    narrow = stored(tmp_path)[name].half()
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: narrow}))
    stacked = Unread(Checkpoint.open(tmp_path).view("flax"), "model.layers.1.moe.experts.gate", CASTS["float32"])
    with stacked.read() as read:
        np.testing.assert_array_equal(read[2], narrow.T.float().numpy())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
@pytest.mark.parametrize("mesh", [None, jax.sharding.Mesh(jax.devices()[:1], ("expert",))], ids=["alone", "mesh"])
def test_what_lies_in_order_is_taken_over_as_it_is_mapped(
    mesh: jax.sharding.Mesh | None, paths: dict[str, Path]
) -> None:
    for layout, where in (("flax", "flax_model.safetensors"), ("hf-legacy", "")):
        arrays = jax.tree.leaves(nnx.state(Mixtral.from_pretrained(paths[layout], mesh=mesh)))
        assert {mapped_file(array) for array in arrays if array.ndim > 2} == {where}


def mapped_file(array: jax.Array) -> str:
    """Name the file whose pages an array's memory is; "" where it is nobody's."""
    address = array.addressable_data(0).unsafe_buffer_pointer()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return Path(path).name if path.startswith("/") else ""
    raise AssertionError(f"{address:x} is not mapped")


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
