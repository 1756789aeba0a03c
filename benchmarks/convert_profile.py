"""What converting and loading are made of; run as `python -m benchmarks.convert_profile`.

Prints a Markdown table for each: of converting, one row for each step added to those before, beside `cp` and beside
writing alone; of loading, one row for each stage on the way to the first logits, in a process of its own.
"""

import hashlib
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from numpy.typing import NDArray

import convert.execute
from benchmarks.convert import SHAPES, copy, in_process, write_random
from convert import Checkpoint
from convert.casting import count_non_finite
from convert.checkpoint import View
from convert.io.safetensors import Writer, as_bits
from convert.plan import WORKERS
from convert.transpose import BLOCK_BYTES, blocks, contiguous

CP = "`cp` and fsync"

Step = Callable[[NDArray[Any], NDArray[np.uint8]], None]
"""Takes a block of the source and this thread's buffer."""

LOAD = """
import json, resource, sys, time
import jax.numpy as jnp
import flax_mixtral.heads, convert.checkpoint
from convert import Checkpoint
from flax_mixtral import Mixtral, pretrained
from flax_mixtral.arrays import Mould
rows, now = {}, [time.perf_counter(), time.process_time()]
def lap(name):
    then, now[:] = list(now), [time.perf_counter(), time.process_time()]
    rows[name] = [now[0] - then[0], now[1] - then[1]]
jnp.zeros(1).block_until_ready()
lap("start of JAX")
checkpoint = Checkpoint.open(sys.argv[1])
lap("headers")
mould = Mould(lambda rngs: Mixtral(checkpoint.config, rngs=rngs))
lap("structure")
model = pretrained.read(mould, checkpoint.view("flax"), None)
lap("read into order")
ids = jnp.arange(8)[None]
model(ids).logits.block_until_ready()
lap("first forward of 8 tokens")
model(ids).logits.block_until_ready()
lap("second forward")
print(json.dumps(rows))
"""


def look(block: NDArray[Any], buffer: NDArray[np.uint8]) -> None:
    """Read every byte as it lies."""
    bits = as_bits(block)
    (bits.T if bits.ndim > 1 and bits.strides[0] < bits.strides[-1] else bits).max()


def order(block: NDArray[Any], buffer: NDArray[np.uint8]) -> None:
    """Bring the axes into order."""
    contiguous(block, buffer)


def digest(block: NDArray[Any], buffer: NDArray[np.uint8]) -> None:
    """And hash."""
    hashlib.sha256(contiguous(block, buffer).data).digest()


def count(block: NDArray[Any], buffer: NDArray[np.uint8]) -> None:
    """And look for what is not finite."""
    bits = contiguous(block, buffer)
    hashlib.sha256(bits.data).digest()
    count_non_finite(bits.reshape(-1), block.dtype)


STEPS: dict[str, Step] = {
    "read": look,
    "read, order": order,
    "read, order, hash": digest,
    "read, order, hash, count": count,
}


def passed(view: View, step: Step) -> None:
    """Take every block of every tensor through a step, with as many threads as converting has."""

    def one(name: str) -> None:
        buffer = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
        for piece in view.pieces(name):
            for block in blocks(piece):
                step(block, buffer)
            view.release(name, piece)

    with ThreadPoolExecutor(WORKERS) as workers:
        list(workers.map(one, view))


def written(view: View, path: Path) -> None:
    """Write as many bytes, of one buffer, as converting does."""
    buffer = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), np.uint8)
    tensors = [(name, view.dtype(name), view.shape(name)) for name in view]
    with Writer(path, tensors, "flax") as writer, ThreadPoolExecutor(WORKERS) as workers:

        def one(name: str) -> None:
            nbytes = writer.headers[name].nbytes
            for at in range(0, nbytes, BLOCK_BYTES):
                writer.write(name, at, buffer[: nbytes - at])

        list(workers.map(one, view))
    path.unlink()


def converting(src: Path, work: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name every row and what it measures."""
    view = Checkpoint.open(src).view("flax")
    yield CP, lambda: copy(src, work / "copy")
    yield "write alone, through the page cache", through_the_cache(lambda: written(view, work / "written"))
    yield "write alone, past it", lambda: written(view, work / "written")
    for name, step in STEPS.items():
        yield name, lambda step=step: passed(view, step)  # type: ignore[misc]

    def whole() -> None:
        convert.execute.convert(src, work / "flax")
        shutil.rmtree(work / "flax")

    yield "all, written through the page cache", through_the_cache(whole)
    yield "all: convert", whole


def through_the_cache(run: Callable[[], None]) -> Callable[[], None]:
    """Take direct writes away from what runs."""

    def without() -> None:
        with mock.patch("convert.io.safetensors._open_direct", return_value=None):
            run()

    return without


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Give wall seconds, and seconds of this process on all cores."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def median(pairs: list[tuple[float, float]], column: int) -> float:
    """Give the median of wall (0) or CPU (1) seconds."""
    return statistics.median(pair[column] for pair in pairs)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench-profile"), show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True)
def main(work: Path, repeat: int) -> None:
    """Print what converting and loading 1.6 GB in bfloat16 are made of: medians of runs that take turns."""
    shutil.rmtree(work, ignore_errors=True)
    write_random(work / "hf", SHAPES["1.6 GB"])
    tables: list[dict[str, list[tuple[float, float]]]] = [{}, {}]
    for _ in range(repeat):
        for name, run in converting(work / "hf", work):
            tables[0].setdefault(name, []).append(timed(run))
        for name, pair in in_process(LOAD, work / "hf", JAX_ENABLE_COMPILATION_CACHE="false").items():
            tables[1].setdefault(name, []).append(tuple(pair))
    for title, table in zip(("converting", "loading"), tables, strict=True):
        click.echo(f"\n| {title} | seconds | CPU seconds |\n|---|---|---|")
        for name, pairs in table.items():
            click.echo(f"| {name} | {median(pairs, 0):.2f} | {median(pairs, 1):.2f} |")
    cores = len(os.sched_getaffinity(0))
    cpu = sum(median(tables[0][name], 1) for name in ("read, order, hash, count", "write alone, past it"))
    click.echo(f"\nWork of converting, spread evenly over {cores} processors: {cpu / cores:.2f} seconds")
    click.echo(f"1.25 times `cp` and fsync:                              {1.25 * median(tables[0][CP], 0):.2f} seconds")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
