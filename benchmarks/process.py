"""What is measured in a process of its own: loading, and the cold start of the commands."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

__all__ = ["help_seconds", "load_growth_bytes"]

LOAD = """
import json, sys
from pathlib import Path
import jax.numpy as jnp
import convert.checkpoint
from flax_mixtral import Mixtral
def peak():  # not ru_maxrss, which begins with what the process that started this one held
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
jnp.zeros(1).block_until_ready()
before = peak()
model = Mixtral.from_pretrained(sys.argv[1])
print(json.dumps(peak() - before))
"""


def load_growth_bytes(path: Path) -> int:
    """Give by how much a process's peak memory grows while it loads a checkpoint."""
    command = [sys.executable, "-c", LOAD, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1]))


def help_seconds(command: str, rounds: int = 5) -> float:
    """Give the median time that a command takes to print its help."""
    program = Path(sys.executable).parent / command
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run([program, "--help"], stdout=subprocess.DEVNULL, check=True, env=os.environ)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
