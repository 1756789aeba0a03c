"""The sections of docs/performance.md that are measured: each a function from a checkpoint to Markdown."""

import os
import platform
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import torch
import transformers

from benchmarks import backends, checkpoint, parity_cost, process, products, speed
from benchmarks.turns import Row

__all__ = ["SECTIONS", "put"]

TOKENS = 512


def put(page: Path, part: str, text: str) -> None:
    """Replace what stands between a part's two marks in the page."""
    marks = f"<!-- {part} -->", f"<!-- end of {part} -->"
    old = page.read_text()
    pattern = re.compile(f"{marks[0]}.*?{marks[1]}", re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise ValueError(f"{page}: expected once {marks[0]} and {marks[1]}")
    page.write_text(pattern.sub(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", old))


def _speed(path: Path, rounds: int, dtype: str) -> str:
    return f"{_machine()} {rounds} rounds.\n\n{_table(speed.compare(path, dtype, rounds))}"


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
    rows = "\n".join(f"| {name} | {median:.2f} |" for name, median in seconds.items())
    return f"{_machine()} Median of {rounds}.\n\n| command | seconds |\n|---|---|\n{rows}"


def _parity(path: Path, rounds: int) -> str:
    cost = parity_cost.measure(path, TOKENS, rounds)
    rows = [
        *((f"one forward, {name}", seconds) for name, seconds in cost.forwards.items()),
        ("a run", cost.whole),
        *((f"of it {name}", seconds) for name, seconds in cost.sides.items()),
    ]
    table = "\n".join(f"| {name} | {seconds:.1f} |" for name, seconds in rows)
    return (
        f"{_machine()} {TOKENS} tokens, float32, compiled before.\n\n| what | seconds |\n|---|---|\n{table}\n\n"
        f"A run takes {cost.with_oracle:.1f} x the two forwards, and {cost.without_oracle:.1f} x without the "
        "oracle's seconds."
    )


SECTIONS: dict[str, Callable[[Path, int], str]] = {
    "float32": partial(_speed, dtype="float32"),
    "bfloat16": partial(_speed, dtype="bfloat16"),
    "backends": _backends,
    "products": _products,
    "memory": _memory,
    "start": _start,
    "parity": _parity,
}


def _table(rows: Iterable[Row]) -> str:
    lines = [
        "| what | dtype | ours, s | others, s | ratio to the best | of single rounds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        others = ", ".join(f"{name} {row.median(name):.3f}" for name in list(row.seconds)[1:])
        low, high = row.spread
        ours = f"{row.median(row.ours):.3f}"
        lines.append(
            f"| {row.what} | {row.dtype} | {ours} | {others} | **{row.ratio:.2f}** | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines)


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
