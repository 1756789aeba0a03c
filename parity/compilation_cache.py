"""Compiled programs outlive the process: most of a run on a small model is compiling what the last run compiled too.

All by JAX's own settings, in its own environment variables, so whatever a user has set there holds.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

import platformdirs

__all__ = ["keep_compilations"]

MAX_BYTES = 1 << 30


def keep_compilations(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let JAX keep what it compiles in the user's cache directory; call before JAX is imported.

    Args:
        environment: JAX_COMPILATION_CACHE_DIR names another place, JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        ours = Path(platformdirs.user_cache_dir("flax-mixtral", appauthor=False)) / "jax"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(ours)
        # Of this place alone: in a user's own one it would delete what other programs keep there.
        environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
    # JAX keeps only what took a second; a block of a small model takes less, and there are many.
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
