"""Parity of a checkpoint as large as memory; run as `python -m benchmarks.stream`.

Writes a bfloat16 checkpoint with 8x7B's own layer shapes (8 layers: 23 GB) and runs `mixtral-parity run` on it in
float32 and bfloat16. Prints verdict, peak RSS and seconds per block beside those of reading the bytes from disk; then
the peak with fewer layers, and what is made of a fault in one layer. Needs 30 GB of disk.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import ml_dtypes
import numpy as np

from convert.io.safetensors import Writer
from convert.layouts import LAYOUTS
from flax_mixtral.config import MixtralConfig
from parity.faults import FAULTS
from parity.planting import planted
from parity.port import Port
from parity.sides import Side
from parity.trace import Array

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

GAINS = {"q_proj.weight": 1.3, "k_proj.weight": 1.3, "lm_head.weight": 2.5}
"""Standard deviation of a projection's output where it is not 1, as scripts/make_checkpoint.py has it: router logits of
about 1, attention scores that select, logits with a spread."""

FAULT, FAULTY_LAYER = "w1-w3-swapped", 5

POOL = 4_198_403
"""Random values that are repeated; odd, so that no two rows of a tensor begin at the same one."""


def faulty(config: MixtralConfig, weights: Mapping[str, Array]) -> Side:
    """Build flax_mixtral with a fault in one layer, for --flax-side."""
    (fault,) = (row for row in FAULTS if row.slug == FAULT)
    port = planted(fault, FAULTY_LAYER)(Port(config, weights))
    side: Side = port.side(port.config, port.weights)
    return side


def write_random(path: Path, layers: int) -> None:
    """Write a checkpoint as hf-legacy, at scales where faults show."""
    config = MixtralConfig(**SHAPE, num_hidden_layers=layers)
    layout, dtype = LAYOUTS["hf-legacy"], np.dtype(ml_dtypes.bfloat16)
    specs = layout.tensors(config)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(POOL, np.float32)
    pools: dict[float, Array] = {}
    path.mkdir(parents=True)
    with Writer(path / "model.safetensors", [(n, dtype, s.shape) for n, s in specs.items()], layout.format) as writer:
        for name, header in writer.headers.items():
            if name.endswith("norm.weight"):
                values = np.exp(0.25 * noise[: header.shape[0]]).astype(dtype)
                writer.write(name, 0, values.view(np.uint8))
                continue
            gain = next((gain for suffix, gain in GAINS.items() if name.endswith(suffix)), 1.0)
            scale = 1.0 if "embed_tokens" in name else gain / float(np.sqrt(header.shape[-1]))
            if scale not in pools:
                pools[scale] = np.tile((scale * noise).astype(dtype), 2).view(np.uint8)
            first, pool = 2 * int(rng.integers(POOL)), pools[scale]
            for at in range(0, header.nbytes, 2 * POOL):
                writer.write(name, at, pool[first : first + min(2 * POOL, header.nbytes - at)])
    (path / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "bfloat16"}))


class Ran(NamedTuple):
    """One run of the command."""

    result: dict[str, Any]
    seconds: float
    peak_bytes: int


def run(path: Path, *options: str) -> Ran:
    """Run `mixtral-parity run` in a process of its own."""
    report = path.parent / "report"
    command = [sys.executable, "-m", "parity", "run", str(path), "--report", str(report), *options]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1, 4):
        raise click.ClickException(f"{' '.join(command)}: exit code {process.returncode}")
    return Ran(json.loads((report / "result.json").read_text()), seconds, usage.ru_maxrss * 1024)


def read_from_disk(file: Path) -> float:
    """Read a file that the page cache does not hold."""
    with file.open("rb", buffering=0) as raw:
        os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        buffer = bytearray(1 << 24)
        while raw.readinto(buffer):
            pass
    return time.perf_counter() - started


def describe(ran: Ran, walks: int, layers: int, read_seconds: float) -> str:
    worst = max(p["margin"] or 0 for p in ran.result["points"] if p["decides"])
    per_block = ran.seconds / (walks * layers)
    return (
        f"verdict {ran.result['verdict']}, worst margin {worst:.2f}; peak RSS {ran.peak_bytes / 1e9:.2f} GB; "
        f"{ran.seconds:.0f} s, {per_block:.1f} s per block and walk, "
        f"{per_block / (read_seconds / layers):.1f} x reading its bytes from disk"
    )


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench-stream"), show_default=True)
@click.option("--layers", type=click.IntRange(FAULTY_LAYER + 1), default=8, show_default=True)
@click.option("--fewer", type=click.IntRange(1), default=2, show_default=True, help="Layers of the smaller checkpoint.")
@click.option("--suite", default="quick", show_default=True)
@click.option("--only", type=click.Choice(["float32", "bfloat16", "fewer", "fault"]), multiple=True)
@click.option("--keep", is_flag=True, help="Leave the checkpoints where they are, and take those that are there.")
def main(work: Path, layers: int, fewer: int, suite: str, only: tuple[str, ...], keep: bool) -> None:
    """Measure parity of a checkpoint as large as memory."""
    large, small = work / f"layers-{layers}", work / f"layers-{fewer}"
    for path, count in ((large, layers), (small, fewer)):
        if not path.exists() and (count == layers or not only or "fewer" in only):
            write_random(path, count)
    file = large / "model.safetensors"
    read_seconds = read_from_disk(file)
    size = file.stat().st_size / 1e9
    click.echo(
        f"{layers} layers, {size:.1f} GB; read from disk in {read_seconds:.0f} s, {size / read_seconds:.2f} GB/s"
    )
    for dtype, walks in (("float32", 1), ("bfloat16", 2)):
        if not only or dtype in only:
            ran = run(large, "--suite", suite, "--dtype", dtype)
            click.echo(f"{dtype}: {describe(ran, walks, layers, read_seconds)}")
            for point in ran.result["points"]:
                if point["verdict"] == "unchecked":
                    click.echo(f"  {point['mode']} {point['point']}: unchecked, {point['reason']}")
        if not only or "fewer" in only:
            ran = run(small, "--suite", suite, "--dtype", dtype)
            click.echo(f"{dtype}, {fewer} layers: verdict {ran.result['verdict']}, peak {ran.peak_bytes / 1e9:.2f} GB")
        if not only or "fault" in only:
            ran = run(large, "--suite", suite, "--dtype", dtype, "--flax-side", "benchmarks.stream:faulty")
            causes = ", ".join(f"{cause['fault']} in layer {cause['layer']}" for cause in ran.result["causes"])
            click.echo(
                f"{dtype}, {FAULT} in layer {FAULTY_LAYER}: verdict {ran.result['verdict']}, first divergence "
                f"{ran.result['first_divergence']}, cause {causes or 'none'}; peak {ran.peak_bytes / 1e9:.2f} GB"
            )
    if not keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
