"""Views: every layout of one checkpoint in memory, tensor by tensor, and copied only where it must be."""

from pathlib import Path

import numpy as np
import pytest

from convert import Checkpoint, TensorMismatch, convert
from convert.layouts import LAYOUTS
from tests.checkpoints import write_checkpoint
from tests.convert.edit import edit_tensors, stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("views")
    write_checkpoint(path / "hf-legacy", num_local_experts=11, num_hidden_layers=2)
    for to in ("hf-fused", "flax", "mistral", "mistral-stacked"):
        convert(path / "hf-legacy", path / to, to=to)
    return path


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_a_view_is_what_a_conversion_writes(source: str, to: str, folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / source)
    assert checkpoint.layout == source
    view = checkpoint.view(to)
    wanted = {name: x.numpy() for name, x in stored(folder / to).items()}
    assert view.keys() == wanted.keys()
    assert len(view) == len(wanted)
    for name, array in view.items():
        np.testing.assert_array_equal(array, wanted[name])
        assert (array.shape, array.dtype) == (view.shape(name), view.dtype(name))
        assert b"".join(piece.tobytes() for piece in view.pieces(name)) == wanted[name].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stored_tensor_is_not_copied(layout: str, folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / layout)
    for name, array in checkpoint.view(layout).items():
        assert np.shares_memory(array, checkpoint.stored(name))
        assert not array.flags.writeable


def test_pieces_of_a_stacked_leaf_are_views(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / "hf-legacy")
    pieces = list(checkpoint.view("flax").pieces("model.layers.1.moe.experts.gate"))
    assert [piece.shape for piece in pieces] == [(24, 40)] * 11
    w1 = checkpoint.stored("model.layers.1.block_sparse_moe.experts.10.w1.weight")
    assert np.shares_memory(pieces[10], w1)


def test_order_is_by_number(folder: Path) -> None:
    names = list(Checkpoint.open(folder / "flax").view("hf-legacy"))
    w1 = [name for name in names if name.startswith("model.layers.1.") and name.endswith("w1.weight")]
    assert [int(name.split(".")[5]) for name in w1] == list(range(11))


def test_config_is_kept_as_it_is(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / "flax")
    assert checkpoint.raw_config["num_local_experts"] == checkpoint.config.num_local_experts == 11


def test_unknown_layout_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no layout 'gguf'"):
        Checkpoint.open(folder / "flax").view("gguf")


def test_experts_of_two_dtypes_are_not_stacked_silently(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", dtype="bfloat16")
    odd = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    edit_tensors(tmp_path / "hf", lambda x: x.update({odd: x[odd].float()}))
    name = "model.layers.1.moe.experts.gate"
    with pytest.raises(
        TensorMismatch, match=rf"{name}.*different dtypes.*{odd}".replace(".", r"\.").replace(r"\.*", ".*")
    ):
        Checkpoint.open(tmp_path / "hf").view("flax")[name]
    with pytest.raises(TensorMismatch, match="cannot be written as flax"):
        convert(tmp_path / "hf", tmp_path / "flax")
    assert not (tmp_path / "flax").exists()
    convert(tmp_path / "hf", tmp_path / "flax", dtype="float32")
    assert stored(tmp_path / "flax")[name].numpy()[3].tolist() == stored(tmp_path / "hf")[odd].numpy().T.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_of_one_expert_keeps_its_axis(layout: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", num_local_experts=1, num_experts_per_tok=1)
    view = Checkpoint.open(tmp_path / "hf").view(layout)
    assert {name: view[name].shape for name in view} == {name: view.shape(name) for name in view}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_in_memory_are_seen_in_every_layout(layout: str, folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / layout)
    arrays = {name: 2 * array.astype(np.float64) for name, array in checkpoint.view(layout).items()}
    again = Checkpoint.of_arrays(checkpoint.config, arrays)

    assert again.layout == layout
    for other in LAYOUTS:
        for name, array in again.view(other).items():
            np.testing.assert_array_equal(array, 2 * checkpoint.view(other)[name].astype(np.float64))


def test_arrays_in_memory_that_do_not_fit_are_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / "flax")
    arrays = dict(checkpoint.view("flax"))
    del arrays["model.final_norm.scale"]

    with pytest.raises(TensorMismatch, match=r"gradients: .*\n.*missing:\n.*final_norm"):
        Checkpoint.of_arrays(checkpoint.config, arrays, "gradients")
