"""PyTorch's files are read as torch reads them, without torch; anything but tensors is refused by name."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert import convert
from convert.errors import TensorMismatch, UnreadableCheckpoint
from convert.io.torch_bin import TorchReader
from convert.io.torch_pickle import read_state_dict
from tests.checkpoints import write_checkpoint
from tests.convert.edit import stored

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def test_every_dtype_bit_for_bit(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(-7, 23).reshape(5, 6).to(dtype) for dtype in DTYPES}
    torch.save(tensors, tmp_path / "x.bin")
    reader = TorchReader.open(tmp_path / "x.bin")
    for name, x in tensors.items():
        assert reader[name].tobytes() == x.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert reader[name].shape == reader.headers[name].shape == (5, 6)
        assert not reader[name].flags.writeable


def test_views_of_one_storage(tmp_path: Path) -> None:
    x = torch.arange(60.0).reshape(5, 12)
    tensors = {"whole": x, "turned": x.T, "part": x[1:4, 3:7], "scalar": x[2, 3], "again": x}
    torch.save(tensors, tmp_path / "x.pt")
    reader = TorchReader.open(tmp_path / "x.pt")
    assert np.shares_memory(reader["whole"], reader["turned"])
    for name, value in tensors.items():
        np.testing.assert_array_equal(reader[name], value.numpy())


def test_state_dicts_and_parameters(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    for name, value in (("state", model.state_dict()), ("parameters", OrderedDict(model.named_parameters()))):
        torch.save(value, tmp_path / name)
        assert TorchReader.open(tmp_path / name).headers.keys() == model.state_dict().keys()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_of_bin_files(sharded: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "wanted")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    tensors = stored(tmp_path / "hf")
    if sharded:
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        home = {name: names["layers.1." in name] for name in tensors}
        for file in names:
            torch.save({name: x for name, x in tensors.items() if home[name] == file}, tmp_path / "bin" / file)
        (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": home}))
    else:
        torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    convert(tmp_path / "bin", tmp_path / "flax", verify_written=True)
    file = "flax_model.safetensors"
    assert (tmp_path / "flax" / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()


class Calls:
    """Unpickles by calling what it was given."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


HOSTILE: dict[str, tuple[Any, str]] = {
    "system": ({"w": Calls(os.system, "touch hacked")}, "'posix system'"),
    "eval": ({"w": Calls(eval, "1")}, "'builtins eval'|'__builtin__ eval'"),
    "getattr": ({"w": Calls(getattr, 1, "real")}, "getattr"),
    "numpy": ({"w": np.ones(3)}, "numpy"),
    "a number": ({"w": torch.ones(1), "epoch": 3}, "'epoch' is a int"),
    "nested": ({"model": {"w": torch.ones(1)}}, "'model' is a dict.*state_dict alone"),
    "a list": ([torch.ones(1)], "holds a list"),
    "number keys": ({3: torch.ones(1)}, "no name of a tensor"),
    "a module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear Linear"),
    "quantized": ({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "_rebuild_qtensor"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, "sparse"),
    "conjugated": ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "Complex|conj"),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_anything_but_tensors_is_refused_by_name(
    case: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    value, complaint = HOSTILE[case]
    torch.save(value, tmp_path / "x.bin", pickle_protocol=protocol)
    with pytest.raises(UnreadableCheckpoint, match=complaint) as refusal:
        TorchReader.open(tmp_path / "x.bin")
    assert str(tmp_path / "x.bin") in str(refusal.value)
    assert not (tmp_path / "hacked").exists()


def test_the_format_before_zip_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UnreadableCheckpoint, match=r"before 1\.6 .* save it again"):
        TorchReader.open(tmp_path / "x.bin")


BOMBS: dict[str, bytes] = {
    "many opcodes": b"\x80\x02" + b"}" * 10_000_000 + b".",
    "doubling tuples": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b".",
    "a name that doubles": b"\x80\x04)" + b"q\x00h\x00\x86" * 60 + b"q\x01h\x01\x93.",
    "deep": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "far memo": b"\x80\x02)r\xff\xff\xff\xff.",
    "long number": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "no end": b"\x80\x02}",
    "empty stack": b"\x80\x020.",
    "stop at once": b".",
    "set of nothing": b"\x80\x02}s.",
    "opens itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "no pickle": b"\xff\xfe",
    "nothing": b"",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_do_not_go_off(bomb: str) -> None:
    with pytest.raises(UnreadableCheckpoint) as refusal:
        read_state_dict(BOMBS[bomb], "x.bin")
    assert len(str(refusal.value)) < 300


def rezip(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], **options: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members:
            if (changed := change(name, data)) is not None:
                archive.writestr(*changed)


@pytest.mark.parametrize(
    ("change", "options", "complaint"),
    [
        (lambda n, d: (n, d[:-1]) if "/data/" in n else (n, d), {}, "missing or cut short"),
        (lambda n, d: None if "/data/" in n else (n, d), {}, "missing or cut short"),
        (lambda n, d: None if n.endswith("data.pkl") else (n, d), {}, r"holds no data\.pkl"),
        (lambda n, d: (n, b"big") if n.endswith("byteorder") else (n, d), {}, "big-endian"),
        (lambda n, d: (n, d), {"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    ],
)
def test_zips_that_lie(change: Any, options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100)}, tmp_path / "x.bin")
    rezip(tmp_path / "x.bin", change, **options)
    with pytest.raises(UnreadableCheckpoint, match=complaint):
        TorchReader.open(tmp_path / "x.bin")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated(share: float, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100)}, tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnreadableCheckpoint):
        TorchReader.open(tmp_path / "x.bin")


def test_quantized_weights_are_not_taken_for_floats(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf")
    tensors = {name: x.to(torch.int8) for name, x in stored(tmp_path / "hf").items()}
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(TensorMismatch, match="not floating point"):
        convert(tmp_path / "hf", tmp_path / "flax")


def test_python_would_have_run_it() -> None:
    """The bombs are real: what is refused above, Python's own unpickler runs."""
    assert pickle.loads(pickle.dumps(Calls(len, "four"))) == 4
