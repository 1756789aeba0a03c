"""Whether a whole model fits in the memory that is left: where it does not, it is not run whole, and that is reported.

Imports the standard library and parity's weights.
"""

import math
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from convert.layouts import LAYOUTS
from flax_mixtral.config import MixtralConfig
from parity.metrics import Precision
from parity.weights import DTYPES

__all__ = ["available_bytes", "too_large"]

ROOM = 2.0
"""What a model takes at most while it is loaded whole and run, relative to its parameters; `python -m benchmarks.stream
--only whole` measures it for both frameworks."""

CGROUP = Path("/sys/fs/cgroup")


def too_large(config: MixtralConfig, dtype: Precision) -> str | None:
    """Say why a model is not run whole; None where it fits.

    Args:
        config: the model's.
        dtype: what its parameters are held in.
    """
    parameters = sum(math.prod(spec.shape) for spec in LAYOUTS["flax"].tensors(config).values())
    needed, available = int(ROOM * parameters * DTYPES[dtype].itemsize), available_bytes()
    if needed <= available:
        return None
    return (
        f"not run whole: {parameters:,} parameters in {dtype} need about {needed / 1e9:.1f} GB of memory, and "
        f"{available / 1e9:.1f} GB are available"
    )


def available_bytes() -> int:
    """Give what the process may still take: the least that system, control group and limits leave to it."""
    return max(0, min(_room()))


def _room() -> Iterator[int]:
    """Walk the limits that are known here, each as what is left of it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        yield _kilobytes(fields, "MemAvailable")
        status = dict(
            line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
        )
        for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            most, _ = resource.getrlimit(limit)
            if most != resource.RLIM_INFINITY:
                yield most - _kilobytes(status, used)
    else:
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # elsewhere what is free is not told
    most_text, used_text = ((CGROUP / name) for name in ("memory.max", "memory.current"))
    if most_text.exists() and (most_allowed := most_text.read_text().strip()) != "max":
        yield int(most_allowed) - int(used_text.read_text())


def _kilobytes(fields: Mapping[str, str], name: str) -> int:
    return int(fields[name].split()[0]) * 1024
