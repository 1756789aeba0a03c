"""What several processes cost: the memory of each, and ways to share out experts; `python -m benchmarks.processes`.

memory    peak RSS of 1, 2 and 4 processes that load a model together, each its own part, and run it once
exchange  one block's experts in 2 and 4 processes over gloo, and on 8 simulated devices: psum beside all_to_all
work      the same on 2, 4 and 8 simulated devices: own tokens only, beside every token through every own expert
temporary what XLA sets aside for a block's experts of 8 tokens on one device, beside the kernels

Ways take turns in one process; each figure is the median of --rounds as a ratio, with its smallest and largest.
"""

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from benchmarks.convert import write_random
from benchmarks.exchange import WAYS, Way, inputs
from benchmarks.tables import markdown
from benchmarks.turns import Row, Run, take_turns
from flax_mixtral import Mixtral
from flax_mixtral.arrays import arrays_of

MODEL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
}
MESHES = ({"expert": 1}, {"expert": 2}, {"expert": 4}, {"expert": 2, "tensor": 2})
TOKENS = 1024

Mesh = dict[str, int]


def set_mesh(sizes: Mesh) -> Any:
    return jax.set_mesh(jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)))


# --- what a worker does ---------------------------------------------------------------------------------------------


def resident(key: str) -> int:
    """Read the process's memory: VmRSS, or VmHWM for the most it ever was."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def load(sizes: Mesh, path: str, dtype: str) -> dict[str, int]:
    """Load a model and run it once; say what this process holds of it, and how far its memory grew."""
    with set_mesh(sizes):
        jnp.zeros(1).block_until_ready()
        before = resident("VmRSS")
        model = Mixtral.from_pretrained(path, mesh=jax.sharding.get_mesh(), dtype=jnp.dtype(dtype))
        loaded = resident("VmHWM") - before
        jax.jit(lambda model: model(jnp.arange(8)[None]).logits)(model).block_until_ready()
    held = sum(shard.data.nbytes for array in arrays_of(model).values() for shard in array.addressable_shards)
    return {"held": held, "loaded": loaded, "run": resident("VmHWM") - before}


def race(sizes: Mesh, one: str, other: str, tokens: int, dtype: str, overloaded: bool, rounds: int) -> dict[str, Any]:
    """Time two ways in turns, and say how far apart their results are, over the first one's RMS."""
    with set_mesh(sizes):
        given = inputs(tokens, dtype, overloaded=overloaded)
        ways: dict[str, Way] = {name: jax.jit(WAYS[name]) for name in (one, other)}
        results = [multihost_utils.process_allgather(way(*given), tiled=True) for way in ways.values()]
        runs: dict[str, Run] = {name: partial(_finish, way, given) for name, way in ways.items()}
        row = take_turns("", dtype, runs, rounds)
    plain_MD, other_MD = (np.asarray(result, np.float64) for result in results)
    apart = np.abs(plain_MD - other_MD).max() / np.sqrt(np.mean(plain_MD**2))
    return {"seconds": row.seconds, "apart": float(apart)}


def _finish(way: Way, given: Any) -> None:
    way(*given).block_until_ready()


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"load": load, "race": race}


def work_for(task: str, arguments: list[Any], coordinator: str, count: int, number: int) -> None:
    """Do one process's part of a task, and print what it found."""
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, count, number)
    print(json.dumps(TASKS[task](*arguments)), flush=True)


def together(task: str, sizes: Mesh, *arguments: Any, simulated: bool = False) -> list[dict[str, Any]]:
    """Do a task in as many processes as the mesh has devices, or in one that simulates them; give what each found."""
    devices = math.prod(sizes.values())
    count = 1 if simulated else devices
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices if simulated else 1}"
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        "text": True,
        "env": {**os.environ, "XLA_FLAGS": flags},
    }
    words = [json.dumps(word) for word in (task, [sizes, *arguments], coordinator, count)]
    code = "import json, sys; from benchmarks.processes import work_for; work_for(*map(json.loads, sys.argv[1:]))"
    started = [subprocess.Popen([sys.executable, "-c", code, *words, str(n)], **pipes) for n in range(count)]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise click.ClickException(f"{task} on {sizes} failed")
    return [json.loads(next(line for line in text.splitlines() if line.startswith("{"))) for text in printed]


