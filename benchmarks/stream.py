"""Parity of a checkpoint as large as memory; run as `python -m benchmarks.stream`.

Writes a bfloat16 checkpoint with 8x7B's own layer shapes (8 layers: 23.7 GB) and runs `mixtral-parity run` on it in
float32 and bfloat16, in a process that may take no more private memory than `MOST_BYTES`. Prints verdict, peak RSS and
seconds per block beside those of reading the bytes from disk; then the peak with fewer layers, what is made of a fault
in one layer, and what a model takes that is run whole (`parity.memory.ROOM`). Needs 32 GB of disk. Ends with exit code
1 where something is not as it should be.
"""

import json
import math
import os
import resource
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

from convert import Checkpoint
from convert.io.safetensors import Writer
from convert.layouts import LAYOUTS
from flax_mixtral.config import MixtralConfig
from parity.cast import WALKS
from parity.memory import ROOM
from parity.metrics import Precision
from parity.port import Port
from parity.selftest.faults import FAULTS
from parity.selftest.planting import planted
from parity.sides import Side
from parity.trace import Array
from parity.weights import DTYPES

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

WHOLE_SHAPE = {**SHAPE, "intermediate_size": 14336 // 4, "num_hidden_layers": 1}
"""Of the model that is run whole: 656 million parameters, so that a busy machine has room for several times that."""

GAINS = {"q_proj.weight": 1.3, "k_proj.weight": 1.3, "lm_head.weight": 2.5}
"""Standard deviation of a projection's output where it is not 1, as scripts/make_checkpoint.py has it: router logits of
about 1, attention scores that select, logits with a spread."""

FAULT, FAULTY_LAYER = "w1-w3-swapped", 5

MOST_BYTES: dict[Precision, int] = {"float32": 14_000_000_000, "bfloat16": 8_000_000_000}
"""The memory that a run may take; one in bfloat16 also walks in float32."""

ROWS = (9, 7)
"""Tokens of each row of the input: few, since what takes memory and time here is the weights."""

POOL = 4_198_403
"""Random values that are repeated; odd, so that no two rows of a tensor begin at the same one."""


def faulty(config: MixtralConfig, weights: Mapping[str, Array]) -> Side:
    """Build flax_mixtral with a fault in one layer, for --flax-side."""
    (fault,) = (row for row in FAULTS if row.slug == FAULT)
    port = planted(fault, FAULTY_LAYER)(Port(config, weights))
    side: Side = port.side(port.config, port.weights)
    return side


def write_random(path: Path, config: MixtralConfig) -> None:
    """Write a checkpoint as hf-legacy, at scales where faults show."""
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


def write_ids(path: Path, config: MixtralConfig) -> None:
    """Write the tokens of the input."""
    rng = np.random.default_rng(0)
    path.write_text(json.dumps([rng.integers(config.vocab_size, size=length).tolist() for length in ROWS]))


class Ran(NamedTuple):
    """One run of the command."""

    result: dict[str, Any]
    seconds: float
    cpu_seconds: float
    """Of all threads; on a busy machine what says more than the time that went by."""
    peak_bytes: int


def run(path: Path, dtype: Precision, *options: str) -> Ran:
    """Run `mixtral-parity run` in a process of its own, which gets no more memory than it may take."""
    report, ids = path.parent / "report", path.parent / "ids.json"
    command = [sys.executable, "-m", "parity", "run", str(path), "--dtype", dtype]
    command += ["--input-ids", str(ids), "--report", str(report), *options]
    most_bytes = MOST_BYTES[dtype]
    shutil.rmtree(report, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes)),
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    found = report / "result.json"
    result = json.loads(found.read_text()) if found.exists() else {"error": "no result"}
    if result["error"]:
        raise click.ClickException(f"{' '.join(command)}: exit code {process.returncode}, {result['error']}")
    return Ran(result, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


WHOLE = """
import resource, sys
from parity.cast import flax_side, torch_side
from convert import Checkpoint
from parity.inputs import read_ids
from parity.port import Port
from pathlib import Path

path, side, dtype, ids = sys.argv[1:]
source = Checkpoint.open(path)
if side == "torch":
    model = torch_side(source, dtype, dtype)
else:
    model = flax_side(Port(source.config, source.view("flax")), dtype, dtype)
(batch,) = read_ids(Path(ids), source.config)
model.embed(batch)  # both frameworks are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.whole(batch)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def whole_bytes(path: Path, side: str, dtype: str) -> int:
    """Load a model whole and run it, as its users do: by how much the peak RSS of a new process grows."""
    command = [sys.executable, "-c", WHOLE, str(path), side, dtype, str(path.parent / "ids.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr)
    return int(done.stdout.splitlines()[-1])


def read_from_disk(file: Path) -> float:
    """Read a file that the page cache does not hold."""
    with file.open("rb", buffering=0) as raw:
        os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        buffer = bytearray(1 << 24)
        while raw.readinto(buffer):
            pass
    return time.perf_counter() - started


def describe(ran: Ran, dtype: Precision, layers: int) -> str:
    """Say what came out and what it took, in all and for each block and walk."""
    worst = max(point["margin"] or 0.0 for point in ran.result["points"] if point["decides"])
    blocks = len(WALKS[dtype]) * layers
    sides = ", ".join(f"{side} {cost['seconds'] / blocks:.1f}" for side, cost in ran.result["cost"].items())
    return (
        f"{dtype}, {layers} layers: verdict {ran.result['verdict']}, worst margin {worst:.2f}; "
        f"peak RSS {ran.peak_bytes / 1e9:.2f} GB of {MOST_BYTES[dtype] / 1e9:.0f}; {ran.seconds:.0f} s; per block and "
        f"walk {ran.seconds / blocks:.1f} s ({sides}), {ran.cpu_seconds / blocks:.1f} of the CPU"
    )


def checkpoint(work: Path, layers: int) -> Path:
    return written(work / f"layers-{layers}", MixtralConfig(**SHAPE, num_hidden_layers=layers))


def written(path: Path, config: MixtralConfig) -> Path:
    """Give a checkpoint, which is made unless it is there, and put the input beside it."""
    if not path.exists():
        write_random(path, config)
    write_ids(path.parent / "ids.json", config)
    return path


def measure_run(path: Path, dtype: Precision, layers: int) -> bool:
    file = path / "model.safetensors"
    size, read_seconds = file.stat().st_size / 1e9, read_from_disk(file)
    ran = run(path, dtype)
    times = ran.seconds / len(WALKS[dtype]) / read_seconds
    click.echo(f"{describe(ran, dtype, layers)}; {times:.1f} x reading its {size:.1f} GB from disk")
    for point in ran.result["points"]:
        if point["verdict"] == "unchecked":
            click.echo(f"  {point['mode']} {point['point']}: unchecked, {point['reason']}")
    return ran.result["verdict"] == "pass" and ran.peak_bytes <= MOST_BYTES[dtype]


def measure_fault(path: Path, dtype: Precision, layers: int) -> bool:
    ran = run(path, dtype, "--flax-side", "benchmarks.stream:faulty")
    first, causes = ran.result["first_divergence"], ran.result["causes"]
    named = ", ".join(f"{cause['fault']} in layer {cause['layer']}" for cause in causes)
    click.echo(f"{describe(ran, dtype, layers)}; {FAULT} in layer {FAULTY_LAYER}: first divergence {first}, {named}")
    placed = ran.result["verdict"] == "fail" and first["layer"] == FAULTY_LAYER
    return placed and [cause["fault"] for cause in causes[:1]] == [FAULT] and ran.peak_bytes <= MOST_BYTES[dtype]


def measure_whole(path: Path, dtype: Precision) -> bool:
    config = Checkpoint.open(path).config
    held = DTYPES[dtype].itemsize * sum(math.prod(spec.shape) for spec in LAYOUTS["flax"].tensors(config).values())
    most = 0.0
    for side in ("torch", "flax"):
        grown = whole_bytes(path, side, dtype)
        most = max(most, grown / held)
        click.echo(f"{dtype}, {side} whole: {grown / 1e9:.2f} GB for {held / 1e9:.2f} GB of parameters")
    return most <= ROOM


MEASUREMENTS = ("run", "fewer", "fault", "whole")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench-stream"), show_default=True)
@click.option("--layers", type=click.IntRange(FAULTY_LAYER + 1), default=8, show_default=True)
@click.option("--fewer", type=click.IntRange(2), default=2, show_default=True, help="Layers of the smaller checkpoint.")
@click.option("--only", type=click.Choice(MEASUREMENTS), multiple=True, help="Instead of all four.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), multiple=True, help="Instead of both.")
@click.option("--keep", is_flag=True, help="Leave the checkpoints where they are, and take those that are there.")
def main(work: Path, layers: int, fewer: int, only: tuple[str, ...], dtype: tuple[Precision, ...], keep: bool) -> None:
    """Measure parity of a checkpoint as large as memory."""
    wanted, good = only or MEASUREMENTS, True
    for one in dtype or MOST_BYTES:
        if "run" in wanted:
            good &= measure_run(checkpoint(work, layers), one, layers)
        if "fewer" in wanted:
            good &= measure_run(checkpoint(work, fewer), one, fewer)
        if "fault" in wanted:
            good &= measure_fault(checkpoint(work, layers), one, layers)
        if "whole" in wanted:
            good &= measure_whole(written(work / "whole", MixtralConfig(**WHOLE_SHAPE)), one)
    if not keep:
        shutil.rmtree(work)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
