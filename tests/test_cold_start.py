"""`--help` is quick because it loads no framework; how quick is measured in benchmarks."""

import subprocess
import sys

import pytest

HELP = """
import sys
from {package}.__main__ import cli
sys.argv = ["command", *{arguments!r}]
try:
    cli()
finally:
    loaded = sorted({{"jax", "torch", "numpy", "flax", "transformers", "ml_dtypes"}} & set(sys.modules))
    print("loaded", *loaded, file=sys.stderr)
"""


def loaded_by(package: str, *arguments: str) -> str:
    code = HELP.format(package=package, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("convert", ("--help",)), ("parity", ("--help",)), ("parity", ("run", "--help"))],
)
def test_help_loads_no_framework(package: str, arguments: tuple[str, ...]) -> None:
    assert loaded_by(package, *arguments) == "loaded"


def test_what_does_load_one_is_seen() -> None:
    assert "numpy" in loaded_by("convert", "inspect", "nowhere")