# --- the tables -----------------------------------------------------------------------------------------------------


def memory(rounds: int) -> Iterator[tuple[str, ...]]:
    yield "processes", "mesh", "dtype", "parameters of each", "peak RSS, loading", "and running", "of one process's"
    whole: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory(dir="build") as folder:
        write_random(Path(folder) / "hf", MODEL)
        for dtype, sizes in product(("float32", "bfloat16"), MESHES):
            found = max(together("load", sizes, str(Path(folder) / "hf"), dtype), key=lambda one: int(one["run"]))
            whole.setdefault(dtype, (found["loaded"], found["run"]))
            held, loaded, run = (f"{found[key] / 1e6:.0f} MB" for key in ("held", "loaded", "run"))
            share = f"{found['loaded'] / whole[dtype][0]:.2f}, {found['run'] / whole[dtype][1]:.2f}"
            yield str(math.prod(sizes.values())), named(sizes), dtype, held, loaded, run, share


def exchange(rounds: int) -> Iterator[tuple[str, ...]]:
    yield "devices", "dtype", "routing", "all_to_all over psum", "apart"
    for count, simulated in ((2, False), (4, False), (8, True)):
        for dtype, overloaded in (("float32", False), ("float32", True), ("bfloat16", False)):
            given = ("all_to_all", "psum", TOKENS, dtype, overloaded, rounds)
            found = together("race", {"expert": count}, *given, simulated=simulated)[0]
            where = f"{count} simulated" if simulated else f"{count} processes, gloo"
            yield where, dtype, "overloaded" if overloaded else "even", ratio(found), f"{found['apart']:.0e}"


def work(rounds: int) -> Iterator[tuple[str, ...]]:
    yield "devices", "tokens", "own tokens over every token", "apart"
    for count in (2, 4, 8):
        for tokens in (1, 8, 128, TOKENS):
            given = ("psum", "every token", tokens, "float32", False, rounds)
            found = together("race", {"expert": count}, *given, simulated=True)[0]
            yield f"{count} simulated", str(tokens), ratio(found), f"{found['apart']:.0e}"


def named(sizes: Mesh) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def ratio(found: dict[str, Any]) -> str:
    row = Row("", "", found["seconds"])
    return f"{row.ratio:.2f} ({row.spread[0]:.2f} to {row.spread[1]:.2f})"


def temporary(rounds: int) -> Iterator[tuple[str, ...]]:
    yield "dtype", "kernels", *(names := ("psum", "every token", "sliced"))
    for dtype in ("float32", "bfloat16"):
        with set_mesh({"expert": 1}):
            given = inputs(8, dtype)
            programs: list[Any] = [jax.jit(WAYS[name]).lower(*given).compile() for name in names]
        kernels = sum(array.nbytes for array in jax.tree.leaves(given[-1]))
        sizes = (kernels, *(program.memory_analysis().temp_size_in_bytes for program in programs))
        yield dtype, *(f"{size / 1e6:.0f} MB" for size in sizes)


PARTS = {"memory": memory, "exchange": exchange, "work": work, "temporary": temporary}


@click.command()
@click.option("--part", "parts", type=click.Choice([*PARTS]), multiple=True, help="Only these; may be repeated.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Turns of every measurement.")
def main(parts: tuple[str, ...], rounds: int) -> None:
    """Measure what several processes cost, and print the tables of docs/scaling.md."""
    for part in parts or PARTS:
        for number, row in enumerate(PARTS[part](rounds)):
            click.echo(markdown(row, []) if number == 0 else f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
