"""The command keeps what JAX compiles, where the user wants it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity.compilation_cache import MAX_BYTES, keep_compilations

COMPILE = """
from parity.compilation_cache import keep_compilations
keep_compilations()
import jax
jax.jit(lambda x: x + 1)(1.0)
"""


COMMAND = """
import os, sys
from parity.__main__ import main
sys.argv = ["mixtral-parity", "--help"]
try:
    main()
finally:
    assert os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert "jax" not in sys.modules, "it would have read its settings by now"
"""


def compiled_in(home: Path, **settings: str) -> set[str]:
    """Compile in a new process and give the first part of the path of every file kept."""
    foreign = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    environment = {**foreign, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home / "cache"), "HOME": str(home)}
    subprocess.run([sys.executable, "-c", COMPILE], env={**environment, **settings}, check=True)
    return {file.relative_to(home).parts[0] for file in home.rglob("*-cache") if file.is_file()}


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME moves the user's cache directory on Linux alone")
def test_compiled_programs_are_kept_in_the_users_cache(tmp_path: Path) -> None:
    assert compiled_in(tmp_path) == {"cache"}


def test_or_where_jax_is_told_to_keep_them(tmp_path: Path) -> None:
    assert compiled_in(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "elsewhere")) == {"elsewhere"}


def test_or_not_at_all(tmp_path: Path) -> None:
    assert compiled_in(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == set()


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a directory is wanted")
    assert compiled_in(tmp_path) == set()


def test_what_the_user_has_set_holds() -> None:
    environment = {"JAX_COMPILATION_CACHE_DIR": "elsewhere", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3"}
    keep_compilations(environment)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"
    assert environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "3"
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in environment, "nothing is deleted there"
    environment = {}
    keep_compilations(environment)
    assert environment["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(MAX_BYTES)


def test_the_command_asks_for_it() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    subprocess.run([sys.executable, "-c", COMMAND], env=environment, check=True, capture_output=True)
