"""What holds for every test: the CPU, no network, and the same examples on every run."""

import os
from pathlib import Path

# Before the first import of JAX, torch or transformers: all three read these once.
os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
# What one test or process has compiled the others load: most of a small model's time is compilation.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "jax-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from hypothesis import settings

collect_ignore = ["demo"]  # a repository of its own, which tests/parity/test_pytest_plugin.py runs

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
