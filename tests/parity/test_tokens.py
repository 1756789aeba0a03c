"""Continuations: prefill and decode are the full forward, tokens are transformers', and a wrong cache is named."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import Checkpoint
from flax_mixtral import cache, decoder
from parity.__main__ import main
from parity.decoding import Decoded, continuable, continued, in_steps, joined
from parity.diagnosis.cache_causes import cache_causes
from parity.inputs import padded
from parity.metrics import Precision
from parity.oracle.model import Oracle
from parity.port import Port
from parity.router import EXCUSED_ERRORS, Flip, LayerRouting
from parity.runner import run
from parity.selftest import faulty_cache as wrong
from parity.selftest.planting import Fault, planted
from parity.sides.torch_hf import TorchSide
from parity.tokens import Continuation, Tokens, follow, judge_decoding, judge_tokens
from parity.trace import Array, Batch
from parity.verdict import Place
from parity.weights import Rounded
from tests.checkpoints import write_checkpoint

NEW = 6
PLACE = Place(None, "cache", "p", "float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("tokens") / "torch"
    write_checkpoint(path, num_hidden_layers=2, sliding_window=17)
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def prompt(source: Checkpoint) -> Batch:
    """Longer than the window in one row, padded on the left in the other."""
    return padded("p", [np.arange(3, 26), np.arange(40, 54)], source.config, side="left")


def test_a_run_continues_the_prompts_and_passes(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([list(range(3, 26)), list(range(40, 54))]))
    command = ["mixtral-parity", "run", str(source.path), "--input-ids", str(ids), "--generate", str(NEW), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    result = json.loads(capsys.readouterr().out)
    found = {point["point"]: point for point in result["points"] if point["mode"] == "cache"}
    assert {name: point["verdict"] for name, point in found.items()} == {
        "prefill_logits": "pass",
        "decode_logits": "pass",
        "tokens": "pass",
    }
    assert all(point["decides"] for point in found.values())
    assert ended.value.code == 0, result["verdict"]


def test_what_ends_in_padding_is_no_prompt_and_no_pass(source: Checkpoint) -> None:
    right = padded("r", [np.arange(3, 26), np.arange(40, 54)], source.config, side="right")
    assert not continuable(right)
    result = run(source.path, inputs=[right], generate=NEW)
    assert result.verdict == "unchecked"
    assert any("no batch is a prompt" in (finding.reason or "") for finding in result.findings)


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "one-further": (decoder.context_of, wrong.one_further, "cache-position"),
    "without-itself": (cache.keys_in_sight, wrong.sight_without_itself, "cache-position"),
    "padding-counted": (decoder.context_of, wrong.counted_from_padding, "padding-positions"),
}


@pytest.mark.parametrize(("name", "dtype"), [("one-further", "bfloat16"), *((name, "float32") for name in FAULTS)])
def test_a_wrong_cache_is_found_in_decoding_alone_and_named(
    source: Checkpoint, prompt: Batch, name: str, dtype: Precision
) -> None:
    original, substitute, slug = FAULTS[name]
    fault = Fault(slug=slug, shows=(), place="cache", functions=lambda config: ((original, substitute),))
    port = planted(fault, 0)(Port(source.config, source.view("flax")))
    legacy, fused = (Rounded(source.view(layout), dtype) for layout in ("hf-legacy", "hf-fused"))
    torch = TorchSide(source.config, source.raw_config, fused, dtype=dtype)
    flax: Any = port.side(port.config, Rounded(port.weights, dtype))
    fed_BX = torch.generate(prompt, NEW)[:, :-1]
    found = follow(source.config, (torch, flax, Oracle(source.config, legacy)), prompt, fed_BX, dtype)
    findings = list(judge_decoding(replace(PLACE, dtype=dtype), found))
    assert [(finding.point, finding.verdict) for finding in findings] == [
        ("prefill_logits", "pass"),
        ("decode_logits", "fail"),
    ]
    causes = cache_causes(source.config, legacy, Tokens(findings, [found]))
    assert [cause.fault for cause in causes] == [slug], causes


def test_a_fault_in_the_cache_fails_a_run(source: Checkpoint, prompt: Batch) -> None:
    functions = ((decoder.context_of, wrong.one_further),)
    fault = Fault(slug="cache-position", shows=(), place="cache", functions=lambda config: functions)
    result = run(source.path, inputs=[prompt], generate=NEW, change=planted(fault, 0))
    failed = {finding.point for finding in result.findings if finding.verdict == "fail"}
    assert failed == {"decode_logits", "tokens"}, "the walk and the prompt are right"
    assert result.first_divergence is not None
    assert result.first_divergence.point == "decode_logits"
    assert [cause.fault for cause in result.causes] == ["cache-position"]


# --- the rule for tokens, on arrays whose answer is known

X, V = 5, 7
ERROR = 1e-3


def _continuation(apart: float, flip: Flip | None = None, tie: bool = False) -> Continuation:
    """One row of logits in which torch's candidate 2 and Flax's 4 lie so far apart at place 3."""
    exact_BXV = np.tile(np.arange(V, dtype=np.float64), (1, X, 1))
    exact_BXV[0, 3, [2, 4]] = 20, 20 - apart
    torch_BXV = exact_BXV + ERROR * np.where(np.arange(V) % 2, 1, -1)
    if tie:
        torch_BXV[0, 3, 4] = torch_BXV[0, 3, 2]
    prompt = Batch("p", np.zeros((1, 3), np.int64))
    routing = LayerRouting(tokens=7, flips=() if flip is None else (flip,), min_margin=1.0, median_margin=1.0, load=())
    whole = continued(prompt, np.zeros((1, X - 1), np.int64))
    decoded = Decoded(torch_BXV, [])
    return Continuation(prompt, whole, decoded, decoded, exact_BXV, [routing], "float32")


def _tokens(candidate: int) -> Array:
    return np.array([[6, 6, 6, candidate, 6]])


@pytest.mark.parametrize(
    ("apart", "flip", "tie", "verdict"),
    [
        (0.9 * EXCUSED_ERRORS * ERROR, None, False, "pass"),
        (1.1 * EXCUSED_ERRORS * ERROR, None, False, "fail"),
        (1.0, Flip(5, (0,), (1,), 0.0, 1.0, False), False, "pass"),  # token 5 is the one before place 3
        (1.0, Flip(6, (0,), (1,), 0.0, 1.0, False), False, "fail"),  # after it
        (1.0, Flip(5, (0,), (1,), 9.0, 1.0, False), False, "fail"),  # no rounding: no excuse
    ],
)
def test_tokens_may_differ_where_rounding_decides(apart: float, flip: Flip | None, tie: bool, verdict: str) -> None:
    found = judge_tokens(PLACE, _tokens(2), _tokens(4), _continuation(apart, flip, tie))
    assert found.verdict == verdict
    if verdict == "fail":
        assert "row 0 parts at new token 3: torch 2, Flax 4" in (found.reason or "")


def test_an_exact_tie_of_torchs_logits_excuses() -> None:
    assert judge_tokens(PLACE, _tokens(2), _tokens(4), _continuation(1e-2, tie=True)).verdict == "pass"


def test_equal_tokens_pass_and_missing_ones_do_not() -> None:
    found = _continuation(1.0)
    assert judge_tokens(PLACE, _tokens(2), _tokens(2), found).verdict == "pass"
    assert judge_tokens(PLACE, _tokens(2), _tokens(2)[:, :-1], found).verdict == "fail"
    assert judge_tokens(PLACE, _tokens(2)[:0], _tokens(2)[:0], found).verdict == "unchecked"


def test_steps_are_put_together_row_by_row() -> None:
    batch, ids_BX = Batch("b", np.arange(6).reshape(2, 3)), np.array([[6, 7], [8, 9]])
    whole = continued(batch, ids_BX)
    steps = [[{"router_ids": whole.input_ids[:, step].reshape(-1, 1)}] for step in in_steps(batch, ids_BX)]
    np.testing.assert_array_equal(joined(steps, 2)[0]["router_ids"].ravel(), whole.input_ids.ravel())
