"""The sections of docs/performance.md that are measured: each a function from a checkpoint to Markdown."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import torch
import transformers

from benchmarks import backends, checkpoint, parity_cost, process, products, speed, tables
from benchmarks.turns import Row

__all__ = ["SECTIONS"]

TOKENS = 512
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def _speed(path: Path, rounds: int, dtype: str) -> str:
    return f"{_machine()} {rounds} rounds.\n\n{_table(speed.compare(path, dtype, rounds))}"


def _huge_pages(path: Path, rounds: int) -> str:
    """Measure speed again where the C library asks for huge pages, which it has to be told before a process starts."""
    measure = "import sys; from pathlib import Path; from benchmarks.page import SECTIONS; "
    measure += "print(SECTIONS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3])))"
    tables_found = []
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", measure, dtype, str(path), str(rounds)]
        environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        tables_found.append(done.stdout.strip())
    return "\n\n".join(tables_found)


def _backends(path: Path, rounds: int) -> str:
    return f"{_machine()} {rounds} rounds.\n\n{_table(backends.compare(checkpoint.CONFIG, TOKENS, rounds))}"


def _products(path: Path, rounds: int) -> str:
    rows = [row for dtype in ("float32", "bfloat16") for row in products.compare(checkpoint.CONFIG, dtype, rounds)]
    return f"{_machine()} {rounds} rounds.\n\n{_table(rows)}"


def _memory(path: Path, rounds: int) -> str:
    weights = (path / "model.safetensors").stat().st_size
    growth = process.load_growth_bytes(path)
    return (
        f"`from_pretrained` in bfloat16: the process grows by {growth / weights:.2f} x the weights' bytes at its peak "
        f"({growth / 1e9:.2f} GB for {weights / 1e9:.2f} GB)."
    )


def _start(path: Path, rounds: int) -> str:
    seconds = {f"`{name} --help`": process.help_seconds(name, rounds) for name in ("mixtral-convert", "mixtral-parity")}
    table = tables.markdown(["command", "seconds"], ([name, f"{median:.2f}"] for name, median in seconds.items()))
    return f"{_machine()} Median of {rounds}.\n\n{table}"


def _parity(path: Path, rounds: int) -> str:
    cost = parity_cost.measure(path, TOKENS, rounds)
    rows = [
        *((f"one forward, {name}", seconds) for name, seconds in cost.forwards.items()),
        ("a run", cost.whole),
        *((f"of it {side}: {what}", seconds) for side, calls in cost.sides.items() for what, seconds in calls.items()),
        ("of it comparing and the rest", cost.rest),
    ]
    table = tables.markdown(["what", "seconds"], ([name, f"{seconds:.1f}"] for name, seconds in rows))
    return (
        f"{_machine()} {TOKENS} tokens, float32, compiled before.\n\n{table}\n\n"
        f"A run takes {cost.with_oracle:.1f} x the two forwards, and {cost.without_oracle:.1f} x without the "
        "oracle's seconds."
    )


SECTIONS: dict[str, Callable[[Path, int], str]] = {
    "float32": partial(_speed, dtype="float32"),
    "bfloat16": partial(_speed, dtype="bfloat16"),
    "huge-pages": _huge_pages,
    "backends": _backends,
    "products": _products,
    "memory": _memory,
    "start": _start,
    "parity": _parity,
}


def _table(rows: Iterable[Row]) -> str:
    return tables.markdown(
        ["what", "dtype", "ours, s", "others, s", "ratio to the best", "of single rounds"], map(_line, rows)
    )


def _line(row: Row) -> list[str]:
    others = ", ".join(f"{name} {row.median(name):.3f}" for name in list(row.seconds)[1:])
    low, high = row.spread
    ours = f"{row.median(row.ours):.3f}"
    return [row.what, row.dtype, ours, others, f"**{row.ratio:.2f}**", f"{low:.2f} to {high:.2f}"]


def _machine() -> str:
    """Describe processor, cores and versions."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in lines}
    sets = [name for name, flag in INSTRUCTION_SETS.items() if flag in fields.get("flags", "").split()]
    model = fields.get("model name", platform.processor() or platform.machine())
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{model} ({', '.join(sets) or 'instruction sets unknown'}), {os.cpu_count()} cores; {versions}."


INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX-512 bfloat16": "avx512_bf16",
    "AMX bfloat16": "amx_bf16",
}
