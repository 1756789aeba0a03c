"""Ports that are not ours: docs/own-port.md as it stands, and sides that offer a part of the protocol."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from convert import BadInput, convert
from examples.plain_jax import PlainJax
from parity.__main__ import main
from parity.drawn import DEFAULT, draw
from parity.result import Divergence
from parity.runner import run
from parity.sides.flax import FlaxSide
from parity.trace import Array, Batch, Trace
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own-port.md"


def blocks() -> Iterator[tuple[str, str]]:
    """Give the page's commands, each with the output that the page shows of it."""
    parts = re.findall(r"```(\w*)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for number, (language, text) in enumerate(parts):
        if language == "sh":
            after = parts[number + 1] if number + 1 < len(parts) else ("sh", "")
            yield text, after[1] if after[0] == "" else ""


def test_the_commands_of_the_page_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    said = 0
    for commands, output in blocks():
        for line in commands.splitlines():
            command, _, comment = line.partition("  # exit code ")
            program, *arguments = shlex.split(command)
            if program == "python":
                environment = {"PYTHONPATH": str(ROOT)}
                subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
                continue
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            code = 0
            try:
                main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            printed = re.sub(r"\s+", " ", capsys.readouterr().out)
            assert code == int(comment), (command, printed)
            for expected in output.splitlines():
                assert expected in printed, (command, expected, printed[-2000:])
                said += 1
    assert said >= 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "mixtral"
    write_checkpoint(path, num_hidden_layers=2)
    return path


class BlocksAlone:
    """A right port that shows the outputs of its blocks."""

    def __init__(self, *given: object):
        self._flax = FlaxSide(*given)  # type: ignore[arg-type]  # as the factory is called

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        return Trace({"resid_out": self._flax.block(layer, x_BTD, batch, routing)["resid_out"]})


class Misspelt(BlocksAlone):
    """One that calls a point otherwise."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        return Trace({"residual_out": x_BTD})


class NothingAtAll:
    """One that shows nothing."""

    def __init__(self, *given: object):
        pass


@pytest.mark.parametrize("side", [BlocksAlone, NothingAtAll])
def test_what_a_side_does_not_offer_is_unchecked(checkpoint: Path, side: type) -> None:
    result = run(checkpoint, inputs="quick", side=side)
    assert result.verdict == "unchecked"
    assert result.exit_code == 4
    passed = {finding.point for finding in result.findings if finding.verdict == "pass" and finding.mode != "reference"}
    assert passed == ({"resid_out"} if side is BlocksAlone else set())


class WrongAtOnce(BlocksAlone):
    """One that says nothing of its routing and whose first norm is wrong."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        own = self._flax.block(layer, x_BTD, batch, routing)
        return Trace({"input_norm": own["input_norm"] * 2, "resid_out": own["resid_out"]})


def test_what_no_flip_can_reach_fails_though_the_routing_is_unknown(checkpoint: Path) -> None:
    result = run(checkpoint, inputs="quick", dtype="bfloat16", side=WrongAtOnce)
    assert result.verdict == "fail"
    wrong = [f for f in result.findings if f.point == "input_norm" and f.mode == "local" and f.dtype == "bfloat16"]
    assert [finding.verdict for finding in wrong] == ["fail", "fail"], "one a layer"


class Unsaid(FlaxSide):
    """A right port, whole, that says nothing of its routing."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        return Trace({"resid_out": super().block(layer, x_BTD, batch, routing)["resid_out"]})


def test_where_the_router_ties_a_port_that_does_not_say_how_it_routed_is_not_accused(tmp_path: Path) -> None:
    config = replace(DEFAULT, num_hidden_layers=2, num_experts_per_tok=3)
    convert(draw(tmp_path / "drawn", config, tied_routers=True), tmp_path / "torch", to="hf-fused")
    result = run(tmp_path / "torch", inputs="quick", side=Unsaid)
    assert result.verdict == "unchecked", result.first_divergence
    unsaid = [f for f in result.findings if "does not say how it routed" in (f.reason or "")]
    assert {(f.point, f.mode) for f in unsaid} >= {
        ("resid_out", "local"),
        ("logits", "propagated"),
        ("logits", "whole"),
    }


class WrongUnsaid(Unsaid):
    """The same with a wrong output."""

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        return Trace({"resid_out": super().block(layer, x_BTD, batch, routing)["resid_out"] * 1.01})


def test_where_the_router_is_clear_a_port_that_does_not_say_how_it_routed_is_judged(checkpoint: Path) -> None:
    result = run(checkpoint, inputs="quick", side=WrongUnsaid)
    assert result.first_divergence == Divergence(0, "resid_out")


def test_a_point_that_nobody_knows_is_refused(checkpoint: Path) -> None:
    with pytest.raises(BadInput, match="'residual_out', which is no comparison point; did you mean resid_out"):
        run(checkpoint, inputs="quick", side=Misspelt)


def test_the_foreign_port_passes_padded_batches_of_the_standard_suite(checkpoint: Path) -> None:
    assert run(checkpoint, inputs="standard", side=PlainJax).verdict == "pass"


@pytest.mark.parametrize("factory", ["nothing", "examples.plain_jax:nothing", "no_such_module:side"])
def test_a_factory_that_is_none_is_wrong_usage(
    factory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixtral-parity", "run", "anything", "--flax-side", factory])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert factory.split(":")[0] in capsys.readouterr().err
