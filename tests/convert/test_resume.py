"""Stopped at any moment and resumed, a conversion gives the bytes of one that was let alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convert import BadDestination, BadInput, Interrupted, convert
from convert.destination import partial_of
from convert.io.safetensors import Reader
from convert.manifest import JOURNAL, Journal
from tests.checkpoints import write_checkpoint
from tests.convert.edit import edit_tensors

ROOT = Path(__file__).resolve().parents[2]

# Every block takes a moment, so that the process can be killed between any two of them.
SLOWLY = """
import sys, time
from convert import convert
convert(sys.argv[1], sys.argv[2], resume=True, max_shard_bytes=100_000, progress=lambda *_: time.sleep(0.004))
"""


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "hf")
    return tmp_path / "hf"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def stop_after(share: float) -> object:
    def stop(name: str, done: int, total: int) -> None:
        if done > share * total:
            raise KeyboardInterrupt

    return stop


def interrupted(hf: Path, dst: Path, share: float = 0.5) -> None:
    with pytest.raises(Interrupted, match="--resume goes on"):
        convert(hf, dst, progress=stop_after(share))  # type: ignore[arg-type]
    assert not dst.exists()


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(kills: int, hf: Path) -> None:
    convert(hf, hf.parent / "whole", max_shard_bytes=100_000)
    wanted = contents(hf.parent / "whole")
    rng = np.random.default_rng(0)
    command = [sys.executable, "-c", SLOWLY, str(hf)]
    for run in range(kills):
        dst = hf.parent / f"run{run}"
        process = subprocess.Popen([*command, str(dst)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        while not partial_of(dst).exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        convert(hf, dst, resume=True, max_shard_bytes=100_000)
        assert contents(dst) == wanted
        assert not partial_of(dst).exists()


def test_only_what_is_missing_is_written(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = hf.parent / "flax"
    interrupted(hf, dst)
    journal = (partial_of(dst) / JOURNAL).read_text().splitlines()
    seen: list[str] = []
    convert(hf, dst, resume=True, progress=lambda name, *_: seen.append(name))
    assert len(journal) > 5
    assert len(set(seen)) == 33
    assert JOURNAL not in contents(dst)


def test_bytes_that_the_disk_lost_are_written_again(hf: Path) -> None:
    dst = hf.parent / "flax"
    convert(hf, hf.parent / "whole")
    interrupted(hf, dst, 0.9)
    file = partial_of(dst) / "flax_model.safetensors"
    data = Reader.open(file).data_offset
    file.write_bytes(file.read_bytes()[:data] + bytes(file.stat().st_size - data))
    convert(hf, dst, resume=True)
    assert contents(dst) == contents(hf.parent / "whole")


def test_a_journal_that_ends_within_a_line(hf: Path) -> None:
    dst = hf.parent / "flax"
    interrupted(hf, dst)
    journal = partial_of(dst) / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    convert(hf, dst, resume=True)
    convert(hf, hf.parent / "whole")
    assert contents(dst) == contents(hf.parent / "whole")


def test_another_conversion_is_not_gone_on_with(hf: Path) -> None:
    dst = hf.parent / "flax"
    interrupted(hf, dst)
    left = contents(partial_of(dst))
    with pytest.raises(BadDestination, match="left by another conversion"):
        convert(hf, dst, dtype="bfloat16", resume=True)
    assert contents(partial_of(dst)) == left
    edit_tensors(hf, lambda x: x.update({"model.norm.weight": x["model.norm.weight"] * 2}))
    with pytest.raises(BadDestination, match="SRC has changed"):
        convert(hf, dst, resume=True)
    convert(hf, dst)
    assert not partial_of(dst).exists()


@pytest.mark.parametrize("resume", [False, True])
def test_two_conversions_at_once(resume: bool, hf: Path) -> None:
    dst = hf.parent / "flax"
    interrupted(hf, dst)
    with Journal(partial_of(dst), None), pytest.raises(BadDestination, match="another conversion is writing"):
        convert(hf, dst, resume=resume)
    convert(hf, dst, resume=True)


def test_killed_between_the_two_renames(hf: Path) -> None:
    dst = hf.parent / "flax"
    convert(hf, dst)
    before = contents(dst)
    dst.rename(hf.parent / ".flax.replaced")
    with pytest.raises(BadDestination, match="exists already"):
        convert(hf, dst)
    assert contents(dst) == before
    (hf.parent / ".flax.replaced").mkdir()
    convert(hf, dst, overwrite=True)
    assert not (hf.parent / ".flax.replaced").exists()


def test_resume_of_what_is_done_verifies_it(hf: Path) -> None:
    dst = hf.parent / "flax"
    convert(hf, dst, resume=True)
    report = convert(hf, dst, resume=True)
    assert report.verified
    edit_tensors(hf, lambda x: x.update({"model.norm.weight": x["model.norm.weight"] * 2}))
    with pytest.raises(BadDestination, match=r"model\.final_norm\.scale differs from its source"):
        convert(hf, dst, resume=True)


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_verify_passes_and_finds_a_flipped_bit(dtype: str, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert(hf, hf.parent / "good", dtype=dtype, verify_written=True).verified

    from convert import execute
    from convert.verify import verify as honest

    def flip_first(checkpoint: object, plan: object, directory: Path) -> None:
        file = directory / "flax_model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-5] ^= 1
        file.write_bytes(raw)
        honest(checkpoint, plan, directory)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "verify", flip_first)
    with pytest.raises(BadInput, match="differs from its source"):
        convert(hf, hf.parent / "bad", dtype=dtype, verify_written=True)
    assert not (hf.parent / "bad").exists()
    assert not partial_of(hf.parent / "bad").exists()
