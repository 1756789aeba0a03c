"""What converting costs, beside `cp` of the same bytes; run as `python -m benchmarks.convert`.

Prints ratios of runs that take turns on the same disk, as the median of --repeat. --large adds a 12 GB checkpoint with
8x7B's own layer shapes; --load adds reading into Flax and a first forward, beside transformers.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np

from convert.io.safetensors import Writer
from convert.layouts import LAYOUTS
from flax_mixtral.config import MixtralConfig

SHAPES: dict[str, dict[str, Any]] = {
    "1.6 GB": {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8, "num_attention_heads": 16},
    "12 GB": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32},
}

CONVERT = """
import json, resource, sys, time
import convert.execute
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
report = convert.execute.convert(sys.argv[1], sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - start, "growth_bytes": peak() - before,
                  "planned_bytes": report.plan.peak_bytes, "cpu": time.process_time()}))
"""

FLAX = """
import jax.numpy as jnp
from flax_mixtral import Mixtral
model = Mixtral.from_pretrained(sys.argv[1])
model(jnp.arange(8)[None]).logits.block_until_ready()
"""
TORCH = """
import torch, transformers
torch.set_grad_enabled(False)
model = transformers.MixtralForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model(torch.arange(8)[None]).logits.sum().item()
"""
TIMED = """
import json, resource, sys, time
import {library}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start, cpu = peak(), time.perf_counter(), time.process_time()
{body}
print(json.dumps({{"seconds": time.perf_counter() - start, "growth_bytes": peak() - before,
                   "cpu": time.process_time() - cpu}}))
"""


def write_random(path: Path, shape: dict[str, Any]) -> MixtralConfig:
    """Write a bfloat16 checkpoint as hf-legacy; values repeat, as nothing here looks at them."""
    config = MixtralConfig(**{"num_key_value_heads": 8, "head_dim": 64, **shape})
    layout = LAYOUTS["hf-legacy"]
    specs = layout.tensors(config)
    dtype = np.dtype(ml_dtypes.bfloat16)
    pool = (np.random.default_rng(0).standard_normal(1 << 22) / 30).astype(dtype).view(np.uint8)
    path.mkdir(parents=True)
    with Writer(path / "model.safetensors", [(n, dtype, s.shape) for n, s in specs.items()], layout.format) as writer:
        for name, header in writer.headers.items():
            for at in range(0, header.nbytes, pool.size):
                writer.write(name, at, pool[: header.nbytes - at])
    (path / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "bfloat16"}))
    return config


def in_process(code: str, *args: Path, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise click.ClickException(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def copy(src: Path, dst: Path) -> float:
    start = time.perf_counter()
    shutil.rmtree(dst, ignore_errors=True)
    subprocess.run(["cp", "-r", src, dst], check=True)
    for file in dst.iterdir():
        subprocess.run(["sync", file], check=True)
    return time.perf_counter() - start


def largest_bytes(path: Path) -> int:
    from convert import Checkpoint

    return max(header.nbytes for header in Checkpoint.open(path).headers.values())


def converting(src: Path, work: Path, repeat: int) -> Iterator[str]:
    """Take turns: cp and fsync, then convert; a first pair warms the page cache and is thrown away."""
    ratios, runs, copies = [], [], []
    for turn in range(repeat + 1):
        copied = copy(src, work / "copy")
        shutil.rmtree(work / "copy")
        run = in_process(CONVERT, src, work / "flax")
        shutil.rmtree(work / "flax")
        if turn:
            ratios.append(run["seconds"] / copied)
            runs.append(run)
            copies.append(copied)
    growth, largest = max(run["growth_bytes"] for run in runs), largest_bytes(src)
    seconds = statistics.median(run["seconds"] for run in runs)
    yield f"convert / (cp + fsync)   {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f})"
    yield f"seconds                  {seconds:.1f} against {statistics.median(copies):.1f}"
    cpu = statistics.median(run["cpu"] for run in runs)
    yield f"CPU seconds              {cpu:.1f}, start of the program included"
    yield f"peak RSS growth          {growth / 1e6:.0f} MB; planned {runs[0]['planned_bytes'] / 1e6:.0f} MB"
    yield f"3 x largest + 200 MB     {(3 * largest + 200e6) / 1e6:.0f} MB"


def loading(src: Path, work: Path, repeat: int) -> Iterator[str]:
    """Take turns: with nothing compiled before, with JAX's cache of what it compiled, and transformers."""
    flax = TIMED.format(library="jax, flax.nnx, flax_mixtral.heads, convert.checkpoint", body=FLAX)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    ways: dict[str, tuple[str, dict[str, str]]] = {
        "Flax": (flax, {"JAX_ENABLE_COMPILATION_CACHE": "false"}),
        "Flax, compiled before": (flax, cache),
        "transformers": (TIMED.format(library="torch, transformers", body=TORCH), {}),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for turn in range(repeat + 1):  # the first fills the caches, and is thrown away
        for name, (code, environment) in ways.items():
            run = in_process(code, src, **environment)
            if turn:
                runs[name].append(run)
    yield "load + 8 tokens          seconds   / transformers      CPU seconds   peak RSS growth"
    for name, found in runs.items():
        pairs = zip(found, runs["transformers"], strict=True)
        ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in pairs]
        seconds, cpu = (statistics.median(run[key] for run in found) for key in ("seconds", "cpu"))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        growth = max(run["growth_bytes"] for run in found) / 1e6
        yield f"{name:24} {seconds:5.1f}     {spread:19} {cpu:5.1f}         {growth:.0f} MB"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/bench-convert"), show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True)
@click.option("--large", is_flag=True, help="Also the 12 GB checkpoint; takes 36 GB of disk.")
@click.option("--load", is_flag=True, help="Also load into Flax and into transformers.")
def main(work: Path, repeat: int, large: bool, load: bool) -> None:
    """Measure converting hf-legacy to flax in bfloat16."""
    for name in SHAPES if large else ["1.6 GB"]:
        shutil.rmtree(work, ignore_errors=True)
        write_random(work / "hf", SHAPES[name])
        click.echo(f"{name}: {(work / 'hf' / 'model.safetensors').stat().st_size / 1e9:.2f} GB")
        for line in converting(work / "hf", work, repeat):
            click.echo(f"  {line}")
        if load and name == "1.6 GB":
            for line in loading(work / "hf", work, repeat):
                click.echo(f"  {line}")
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
