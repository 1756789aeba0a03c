"""Baselines: a margin that grew beyond its noise fails, also within the verdict; the file says what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert import BadInput
from parity.baseline import Baseline, BaselineDiff
from parity.noise import BENIGN, with_baseline
from parity.report.summary import title
from parity.result import Result
from parity.runner import run
from parity.verdict import Finding
from tests.checkpoints import write_checkpoint
from tests.parity.report.results import FAIL, PASS


def varied(result: Result, factor: float, point: str | None = None) -> Result:
    """Multiply the margins of a result, or those of one point in layer 1."""

    def grown(f: Finding) -> Finding:
        is_meant = point is None or (f.layer, f.point) == (1, point)
        return replace(f, margin=f.margin * factor) if f.margin is not None and is_meant else f

    return replace(result, findings=[grown(f) for f in result.findings])


def baseline_of(result: Result, *benign: Result) -> Baseline:
    findings = [each.findings for each in benign]
    return Baseline.of(result.dtype, result.findings, findings, result.packages, result.provenance)


def compared(baseline: Baseline, result: Result) -> BaselineDiff:
    path = Path("margins.json")
    return baseline.compare(path, result.dtype, result.findings, result.packages, result.provenance)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = baseline_of(PASS, varied(PASS, 1.4), varied(PASS, 0.8))
    written.write(tmp_path / "deep" / "margins.json")
    assert Baseline.read(tmp_path / "deep" / "margins.json") == written
    assert set(written.noise.values()) == {1.75}, "1.4 over 0.8"


def test_the_same_margins_pass() -> None:
    diff = compared(baseline_of(PASS, PASS), PASS)
    assert not diff.failed
    assert diff.compared == len([f for f in PASS.findings if f.margin is not None])


@given(st.floats(1, 5))
def test_a_margin_fails_beyond_its_noise_alone(factor: float) -> None:
    """All of these pass the verdict, whose limit is 10."""
    diff = compared(baseline_of(PASS, varied(PASS, 2.0)), varied(PASS, factor, "attn_context"))
    assert diff.failed == (factor > 2.0 * (1 + 1e-5))
    assert {(r.layer, r.point) for r in diff.regressions} == ({(1, "attn_context")} if diff.failed else set())


def test_a_grown_margin_fails_the_run_with_a_diff(tmp_path: Path) -> None:
    path = tmp_path / "margins.json"
    baseline_of(PASS, varied(PASS, 1.5)).write(path)
    result = with_baseline(varied(PASS, 4.0, "q"), path, again=lambda change: PASS)
    assert result.verdict == "fail"
    assert result.baseline is not None
    assert result.baseline.lines == [
        "layer 1, q (local, text, float32): 1.25 -> 5; noise explains 1.88",
        "layer 1, q (propagated, text, float32): 1.25 -> 5; noise explains 1.88",
    ]
    assert title(result) == "Flax still computes what PyTorch computes, but less closely than the baseline"


def test_a_margin_that_is_gone_fails() -> None:
    fewer = replace(PASS, findings=[f for f in PASS.findings if f.point != "lens"])
    diff = compared(baseline_of(PASS), fewer)
    assert {(r.point, r.now) for r in diff.regressions} == {("lens", None)}
    assert "not compared any more" in diff.lines[0]


def test_versions_are_those_of_each_sides_machine() -> None:
    elsewhere = {"jax": "0.9.0", "torch": "2.13.0", "transformers": "5.23.0"}
    here = {"jax": "0.10.2", "torch": None, "transformers": None}
    recorded = replace(PASS, environment={"torch": {"packages": elsewhere}, "flax": {"packages": here}})
    assert recorded.packages == {"jax": "0.10.2", "torch": "2.13.0", "transformers": "5.23.0"}


def test_changed_versions_are_listed() -> None:
    packages = {"flax-mixtral": "0.1.0", "jax": "0.10.3", "torch": None, "transformers": "5.23.0"}
    diff = compared(baseline_of(PASS), replace(PASS, environment={"packages": packages}))
    assert diff.changes == [
        "jax: 0.10.2 -> 0.10.3",
        "torch: 2.13.0 -> not installed",
        "transformers: not installed -> 5.23.0",
    ]
    assert not diff.failed, "a version alone is no fault"


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"provenance": {**PASS.provenance, "config_sha256": "c" * 64}}, "config.json"),
        ({"provenance": {**PASS.provenance, "inputs": []}}, "inputs"),
    ],
)
def test_another_comparison_is_refused(changed: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        compared(baseline_of(PASS), replace(PASS, **changed))


@pytest.mark.parametrize("content", ["", "[]", '{"baseline_version": 0}', '{"baseline_version": 1}'])
def test_what_is_no_baseline_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "margins.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"margins\.json"):
        Baseline.read(path)


def test_no_baseline_is_made_of_a_run_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "margins.json"
    result = with_baseline(replace(FAIL, baseline=None), path, again=lambda change: PASS)
    assert not path.exists()
    assert "a baseline is a run that passes" in result.notes[-1]


@pytest.mark.slow
def test_one_is_written_then_held_to(tmp_path: Path) -> None:
    """On a real model: its noise is measured once, and the same run passes."""
    write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    path = tmp_path / "margins.json"

    def again(change: Any = None) -> Result:
        return run(tmp_path / "model", inputs="quick", change=change)

    first = with_baseline(again(), path, again)
    assert first.verdict == "pass", first.first_divergence
    assert f"noise of {len(BENIGN)} correct variants" in first.notes[-1]
    second = with_baseline(again(), path, again)
    assert second.baseline is not None
    assert (second.verdict, second.baseline.lines, second.baseline.changes) == ("pass", [], [])
    content = json.loads(path.read_text())
    assert len(content["margins"]) == second.baseline.compared
    assert max(ratio for *_, ratio in content["noise"]) > 1
