"""Reader and writer against the safetensors library, bit for bit, and headers that lie."""

import errno
import fcntl
import json
import mmap
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from convert.errors import UnreadableCheckpoint
from convert.io.safetensors import DTYPES, PAGE_BYTES, Reader, Writer
from convert.transpose import contiguous

ALL_BFLOAT16 = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)


def write(path: Path, tensors: dict[str, np.ndarray[Any, Any]], format: str = "pt") -> Path:
    with Writer(path, [(name, x.dtype, x.shape) for name, x in tensors.items()], format) as writer:
        for name, x in tensors.items():
            writer.write(name, 0, contiguous(x).reshape(-1).view(np.uint8))
    return path


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_bfloat16_pattern_survives(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"all": ALL_BFLOAT16, "turned": ALL_BFLOAT16.T})
    ours = Reader.open(path)
    assert ours["all"].tobytes() == ALL_BFLOAT16.tobytes()
    assert ours["turned"].tobytes() == ALL_BFLOAT16.T.tobytes()
    theirs = load_file(path)
    assert theirs["all"].view(torch.uint16).numpy().tobytes() == ALL_BFLOAT16.tobytes()


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**32)),
        min_size=1,
        max_size=6,
    )
)
def test_library_and_ours_read_each_other(tmp_path_factory: pytest.TempPathFactory, drawn: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("st")
    tensors = {}
    for i, (code, shape, seed) in enumerate(drawn):
        nbytes = int(np.prod(shape)) * DTYPES[code].itemsize
        raw = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, nbytes, np.uint8)
        tensors[f"t{i}"] = raw.view(DTYPES[code]).reshape(shape)
    path = write(folder / "ours.safetensors", tensors)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    for name, data in safetensors.deserialize(path.read_bytes()):
        assert bytes(data["data"]) == tensors[name].tobytes()
        assert tuple(data["shape"]) == tensors[name].shape
    reader = Reader.open(path)
    for name, x in tensors.items():
        assert (reader[name].dtype, reader[name].shape) == (x.dtype, x.shape)
        assert reader[name].tobytes() == x.tobytes()
        assert reader.headers[name].start % x.dtype.itemsize == 0
    assert reader.data_offset % 8 == 0


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.int8),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    reader = Reader.open(tmp_path / "x.safetensors")
    assert {name: reader[name].tolist() for name in reader.headers} == {n: x.tolist() for n, x in tensors.items()}


def test_tensors_are_read_only_views(tmp_path: Path) -> None:
    reader = Reader.open(write(tmp_path / "x.safetensors", {"x": np.ones(3, np.float32)}))
    assert not reader["x"].flags.writeable
    assert np.shares_memory(reader["x"], reader["x"])


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {"half": np.ones(3, np.float16), "double": np.ones(3, np.float64)}
    first, second = (write(tmp_path / name, tensors).read_bytes() for name in ("a", "b"))
    assert first == second


def test_a_file_is_gone_on_with_where_it_was_left(tmp_path: Path) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {"half": np.ones(3, np.float16), "double": np.ones(3, np.float64)}
    whole = write(tmp_path / "whole", tensors).read_bytes()
    layout = [(name, x.dtype, x.shape) for name, x in tensors.items()]
    for name, x in tensors.items():
        with Writer(tmp_path / "x", layout, "pt") as writer:
            writer.write(name, 0, x.view(np.uint8))
        assert (tmp_path / "x").stat().st_size == len(whole)
    with Writer(tmp_path / "x", layout, "pt") as writer:
        assert b"".join(writer.read("double")) == tensors["double"].tobytes()
    assert (tmp_path / "x").read_bytes() == whole


def paged_block(rng: np.random.Generator, nbytes: int) -> np.ndarray[Any, Any]:
    block = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    block[:] = rng.integers(0, 256, nbytes)
    return block


