"""The destination appears whole or not at all, and a cast says what it loses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert import BadDestination, convert
from convert.casting import CASTS, cast, count_non_finite
from tests.checkpoints import write_checkpoint
from tests.convert.edit import edit_tensors, stored


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "hf")
    return tmp_path / "hf"


def test_dry_run_writes_nothing(hf: Path) -> None:
    report = convert(hf, hf.parent / "flax", dry_run=True)
    assert not report.written
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]
    gate = next(tensor for tensor in report.plan.tensors if tensor.name == "model.layers.1.moe.experts.gate")
    assert gate.sources == tuple(f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in range(5))
    assert (gate.shape, gate.nbytes, gate.piece_bytes) == ((5, 24, 40), 19_200, 3_840)


def test_report_matches_what_is_written(hf: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = convert(hf, hf.parent / "flax", progress=lambda *call: seen.append(call))
    written = stored(hf.parent / "flax")
    assert {t.name: t.shape for t in report.plan.tensors} == {name: tuple(x.shape) for name, x in written.items()}
    assert report.plan.total_bytes == sum(x.nbytes for x in written.values()) == seen[-1][1] == seen[-1][2]
    assert json.loads(json.dumps(report.to_json()))["plan"]["total_bytes"] == report.plan.total_bytes


def test_same_input_gives_the_same_bytes(hf: Path) -> None:
    for name in ("one", "two"):
        convert(hf, hf.parent / name, max_shard_bytes=50_000)
    one, two = ({p.name: p.read_bytes() for p in (hf.parent / name).iterdir()} for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_on_the_way_leaves_everything_as_it_was(error: Any, overwrite: bool, hf: Path) -> None:
    dst = hf.parent / "flax"
    if overwrite:
        convert(hf, dst)
        (dst / "config.json").write_text("{}")

    def fail(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(BadDestination if isinstance(error, OSError) else error):
        convert(hf, dst, overwrite=overwrite, progress=fail)
    left = {".flax.partial"} if error is KeyboardInterrupt else set()  # for --resume, and under no checkpoint's name
    assert {path.name for path in hf.parent.iterdir()} == {"hf", *left, *(["flax"] if overwrite else [])}
    if overwrite:
        assert (dst / "config.json").read_text() == "{}"


def test_full_disk_is_noticed_before_writing(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.destination.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(BadDestination, match=r"needs 240,384 bytes, [15],\d+ are free"):
        convert(hf, hf.parent / "flax")
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]


def test_destination_is_replaced_only_when_allowed(hf: Path) -> None:
    dst = hf.parent / "flax"
    convert(hf, dst)
    with pytest.raises(BadDestination, match="exists already"):
        convert(hf, dst)
    convert(hf, dst, to="hf-fused", overwrite=True)
    assert sorted(path.name for path in dst.glob("*.safetensors")) == ["model.safetensors"]


def test_destination_with_anything_else_in_it_is_never_replaced(hf: Path) -> None:
    dst = hf.parent / "flax"
    dst.mkdir()
    (dst / "thesis.tex").write_text("years of work")
    with pytest.raises(BadDestination, match=r"thesis\.tex"):
        convert(hf, dst, overwrite=True)
    assert (dst / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("where", [".", "inner", "..", "link"])
def test_destination_that_overlaps_the_source(where: str, hf: Path) -> None:
    (hf.parent / "link").symlink_to(hf)
    dst = hf.parent / "link" if where == "link" else hf / where
    with pytest.raises(BadDestination, match="apart from SRC"):
        convert(hf, dst, overwrite=True)
    assert len(list(hf.iterdir())) == 3


def test_destination_under_a_file(hf: Path) -> None:
    (hf.parent / "file").write_text("")
    with pytest.raises(BadDestination, match="cannot be written"):
        convert(hf, hf.parent / "file" / "flax")


def test_parents_are_made(hf: Path) -> None:
    convert(hf, hf.parent / "a" / "b")
    assert [path.name for path in (hf.parent / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_cast_changes_one_key_of_the_config(key: str, hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    config.pop("dtype", None)
    (hf / "config.json").write_text(json.dumps({**config, key: "float32"}))
    convert(hf, hf.parent / "flax", dtype="bfloat16")
    assert json.loads((hf.parent / "flax" / "config.json").read_text()) == {**config, key: "bfloat16"}


def test_cast_is_that_of_torch_and_is_counted(hf: Path) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.tensor([1e30, -1e30, 1e-30, float("nan"), float("inf")] + [1.0] * 19)

    edit_tensors(hf, plant)
    before = stored(hf)
    for dtype in ("float16", "bfloat16", "float32"):
        report = convert(hf, hf.parent / dtype, to="hf-legacy", dtype=dtype)
        after = stored(hf.parent / dtype)
        for name, x in before.items():
            torch.testing.assert_close(after[name], x.to(getattr(torch, dtype)), rtol=0, atol=0, equal_nan=True)
        changed = sum(int((after[n].float() != x).logical_and(~x.isnan()).sum()) for n, x in before.items())
        assert report.loss.changed == changed
        if dtype == "float16":
            norm = report.losses["model.norm.weight"]
            assert (norm.changed, norm.to_infinity, norm.to_zero) == (3, 2, 1)


@pytest.mark.parametrize("source", CASTS)
@pytest.mark.parametrize("target", CASTS)
def test_cast_of_every_sixteen_bit_pattern(source: str, target: str) -> None:
    x = np.arange(2**16, dtype=np.uint16)
    x = x.view(CASTS[source]) if source != "float32" else (x.astype(np.uint32) << 16).view(np.float32)
    y, loss = cast(x, CASTS[target])
    with np.errstate(all="ignore"):
        back = y.astype(CASTS[source])
        assert loss.changed == int((~((back == x) | (np.isnan(back) & np.isnan(x)))).sum())
    assert loss.values == x.size
    assert (loss.changed > 0) == ("float16" in (source, target) and source != target and target != "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_sixteen_bit_pattern_alone_is_finite_or_not(dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        finite = np.isfinite(bits.view(CASTS[dtype]).astype(np.float64))
    counted = [count_non_finite(bits[i : i + 1], CASTS[dtype]) for i in range(len(bits))]
    assert counted == list(~finite)
    assert count_non_finite(bits, CASTS[dtype]) == np.count_nonzero(~finite)


def test_unknown_words_are_refused(hf: Path) -> None:
    with pytest.raises(ValueError, match="no dtype 'int8'"):
        convert(hf, hf.parent / "flax", dtype="int8")
    with pytest.raises(ValueError, match="no layout 'gguf'"):
        convert(hf, hf.parent / "flax", to="gguf")


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float16", "float32"])
def test_values_that_are_no_numbers_are_kept_and_named(dtype: str, hf: Path) -> None:
    assert convert(hf, hf.parent / "before", dtype=dtype).non_finite == {}
    edit_tensors(hf, lambda x: x["lm_head.weight"][3, :4].copy_(torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])))
    report = convert(hf, hf.parent / "flax", dtype=dtype)
    assert report.non_finite == {"lm_head.kernel": 3}
    kept = stored(hf.parent / "flax")["lm_head.kernel"][:4, 3].float()
    torch.testing.assert_close(kept, torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]), equal_nan=True)
