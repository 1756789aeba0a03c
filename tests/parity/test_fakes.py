"""The comparison itself on trial: sides of NumPy alone, honest but for one lie at one point, never pass.

The NumPy side stands for both frameworks. A lie is told in one layer by the one in Flax's place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from convert import Checkpoint
from parity.decoding import Decoded, continued
from parity.drawn import DEFAULT, draw
from parity.inputs import padded
from parity.metrics import Precision
from parity.oracle.model import Oracle
from parity.points import block_points, head_points, operation_points
from parity.sides.narrow import NarrowSide
from parity.sides.remembering import Remembering
from parity.tokens import Continuation, judge_decoding, judge_tokens
from parity.trace import Array, Batch, Trace
from parity.verdict import Finding, Mode, Place, overall
from parity.walk import Sides, Walk
from parity.weights import Rounded

CONFIG = replace(
    DEFAULT, vocab_size=53, hidden_size=24, intermediate_size=18, num_hidden_layers=2, num_local_experts=5, head_dim=10
)
LAYER = 1

Lie = Callable[[Array], Any]
"""Gives what is told instead of an array; None leaves it out."""


def _with_nan(array: Array) -> Array:
    changed = array.astype(np.float64) if array.dtype.kind == "i" else array.copy()
    changed.reshape(-1)[-1] = np.nan  # of the last token, which is real, and of its own key
    return changed


def _of_another_dtype(array: Array) -> Array:
    return array.astype(np.float64 if array.dtype != np.float64 else np.float32)


def _tokens_reversed(array: Array) -> Array:
    """Turn the axis of tokens round: the second of [B, T, ...], the last of scores [B, N, T, S], else the first."""
    return np.flip(array, axis=min(array.ndim - 1, {3: 1, 4: 1}.get(array.ndim, 0)))


LIES: dict[str, Lie] = {
    "omitted": lambda array: None,
    "empty": lambda array: array[:0] if array.ndim else np.empty(0, array.dtype),
    "not-finite": _with_nan,
    "another-dtype": _of_another_dtype,
    "another-token-order": _tokens_reversed,
    "another-shape": lambda array: array[..., :-1] if array.ndim else array[None, None],
    "zeros": lambda array: np.zeros_like(array),
}


class Fake(NarrowSide):
    """A side of NumPy that lies where it is told to."""

    def __init__(self, weights: Mapping[str, Array], dtype: Precision, lie: Lie, point: str, mode: Mode):
        super().__init__(CONFIG, weights, dtype)
        self.lie, self.point, self.mode = lie, point, mode

    def embed(self, batch: Batch) -> Array:
        found = super().embed(batch)
        return self.lie(found) if self.point == "embed" else found

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        trace = super().block(layer, x_BTD, batch, routing)
        return self._told(trace) if layer == LAYER and self.mode == "local" else trace

    def operations(self, layer: int, x_BTD: Array, given: Trace, batch: Batch) -> Trace:
        trace = super().operations(layer, x_BTD, given, batch)
        return self._told(trace) if layer == LAYER and self.mode == "operation" else trace

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        return self._told(super().head(x_BTD, batch))

    def losses(self, logits: Array, router_logits: Sequence[Array], batch: Batch) -> Trace:
        return self._told(super().losses(logits, router_logits, batch))

    def _told(self, trace: Trace) -> Trace:
        if self.point in trace.arrays:
            told = self.lie(trace.arrays.pop(self.point))
            trace.arrays.update({} if told is None else {self.point: told})
        return trace


class Recorder(NarrowSide):
    """The side in torch's place: it also records what attention does inside."""

    name = "torch"

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        trace = super().block(layer, x_BTD, batch, routing)
        ops, heads = self.oracle.ops, CONFIG.num_attention_heads
        q, k = (trace[name].astype(self.oracle.dtype) for name in ("q_rot", "k_rot"))
        scores = ops.scores(q, ops.repeat(k, heads))
        probs = ops.attention_softmax(scores, ops.visible(batch, CONFIG.sliding_window))
        trace.arrays.update(attn_scores=scores.astype(self.dtype), attn_probs=probs.astype(self.dtype))
        return trace


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(draw(tmp_path_factory.mktemp("fakes") / "drawn", CONFIG, seed=3))


