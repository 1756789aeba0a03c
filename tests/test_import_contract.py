"""The import contract holds, and each of its clauses can fail; torch is needed by one module and no other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PACKAGES = ("convert", "flax_mixtral", "parity")

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def lint_imports(cwd: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [BIN / "lint-imports", "--no-cache", "--no-logo"]
    # A wide line keeps each finding on one.
    return subprocess.run(command, cwd=cwd, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True)


def run_without(blocked: set[str], command: list[str | Path], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in whose Python the named packages cannot be imported."""
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)


def test_contract_is_kept() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "statement", "finding"),
    [
        ("convert/planted.py", "import torch", "convert.planted -> torch"),
        ("flax_mixtral/planted.py", "import torch.nn", "flax_mixtral.planted -> torch"),
        ("parity/planted.py", "import transformers", "parity.planted -> transformers"),
        ("parity/sides/planted.py", "def late():\n    import torch", "parity.sides.planted -> torch"),
        ("convert/planted.py", "import parity", "convert.planted -> parity"),
        ("flax_mixtral/planted.py", "import convert", "flax_mixtral.planted -> convert"),
        ("convert/planted.py", "import flax_mixtral", "convert.planted -> flax_mixtral"),
        ("convert/planted.py", "import jax.numpy", "convert.planted -> jax"),
        ("convert/io/planted.py", "import orbax", "convert.io.planted -> orbax"),
        ("flax_mixtral/axes.py", "import numpy", "flax_mixtral.axes -> numpy"),
        ("parity/oracle/model.py", "import flax_mixtral.rope", "parity.oracle.model -> flax_mixtral.rope"),
        ("flax_mixtral/config.py", "import jax", "flax_mixtral.config -> jax"),
    ],
)
def test_contract_finds_a_planted_import(module: str, statement: str, finding: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{statement}\n")

    result = lint_imports(tmp_path)

    assert result.returncode == 1, result.stdout + result.stderr
    assert finding in result.stdout


def test_blocker_blocks(tmp_path: Path) -> None:
    result = run_without({"torch"}, [sys.executable, "-c", "import parity.sides.torch_hf"], tmp_path)
    assert result.returncode != 0
    assert "torch is blocked" in result.stderr


@pytest.mark.parametrize("script", ["mixtral-convert", "mixtral-parity"])
def test_commands_start_without_torch(script: str, tmp_path: Path) -> None:
    result = run_without({"torch", "transformers"}, [BIN / script, "--help"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    ("statement", "blocked"),
    [
        ("import flax_mixtral, convert, parity", {"torch", "transformers"}),
        ("from flax_mixtral import Mixtral", {"torch", "transformers"}),
        ("import convert.plan, convert.execute", {"torch", "transformers", "jax", "flax"}),
    ],
)
def test_packages_import_without(statement: str, blocked: set[str], tmp_path: Path) -> None:
    result = run_without(blocked, [sys.executable, "-c", statement], tmp_path)
    assert result.returncode == 0, result.stderr


def test_convert_and_forward_without_torch(tmp_path: Path) -> None:
    # The checkpoint is written here, with torch; what follows runs in processes that have none.
    from scripts.make_checkpoint import write_checkpoint

    source = write_checkpoint(tmp_path / "torch", num_hidden_layers=2)
    target = tmp_path / "flax"
    forward = (
        "import sys, numpy, flax_mixtral\n"
        "model = flax_mixtral.Mixtral.from_pretrained(sys.argv[1])\n"
        "logits = model(numpy.arange(12).reshape(1, 12)).logits\n"
        "assert logits.shape == (1, 12, 331) and numpy.isfinite(logits).all()\n"
    )
    blocked = {"torch", "transformers"}

    converted = run_without(blocked, [BIN / "mixtral-convert", source, target], tmp_path)
    assert converted.returncode == 0, converted.stderr
    ran = run_without(blocked, [sys.executable, "-c", forward, target], tmp_path)
    assert ran.returncode == 0, ran.stderr
