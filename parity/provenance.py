"""Where a result comes from: versions, machine, checkpoints, inputs."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from inspect import getsourcefile
from pathlib import Path
from typing import Any

from parity.trace import Batch

__all__ = ["code_sha256", "environment", "provenance"]

PACKAGES = ("flax-mixtral", "jax", "jaxlib", "flax", "torch", "transformers", "safetensors", "numpy", "ml_dtypes")


def environment() -> dict[str, Any]:
    """List the versions and the machine that a result depends on."""
    return {
        "packages": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def provenance(
    src: str | Path,
    flax: str | Path | None,
    batches: Sequence[Batch],
    seed: int,
    weight_hashes: Mapping[str, str],
) -> dict[str, Any]:
    """List what was compared on what, with hashes.

    Args:
        src: torch's checkpoint.
        flax: Flax's; None where src was mapped in memory.
        batches: the inputs.
        seed: of the suite.
        weight_hashes: SHA-256 of each leaf, where weights were compared.
    """
    return {
        "command": sys.argv,
        "torch_checkpoint": str(src),
        "flax_checkpoint": None if flax is None else str(flax),
        "config_sha256": hashlib.sha256((Path(src) / "config.json").read_bytes()).hexdigest(),
        "weights_sha256": dict(weight_hashes),
        "inputs": [
            {
                "name": batch.name,
                "shape": list(batch.input_ids.shape),
                "real_tokens": int(batch.real_M.sum()),
                "input_ids_sha256": hashlib.sha256(batch.input_ids.tobytes()).hexdigest(),
            }
            for batch in batches
        ],
        "seed": seed,
    }


def code_sha256(side: Any) -> str:
    """Give one hash of all code that a comparison runs here: these packages, and the file that a side is written in."""
    root = Path(__file__).resolve().parents[1]
    files = [path for package in ("convert", "flax_mixtral", "parity") for path in (root / package).rglob("*.py")]
    found = hashlib.sha256()
    for path in [*sorted(files), Path(getsourcefile(side) or __file__)]:
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
