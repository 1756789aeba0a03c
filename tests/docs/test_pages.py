"""Every command and every Python block of README and docs: parsed here at once, run under `slow`."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import linen

import convert.__main__
import flax_mixtral
import parity.__main__
from parity import embedded
from parity.pytest_plugin import assert_parity
from parity.trace import Trace
from tests.checkpoints import write_checkpoint
from tests.docs.pages import PAGES, ROOT, Block, Command, blocks, commands

__all__ = ["assert_parity"]  # the fixture, where the plugin is not installed

PROGRAMS: dict[str, tuple[click.Group, Callable[[], None]]] = {
    "mixtral-convert": (convert.__main__.cli, convert.__main__.main),
    "mixtral-parity": (parity.__main__.cli, parity.__main__.main),
}

ELSEWHERE = {
    "docs/own-port.md": "tests/parity/test_own_port.py runs it, and holds what is printed to the page",
    "make": "CI itself runs make",
    "pip": "CI itself installs the package",
    "selftest": "tests/parity/selftest/test_faults.py plants the faults, in more than the minutes of a page",
    "examples/finetune.py": "tests/examples/test_finetune.py runs it, by one and by several processes",
    "docs/scaling.md": "test_the_page_on_scaling_runs, on the devices and as the shares that it names",
}
"""What does not run here, and where it does."""

EXAMPLES = {
    "examples/github-actions.yml": lambda content: [
        step["run"] for step in content["jobs"]["parity"]["steps"] if "run" in step
    ],
    "examples/gitlab-ci.yml": lambda content: content["parity"]["before_script"] + content["parity"]["script"],
}
"""The shell lines of each CI example."""


def of_examples() -> Iterator[tuple[str, list[Command]]]:
    for name, lines_of in EXAMPLES.items():
        lines = lines_of(yaml.safe_load((ROOT / name).read_text()))
        text = "\n".join(lines).replace('"$CHECKPOINT"', "path/to/mixtral")
        yield name, [Command(re.sub(r">>.*", "", line).replace("'", "").split(), 0) for line in text.splitlines()]


SHELL = {**{page: list(commands(page)) for page in PAGES}, **dict(of_examples())}
PYTHON = [block for page in PAGES for block in blocks(page, "python")]


def parsed(command: Command) -> None:
    """Let click read a command line; it raises what it would say."""
    program, *rest = command.arguments
    group, _ = PROGRAMS[program]
    name = rest.pop(0) if rest[0] in group.commands else "convert"  # what mixtral-convert does by default
    group.commands[name].make_context(name, rest)


def exists(arguments: list[str]) -> bool:
    """Say whether what Python is given is there: a file, or after -m a module."""
    if arguments[0] != "-m":
        return (ROOT / arguments[0]).is_file()
    module = ROOT / arguments[1].replace(".", "/")
    return module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()


def checked(example: Path) -> subprocess.CompletedProcess[str]:
    """Hold a CI file against the schema of its platform, a copy of which the checker brings."""
    schema = (
        ["vendor.gitlab-ci", "--data-transform=gitlab-ci"] if "gitlab" in example.name else ["vendor.github-workflows"]
    )
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", *schema, str(example)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "wrong"), [("github-actions", "runs-on:"), ("gitlab-ci", "script:")])
def test_a_ci_example_is_what_its_platform_reads(name: str, wrong: str, tmp_path: Path) -> None:
    example = ROOT / "examples" / f"{name}.yml"
    assert checked(example).returncode == 0, checked(example).stdout
    planted = tmp_path / example.name
    planted.write_text(example.read_text().replace(f" {wrong}", " hidden:"))
    assert checked(planted).returncode == 1


def target_exists(name: str) -> bool:
    return re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("page", [page for page in SHELL if SHELL[page]])
def test_every_command_is_one(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in SHELL[page]:
        program, *rest = command.arguments
        if program in PROGRAMS:
            parsed(command)
        elif program == "make":
            assert target_exists(rest[0]), command
        elif program == "python":
            assert exists(rest), command
        else:
            assert program in ("pip", "cat"), f"{page}: {command}: nothing here knows how to run it"


def test_a_command_that_is_none_is_noticed() -> None:
    with pytest.raises(click.UsageError, match="No such option"):
        parsed(Command(["mixtral-parity", "run", "path/to/mixtral", "--sweet"], 0))
    assert not target_exists("nothing")
    assert not exists(["-m", "benchmarks.nothing"])
    assert exists(["-m", "parity.embedded"])


def lost(text: str, folder: Path) -> list[str]:
    """List the links and the paths in code that lead to no file."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", prose) if not link.startswith("http")]
    links += re.findall(r'(?:src|srcset)="([^"]+)"', prose)
    paths = re.findall(r"`((?:benchmarks|convert|docs|examples|flax_mixtral|parity|scripts|tests)/[\w./]+)`", prose)
    return [link for link in links if not (folder / link).exists()] + [
        path for path in paths if not (ROOT / path).exists()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    assert lost((ROOT / page).read_text(), (ROOT / page).parent) == []


def test_a_link_to_nothing_is_noticed() -> None:
    text = "[a](convert.md#memory) [b](gone.md) [c](https://jax.dev) `parity/walk.py` `parity/gone.py` "
    text += '<img src="gone.png">'
    assert lost(text, ROOT / "docs") == ["gone.md", "gone.png", "parity/gone.py"]


@pytest.mark.parametrize("package", [convert, flax_mixtral, parity], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: [\w.]+\.(\w+)$", page, re.MULTILINE))
    assert set(package.__all__) - documented == set()


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{block.page}-{PYTHON.index(block)}")
def test_every_python_block_is_python(block: Block) -> None:
    compile(block.text, block.page, "exec")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a small checkpoint with the embedded model's tokenizer."""
    path = tmp_path_factory.mktemp("pages") / "mixtral"
    write_checkpoint(path, num_hidden_layers=2, vocab_size=1024)
    (path / "tokenizer.json").write_bytes((embedded.path() / "tokenizer.json").read_bytes())
    return path


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand where the pages' paths lead to that checkpoint."""
    for name in ("path/to/mixtral", "Mixtral-8x22B"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(command: Command, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process, by its entry point; give its exit code."""
    monkeypatch.setattr(sys, "argv", command.arguments)
    try:
        PROGRAMS[command.arguments[0]][1]()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in SHELL if SHELL[page] and page not in ELSEWHERE])
def test_the_commands_of_a_page_run(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converting = ["mixtral-convert", "path/to/mixtral", "path/to/flax"]
    if all(command.arguments[:3] != converting for command in SHELL[page]):
        convert.convert(*converting[1:])  # the page starts from there
    for command in SHELL[page]:
        if ELSEWHERE.keys().isdisjoint(command.arguments) and command.arguments[0] in PROGRAMS:
            assert ran(command, monkeypatch) == command.exit_code, command


KNOWN: dict[str, Any] = {
    "input_ids": np.arange(3, 15).reshape(2, 6),
    "attention_mask": np.ones((2, 6), np.int32),
    "jax": jax,
    "jnp": jnp,
    "linen": linen,
    "Trace": Trace,
    "my_block": lambda layer, x_BTD: x_BTD,
}
"""What the pages' text stands for."""


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON} - {"docs/scaling.md"}))
def test_the_python_of_a_page_runs(page: str, place: Path, request: pytest.FixtureRequest) -> None:
    for converted in ("path/to/flax", "build/flax"):
        convert.convert("path/to/mixtral", converted)
    config = json.loads((place / "path/to/mixtral/config.json").read_text())
    known = {**KNOWN, "config": config}
    for block in blocks(page, "python"):
        # A block that converts writes where the one before it read.
        text = block.text.replace(
            'convert.convert("path/to/mixtral", "path/to/flax")', 'convert.convert("path/to/mixtral", "new")'
        )
        exec(compile(text, page, "exec"), known)
    for name, function in list(known.items()):
        if name.startswith("test_"):
            function(request.getfixturevalue("assert_parity"))


OF_32_DEVICES: dict[str, Any] = {
    "vocab_size": 104,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_hidden_layers": 4,
}
"""What 8 by 4 devices can share evenly."""


@pytest.mark.slow
def test_the_page_on_scaling_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "docs/scaling.md"
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "mixtral", **OF_32_DEVICES)
    before = "import numpy as np\ninput_ids = np.arange(3, 15).reshape(2, 6)\n"
    [block] = blocks(page, "python")
    code = before + block.text.replace("path/to/mixtral", "mixtral") + "print(len(jax.devices()), logits.shape)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=32"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "32 (2, 6, 104)\n", done.stderr
    converting, walking = (command for command in SHELL[page] if command.arguments[0] in PROGRAMS)
    assert ran(converting, monkeypatch) == 0  # so small a model is one file, and all of it the first share's
    assert walking.arguments[-2:] == ["--share", "1/4"]
    for share in ("1/4", "2/4", "3/4", "4/4"):
        assert ran(Command([*walking.arguments[:-1], share], 0), monkeypatch) == 0
    assert json.loads((tmp_path / "report" / "result.json").read_text())["verdict"] == "pass"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the site was not built: install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()
