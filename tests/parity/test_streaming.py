"""A checkpoint larger than the memory that there is: walked within a hard limit, which loading it whole breaks."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks import stream
from convert import Checkpoint
from flax_mixtral.config import MixtralConfig
from parity.pages import LARGE, Pages
from parity.read_ahead import ReadAhead
from parity.sides.flax import FlaxSide
from parity.sides.offered import Nothing
from parity.trace import Array, Batch
from parity.walk import Sides, Walk
from parity.weights import AsStored, Rounded
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]

CONFIG = MixtralConfig(
    vocab_size=1009,
    hidden_size=512,
    intermediate_size=2304,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=4,
    num_experts_per_tok=2,
    num_hidden_layers=8,
)
"""122 million parameters in eight blocks."""

ROOM_BYTES = 420_000_000
"""What a run may take beyond the libraries, of which compiling takes most: less than the model in float32 (490 MB)."""

LIMITED = """
import resource, sys
import jax, torch
from parity import runner
from parity.__main__ import main
from parity.sides import torch_hf

jax.numpy.ones((9, 9)) @ jax.numpy.ones((9, 9)), torch.ones(9, 9) @ torch.ones(9, 9)  # libraries and threads are there
with open("/proc/self/status") as status:
    (held,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
most = held + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
main()
"""
"""Private memory is what is limited: mapping a file takes none."""


def loads_everything(config: MixtralConfig, weights: Mapping[str, Array]) -> FlaxSide:
    """Build Flax's side as one that does not stream."""
    return FlaxSide(config, dict(weights))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streaming") / "mixtral"
    stream.write_random(path, CONFIG)
    stream.write_ids(path.parent / "ids.json", CONFIG)
    return path


def run_limited(checkpoint: Path, dtype: str, *options: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """Run `mixtral-parity run` in a process with little memory; give result.json and how it ended."""
    command = [sys.executable, "-c", LIMITED, str(ROOM_BYTES), "run", str(checkpoint), "--dtype", dtype, "--json"]
    command += ["--input-ids", str(checkpoint.parent / "ids.json"), *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    return json.loads(done.stdout) if done.stdout else {}, done


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
class TestWithinALimit:
    @pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
    def test_a_walk_holds_one_block_a_side(self, checkpoint: Path, dtype: str) -> None:
        result, done = run_limited(checkpoint, dtype)
        assert done.returncode == 0, done.stderr[-2000:]
        assert result["verdict"] == "pass"
        unchecked = {(point["mode"], point["point"]) for point in result["points"] if point["verdict"] == "unchecked"}
        assert unchecked == {("reference", "logits"), ("whole", "logits")}
        reasons = [point["reason"] for point in result["points"] if point["verdict"] == "unchecked"]
        assert all("parameters" in reason and "available" in reason for reason in reasons), reasons

    def test_loading_the_model_whole_breaks_the_limit(self, checkpoint: Path) -> None:
        result, done = run_limited(checkpoint, "float32", "--flax-side", f"{__name__}:{loads_everything.__name__}")
        assert not result
        assert done.returncode != 0
        assert "Cannot allocate memory" in done.stderr or "MemoryError" in done.stderr, done.stderr[-2000:]

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_fault_is_found_placed_and_named(self, checkpoint: Path, dtype: str) -> None:
        result, done = run_limited(checkpoint, dtype, "--flax-side", "benchmarks.stream:faulty")
        assert done.returncode == 1, done.stderr[-2000:]
        assert result["first_divergence"]["layer"] == stream.FAULTY_LAYER
        assert result["causes"][0]["fault"] == stream.FAULT
        assert result["causes"][0]["layer"] == stream.FAULTY_LAYER


def test_memory_is_taken_again_and_never_twice() -> None:
    pages, dtype = Pages(), np.dtype(np.float32)
    rng = np.random.default_rng(0)
    held: list[tuple[Array, float]] = []
    for turn in range(200):
        shape = (int(rng.integers(1, 6)), LARGE // 8)  # from half of what is kept to two and a half times that
        array = pages.take(shape, dtype)
        assert array.ctypes.data % 64 == 0
        array[...] = turn
        held.append((array[:, 1:], float(turn)))  # a view alone keeps the memory
        del array
        if len(held) > 4:
            held.pop(int(rng.integers(len(held))))
        assert all((view == value).all() for view, value in held)
    held.clear()
    gc.collect()
    first = pages.take((2, LARGE), dtype)
    address = first.ctypes.data
    del first
    assert pages.take((2, LARGE), dtype).ctypes.data == address
    pages.give_back()


def test_every_block_finds_the_memory_of_the_one_before() -> None:
    V, D, F, E = 32000, 4096 // 4, 14336 // 4, 8  # 8x7B's, with 16 times less in a matrix; nothing is touched
    torch = (D * D, D * D // 4, D * D // 4, D * D, E * 2 * F * D, E * F * D)
    flax = (D * D // 4, D * D, D * D, D * D // 4, E * F * D, E * F * D, E * F * D)
    pages, head, layers = Pages(), V * D, list[set[int]]()
    held = None
    for _ in range(4):
        places = set[int]()
        for sizes in (torch, (head,), flax):
            arrays = [pages.take((size,), np.dtype(np.float32)) for size in sizes]
            places |= {array.ctypes.data for array in arrays if array.nbytes >= LARGE}
            del arrays
        held = pages.take((head,), np.dtype(np.float32)) if held is None else held
        layers.append(places)
    assert layers[1] == layers[2] == layers[3]


@pytest.mark.parametrize("layout", ["hf-legacy", "hf-fused"])
def test_what_rounding_leaves_alone_comes_as_it_is_stored(tmp_path: Path, layout: str) -> None:
    write_checkpoint(tmp_path / "float32", layout=layout)
    source = Checkpoint.open(tmp_path / "float32")
    view = source.view("hf-legacy")
    for dtype in ("float32", "bfloat16"):
        stored, rounded = AsStored(view, dtype), Rounded(view, dtype)
        for name in view:
            np.testing.assert_array_equal(stored[name].astype(np.float64), rounded[name].astype(np.float64))
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    assert np.shares_memory(AsStored(view, "float32")[name], view[name])
    assert AsStored(view, "bfloat16")[name].dtype == ml_dtypes.bfloat16


def test_the_next_block_is_read_while_this_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "mixtral")
    source = Checkpoint.open(tmp_path / "mixtral")
    steps: list[str | int] = []
    nobody = [Nothing(name) for name in ("torch", "flax", "oracle")]
    batch = Batch("ids", np.arange(7)[None])
    walk = Walk(source.config, Sides(*nobody), [batch], dtype="float32", advance=steps.append, read_ahead=steps.append)
    list(walk.run())
    assert steps == [0, "embedding", "block 0", 1, "block 1", 2, "block 2", 3, "head"]

    asked, all_asked = set[int](), Event()
    view = source.view("hf-fused")
    names = [name for name in view if ".layers.1." in name]
    expected = {source.stored(stored).ctypes.data for name in names for stored in view.sources(name)}

    def will_need(self: Checkpoint, array: Array) -> None:
        asked.add(array.ctypes.data)
        if asked == expected:
            all_asked.set()

    monkeypatch.setattr(Checkpoint, "will_need", will_need)
    with ReadAhead([source.view("flax"), view]) as read_ahead:
        read_ahead(1)
        assert all_asked.wait(60), asked
    assert asked == expected
