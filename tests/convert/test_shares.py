"""Several processes convert one checkpoint, each its share: one result, that of a single process, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convert import BadDestination, Interrupted, convert
from convert.destination import partial_of
from convert.manifest import Journal
from convert.share import Share
from tests.checkpoints import write_checkpoint
from tests.convert.test_main import invoke
from tests.convert.test_resume import contents, stop_after

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 40_000

# One share in a process of its own; every block takes a moment, so that it can be killed between any two of them.
WORKER = """
import json, sys, time
from convert import convert
from convert.share import Share
report = convert(sys.argv[1], sys.argv[2], share=Share(int(sys.argv[3]), int(sys.argv[4])), max_shard_bytes=40_000,
                 verify_written=True, progress=lambda *_: time.sleep(0.01))
print(json.dumps(report.to_json()))
"""


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "whole", max_shard_bytes=SHARD_BYTES)
    return tmp_path / "hf"


def share_of(hf: Path, number: int, count: int, **options: Any) -> Any:
    options = {"share": Share(number, count), "max_shard_bytes": SHARD_BYTES, **options}
    return convert(hf, hf.parent / "flax", **options)


def start(hf: Path, number: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(hf), str(hf.parent / "flax"), str(number), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def reports(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [json.loads(text) for text in printed]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_at_once_give_the_result_of_one_though_one_is_killed(count: int, hf: Path) -> None:
    dst = hf.parent / "flax"
    running = [start(hf, number, count) for number in range(1, count + 1)]
    own = partial_of(dst) / f".journal-{count}-of-{count}"
    while not own.exists() or own.read_bytes().count(b"\n") < 3:  # within its share
        assert running[-1].poll() is None
        time.sleep(0.001)
    running[-1].send_signal(signal.SIGKILL)
    running.pop().communicate()
    assert not any(report["written"] for report in reports(running))
    assert not dst.exists(), "nothing is there before all of it is"
    (last,) = reports([start(hf, count, count)])
    assert last["written"]
    assert last["verified"]
    assert contents(dst) == contents(hf.parent / "whole")
    assert not partial_of(dst).exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_one_of_those_that_end_finishes(count: int, hf: Path) -> None:
    for _ in range(4):
        found = reports([start(hf, number, count) for number in range(1, count + 1)])
        assert [report["written"] for report in found].count(True) == 1
        assert contents(hf.parent / "flax") == contents(hf.parent / "whole")
        convert(hf, hf.parent / "again", max_shard_bytes=SHARD_BYTES)
        (hf.parent / "flax").rename(hf.parent / f"flax{time.monotonic_ns()}")
        (hf.parent / "again").rename(hf.parent / f"again{time.monotonic_ns()}")


def test_each_share_writes_its_own_files_and_the_last_one_finishes(hf: Path) -> None:
    dst, seen = hf.parent / "flax", list[tuple[int, str]]()
    for number in (3, 1, 2):
        report = share_of(hf, number, 3, progress=lambda name, *_, by=number: seen.append((by, name)))
        assert report.written == dst.exists() == (number == 2)
    assert len(set(seen)) == len({name for _, name in seen}) == 33
    assert {by for by, _ in seen} == {1, 2, 3}
    assert contents(dst) == contents(hf.parent / "whole")
    assert share_of(hf, 1, 3).verified, "a share that begins when all is done has nothing to write"


@pytest.mark.parametrize("count", [None, 3])
def test_what_shares_have_left_others_complete(count: int | None, hf: Path) -> None:
    with pytest.raises(Interrupted):
        share_of(hf, 1, 2, progress=stop_after(0.5))
    if count is None:
        convert(hf, hf.parent / "flax", resume=True, max_shard_bytes=SHARD_BYTES)
    else:
        assert [share_of(hf, number, count).written for number in (1, 2, 3)] == [False, False, True]
    assert contents(hf.parent / "flax") == contents(hf.parent / "whole")


@pytest.mark.parametrize("order", [(3, 2, 1), (1, 2, 3)])
def test_more_shares_than_files(order: tuple[int, ...], hf: Path) -> None:
    written = [share_of(hf, number, 3, max_shard_bytes=10**9).written for number in order]
    assert written == [number == 1 or order[0] == 1 for number in order]


def test_a_share_does_not_take_what_is_there_for_its_own(hf: Path) -> None:
    convert(hf, hf.parent / "flax", to="hf-legacy")
    with pytest.raises(BadDestination, match="exists already"):
        share_of(hf, 1, 3)


def test_a_share_keeps_others_away_and_they_keep_it(hf: Path) -> None:
    share_of(hf, 1, 3)
    left = contents(partial_of(hf.parent / "flax"))
    conversion = json.loads(left[".journal-1-of-3"].splitlines()[0])["conversion"]
    with Journal(partial_of(hf.parent / "flax"), conversion, Share(2, 3)):
        with pytest.raises(BadDestination, match="share 2/3 is writing there"):
            share_of(hf, 2, 3)
        with pytest.raises(BadDestination, match="another conversion is writing there"):
            convert(hf, hf.parent / "flax")
        assert not share_of(hf, 3, 3).written
    with pytest.raises(BadDestination, match="left by another conversion"):
        share_of(hf, 2, 3, dtype="bfloat16")
    assert contents(partial_of(hf.parent / "flax")).items() >= left.items()
    assert share_of(hf, 2, 3).written


def test_the_last_share_verifies_all_of_them(hf: Path) -> None:
    share_of(hf, 1, 2)
    first = sorted(partial_of(hf.parent / "flax").glob("*.safetensors"))[0]
    raw = bytearray(first.read_bytes())
    raw[-5] ^= 1
    first.write_bytes(raw)
    with pytest.raises(BadDestination, match="differs from its source"):
        share_of(hf, 2, 2, verify_written=True)
    assert not (hf.parent / "flax").exists()
    assert not partial_of(hf.parent / "flax").exists()


def test_from_the_command_line(hf: Path) -> None:
    dst = hf.parent / "flax"
    first = invoke(hf, dst, "--share", "2/2")
    assert first.exit_code == 0
    assert "share 2/2: 0 of 1 files written" in first.stdout
    assert not dst.exists()
    assert json.loads(invoke(hf, dst, "--share", "1/2", "--json").stdout)["written"]
    for wrong in ("0/2", "3/2", "2", "a/b"):
        refused = invoke(hf, dst, "--share", wrong)
        assert refused.exit_code == 2
        assert f"'{wrong}' is not I/N with I from 1 to N, as 2/4" in refused.stderr
