"""Why a continuation is wrong although one full forward is right: the oracle's full forward under each hypothesis.

A cache that is wrong is the same as a full forward in which the new tokens stand at other positions, or see other keys.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.diagnosis.cause import UNKNOWN, Cause
from parity.metrics import UNIT_ROUNDOFF, Margin, margin
from parity.oracle import operations as exact
from parity.oracle.model import EXACT, Ops, Oracle
from parity.tokens import Continuation, Tokens, exact_logits
from parity.trace import Array, Batch
from parity.verdict import MARGIN_LIMIT, Finding

__all__ = ["FORMS", "cache_causes"]

CLEARLY = 3.0
"""As in the diagnosis of a block: a hypothesis must bring Flax so many times nearer than the right answer does."""

POINT = "decode_logits"


class Form(NamedTuple):
    """One way in which a cache is wrong: what it does, and the operations that it changes, for a prompt of T tokens."""

    slug: str
    says: str
    ops: Callable[[int], Ops]


def _moved(by: int) -> Callable[[int], Ops]:
    def positions(T: int, batch: Batch) -> Array:
        position_BT = exact.position_ids(batch).copy()
        position_BT[:, T:] += by
        return position_BT

    return lambda T: replace(EXACT, positions=lambda batch: positions(T, batch))


def _padding_counted(T: int) -> Ops:
    def positions(batch: Batch) -> Array:
        position_BT = exact.position_ids(batch).copy()
        position_BT[:, T:] = np.arange(T, position_BT.shape[1])
        return position_BT

    return replace(EXACT, positions=positions)


def _seen(change: Callable[[Array, int, Batch, int | None], None]) -> Callable[[int], Ops]:
    """Change which keys the new tokens see, in place."""

    def visible(T: int, batch: Batch, window: int | None) -> Array:
        visible_BTS = exact.visible_keys(batch, window).copy()
        change(visible_BTS, T, batch, window)
        return visible_BTS

    return lambda T: replace(EXACT, visible=lambda batch, window: visible(T, batch, window))


def _not_itself(visible_BTS: Array, T: int, batch: Batch, window: int | None) -> None:
    new = np.arange(T, visible_BTS.shape[1])
    visible_BTS[:, new, new] = False


def _not_the_last_of_the_prompt(visible_BTS: Array, T: int, batch: Batch, window: int | None) -> None:
    visible_BTS[:, T:, T - 1] = False


def _window(by: int) -> Callable[[Array, int, Batch, int | None], None]:
    def change(visible_BTS: Array, T: int, batch: Batch, window: int | None) -> None:
        other = window + by if window is not None else batch.input_ids.shape[1] - 1
        visible_BTS[:, T:] = exact.visible_keys(batch, other)[:, T:]

    return change


FORMS = (
    Form("cache-position", "new tokens one position too far", _moved(1)),
    Form("cache-position", "new tokens one position too early", _moved(-1)),
    Form("cache-position", "new tokens that do not see themselves", _seen(_not_itself)),
    Form("cache-position", "the prompt's last token out of the new ones' sight", _seen(_not_the_last_of_the_prompt)),
    Form("padding-positions", "positions of new tokens that count the padding", _padding_counted),
    Form("window-off-by-one", "a window of one more for new tokens", _seen(_window(1))),
    Form("window-off-by-one", "a window of one less for new tokens", _seen(_window(-1))),
)


@dataclass(frozen=True, slots=True)
class _Fit:
    form: Form
    margin: float
    error: float


def cache_causes(config: MixtralConfig, weights: Mapping[str, Array], tokens: Tokens) -> list[Cause]:
    """Name what is behind continuations that failed while everything else passed.

    Args:
        config: the model's.
        weights: Hugging Face's legacy names to the arrays that were computed with.
        tokens: how the prompts were continued; the first one that failed is examined.
    """
    failed = [finding for finding in tokens.findings if finding.verdict == "fail" and finding.decides]
    if not failed:
        return []
    first = failed[0].batch
    points = {finding.point: finding for finding in failed if finding.batch == first}
    if POINT not in points:
        return [_of_tokens(points["tokens"])] if list(points) == ["tokens"] else []
    found = next(own for own in tokens.continuations if own.prompt.name == first)
    right = _margin(found, found.exact_BXV)
    tried = [_try(config, weights, found, form) for form in FORMS]
    limit = MARGIN_LIMIT[found.dtype]
    fitting = [fit for fit in tried if fit.margin <= limit and fit.error * CLEARLY <= right.flax_error]
    if not fitting:
        nearest = ", ".join(f"{fit.form.says} leaves {fit.error:.2g}" for fit in sorted(tried, key=_by_error)[:3])
        evidence = (
            f"Flax's relative error is {right.flax_error:.2g} ({right.value:.3g} x torch's); ruled out: {nearest}"
        )
        return [Cause(UNKNOWN, None, POINT, evidence)]
    return list(_named(fitting, right.flax_error))


def _by_error(fit: _Fit) -> float:
    return fit.error


def _named(fitting: Sequence[_Fit], error: float) -> Iterator[Cause]:
    best, *_ = ranked = sorted(fitting, key=_by_error)
    for fit in ranked:
        if fit.error <= CLEARLY * best.error:
            evidence = (
                f"with {fit.form.says}, Flax's relative error falls from {error:.2g} to {fit.error:.2g} "
                f"({fit.margin:.2g} x torch's)"
            )
            yield Cause(fit.form.slug, None, POINT, evidence)


def _of_tokens(finding: Finding) -> Cause:
    evidence = f"the logits of every step are right, so that the loop around them chooses otherwise: {finding.reason}"
    return Cause(UNKNOWN, None, "tokens", evidence)


def _try(config: MixtralConfig, weights: Mapping[str, Array], found: Continuation, form: Form) -> _Fit:
    """Run the oracle as the form has it, with the experts that Flax was given."""
    first = found.prompt.input_ids.shape[1] - 1
    oracle = Oracle(config, weights, form.ops(first + 1))
    routing = [own["router_ids"] for own in found.torch.routing]
    logits_BTV, _ = exact_logits(config, oracle, found.whole, routing)
    fit = _margin(found, logits_BTV[:, first:])
    return _Fit(form, fit.value, fit.flax_error)


def _margin(found: Continuation, answer_BXV: Array) -> Margin:
    """Measure Flax's decode logits against an answer, in one row; the yardstick is torch's error of the right one."""
    answer, right, torch, flax = (
        x_BXV[:, 1:].astype(np.float64).reshape(1, -1)
        for x_BXV in (answer_BXV, found.exact_BXV, found.torch.logits_BXV, found.flax.logits_BXV)
    )
    return margin(answer + (torch - right), flax, answer, UNIT_ROUNDOFF[found.dtype])