@pytest.mark.parametrize("direct", ["as it is", "missing", "refused"])
def test_whole_pages_go_past_the_page_cache_where_they_can(
    direct: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    small, large = rng.integers(0, 256, 999).astype(np.uint8), paged_block(rng, 3 * PAGE_BYTES)
    through: list[int] = []

    def pwrite(file: int, data: Any, offset: int, honest: Any = os.pwrite) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            through.append(len(data))
            if direct == "refused":
                raise OSError(errno.EINVAL, "Invalid argument")
        return int(honest(file, data, offset))

    if direct == "missing":
        monkeypatch.delattr(os, "O_DIRECT")
    else:
        monkeypatch.setattr(os, "pwrite", pwrite)
    with Writer(tmp_path / "x", [("small", small.dtype, small.shape), ("large", large.dtype, large.shape)], "pt") as x:
        x.write("small", 0, small)
        x.write("large", 0, large[: 2 * PAGE_BYTES])
        x.write("large", 2 * PAGE_BYTES, large[2 * PAGE_BYTES :])
    reader = Reader.open(tmp_path / "x")
    assert reader.data_offset % PAGE_BYTES == reader.headers["large"].start == 0
    assert reader["small"].tobytes() == small.tobytes()
    assert reader["large"].tobytes() == large.tobytes()
    assert through == ([] if direct == "missing" else [2 * PAGE_BYTES, PAGE_BYTES])


LIES: dict[str, tuple[Any, bytes, str]] = {
    "not json": (b"{]", b"", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "not an object": (b"[1]", b"", "expected a JSON object"),
    "deep": (b"[" * 100_000, b"", "nested too deeply"),
    "key twice": (b'{"x": {"dtype": "F32"}, "x": 1}', b"", "'x' occurs twice"),
    "unprintable": ({"\x1b[2J": entry()}, bytes(8), "do not print"),
    "lone surrogate": (b'{"\\ud800": 1}', b"", "do not print"),
    "no entry": ({"x": 3}, b"", "'x'"),
    "more keys": ({"x": {**entry(), "y": 1}}, bytes(8), "'x'"),
    "dtype": ({"x": entry("F4")}, bytes(8), "dtype 'F4'"),
    "dtype is a list": ({"x": entry(["F32"])}, bytes(8), "dtype"),
    "shape is negative": ({"x": entry(shape=[-1, -2])}, bytes(8), "not a list of counts"),
    "shape is a truth": ({"x": entry(shape=[True, 2])}, bytes(8), "not a list of counts"),
    "shape is a fraction": ({"x": entry(shape=[2.0])}, bytes(8), "not a list of counts"),
    "shape is huge": ({"x": entry(shape=[2**62, 2**62])}, bytes(8), "data_offsets span"),
    "offsets are three": ({"x": entry(offsets=[0, 4, 8])}, bytes(8), "offsets"),
    "offsets run back": ({"x": entry(offsets=[8, 0])}, bytes(8), "data_offsets span"),
    "wrong size": ({"x": entry(offsets=[0, 4])}, bytes(4), "takes 8 bytes"),
    "overlap": ({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12), "'y'.*overlaps"),
    "gap": ({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20), "'y'.*gap"),
    "truncated": ({"x": entry(), "y": entry(offsets=[8, 16])}, bytes(15), "truncated inside tensor 'y'"),
    "bytes left over": ({"x": entry()}, bytes(9), "1 bytes follow"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused(lie: str, tmp_path: Path) -> None:
    header, data, complaint = LIES[lie]
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UnreadableCheckpoint, match=complaint) as refusal:
        Reader.open(path)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value)) < 700


@pytest.mark.parametrize("content", [b"", b"\x01\x00", (100).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}"])
def test_lying_length_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match="truncated"):
        Reader.open(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableCheckpoint, match="No such file"):
        Reader.open(tmp_path / "x.safetensors")


@given(st.binary(max_size=60), st.integers(0, 200))
def test_mutated_files_never_crash(tmp_path_factory: pytest.TempPathFactory, patch: bytes, at: int) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    whole = write(path, {"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16)}).read_bytes()
    path.write_bytes(whole[:at] + patch + whole[at + len(patch) :])
    try:
        reader = Reader.open(path)
    except UnreadableCheckpoint:
        return
    for name in reader.headers:
        reader[name].sum()