BATCH = padded("b", [np.arange(3, 22), np.arange(5, 18)], CONFIG, side="left")


class Court:
    """The honest sides of one dtype, computed once."""

    def __init__(self, source: Checkpoint, dtype: Precision):
        self.dtype = dtype
        self.weights = Rounded(source.view("hf-legacy"), dtype)
        self.torch = Remembering(Recorder(CONFIG, self.weights, dtype))
        self.exact = Remembering(Oracle(CONFIG, self.weights))

    def findings(self, lie: Lie, point: str, mode: Mode = "local") -> list[Finding]:
        flax = Fake(self.weights, self.dtype, lie, point, mode)
        return list(Walk(CONFIG, Sides(self.torch, flax, self.exact), [BATCH], dtype=self.dtype).run())


@pytest.fixture(scope="module")
def courts(source: Checkpoint) -> dict[Precision, Court]:
    return {"float32": Court(source, "float32"), "bfloat16": Court(source, "bfloat16")}


def _cases() -> Iterator[tuple[Precision, Mode, str]]:
    for name, _ in block_points(CONFIG):
        if name != "lens":  # not a side's own: the walk applies the head
            yield "float32", "local", name
    for name in ("embed", *(name for name, _ in head_points(CONFIG))):
        yield "float32", "local", name
    for name, _ in operation_points(CONFIG):
        yield "bfloat16", "operation", name


CASES = [case for case in _cases() if not case[2].startswith("expert.") or case[2].startswith("expert.3.")]
"""One expert stands for all."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_honest_fake_passes(courts: dict[Precision, Court], dtype: Precision) -> None:
    findings = courts[dtype].findings(lambda array: array, "")
    assert overall(findings) == "pass", [finding for finding in findings if finding.verdict != "pass"]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(("dtype", "mode", "point"), CASES)
def test_a_lie_at_one_point_never_passes(
    courts: dict[Precision, Court], dtype: Precision, mode: Mode, point: str, lie: str
) -> None:
    if lie == "another-token-order" and point in ("loss", "aux_loss"):
        pytest.skip("a scalar has no order")
    findings = courts[dtype].findings(LIES[lie], point, mode)
    assert overall(findings) != "pass"
    own = {
        finding.verdict
        for finding in findings
        if finding.point == point and finding.mode == mode and finding.layer in (None, LAYER)
    }
    assert own
    assert "pass" not in own


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie != "omitted"])  # tokens without logits are no continuation
def test_a_lie_in_decoding_never_passes(lie: str) -> None:
    exact_BXV = np.random.default_rng(0).normal(size=(2, 9, 53))
    torch_BXV = exact_BXV.astype(np.float32)
    decoded = [Decoded(array, []) for array in (torch_BXV, LIES[lie](torch_BXV))]
    whole = continued(BATCH, np.zeros((2, 8), np.int64))
    found = Continuation(BATCH, whole, decoded[0], decoded[1], exact_BXV, [], "float32")
    place = Place(None, "cache", BATCH.name, "float32")
    findings = {finding.point: finding.verdict for finding in judge_decoding(place, found)}
    assert findings["decode_logits"] != "pass"
    assert overall(list(judge_decoding(place, found))) != "pass"


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie != "omitted"])
def test_a_lie_in_the_tokens_never_passes(lie: str) -> None:
    logits_BXV = np.random.default_rng(0).normal(size=(2, 9, 53))
    decoded = Decoded(logits_BXV.astype(np.float32), [])
    whole = continued(BATCH, np.zeros((2, 8), np.int64))
    found = Continuation(BATCH, whole, decoded, decoded, logits_BXV, [], "float32")
    torch_BX = logits_BXV.argmax(axis=-1)
    told = LIES[lie](torch_BX)
    assert judge_tokens(Place(None, "cache", BATCH.name, "float32"), torch_BX, told, found).verdict != "pass"
