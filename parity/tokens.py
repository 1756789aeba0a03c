"""Continuations compared: prefill and decode with a cache against the oracle's full forward, and the greedy tokens.

Whole models are run: like gradients, this is a part of a run that needs memory for all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.decoding import Decoded, Generates, continuable, continued
from parity.metrics import Precision
from parity.points import POINTS
from parity.router import EXCUSED_ERRORS, LayerRouting, compare_routing
from parity.sides import Side
from parity.trace import Array, Batch, Trace
from parity.verdict import Finding, Place, judge

__all__ = ["Continuation", "Tokens", "compare_tokens", "exact_logits", "follow", "judge_decoding", "judge_tokens"]

FEW_ROWS = 16
"""Fewer rows are judged as one: a channel of them is hardly more than one number, whose own relative error says nothing
about rounding."""

BY_NAME = {point.name: point for point in POINTS}


@dataclass(frozen=True, slots=True)
class Continuation:
    """One prompt with torch's tokens after it, as every side ran it with torch's experts.

    Args:
        prompt: the batch.
        whole: the prompt and all tokens that were fed.
        torch: torch's logits and routing.
        flax: Flax's.
        exact_BXV: the oracle's logits, of one full forward.
        routing: how the sides' own choices of experts compare, by layer; None where a side does not say.
        dtype: what torch and Flax computed in.
    """

    prompt: Batch
    whole: Batch
    torch: Decoded
    flax: Decoded
    exact_BXV: Array
    routing: Sequence[LayerRouting | None]
    dtype: Precision


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a run made of its continuations.

    Args:
        findings: of every prompt.
        continuations: how each was run.
    """

    findings: list[Finding] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether something that decides failed."""
        return any(finding.verdict == "fail" and finding.decides for finding in self.findings)


def compare_tokens(
    config: MixtralConfig,
    sides: tuple[Generates, Generates, Side],
    batches: Sequence[Batch],
    new: int,
    dtype: Precision,
) -> Tokens:
    """Continue every batch that can be a prompt on all sides, and judge logits and tokens.

    Args:
        config: the model's.
        sides: torch, whose tokens are followed, Flax and the oracle.
        batches: those that end in padding, or have positions of their own, are no prompts.
        new: how many tokens.
        dtype: what torch and Flax compute in. In bfloat16 tokens inform: the sides route freely there.
    """
    torch, flax, _ = sides
    found, place = Tokens(), Place(None, "cache", "", dtype)
    prompts = [batch for batch in batches if continuable(batch)]
    if config.architecture != "MixtralForCausalLM":
        found.findings.append(place.finding("tokens", "unchecked", f"{config.architecture} generates no tokens"))
        return found
    if not prompts:
        reason = "no batch is a prompt: every row must end in a real token, and positions count the real ones"
        found.findings.append(place.finding("tokens", "unchecked", reason))
    for batch in prompts:
        own = replace(place, batch=batch.name)
        torch_BX, flax_BX = torch.generate(batch, new), flax.generate(batch, new)
        if torch_BX is None or flax_BX is None:
            found.findings.append(own.finding("tokens", "unchecked", "a side cannot generate"))
            continue
        continuation = follow(config, sides, batch, torch_BX[:, :-1], dtype)
        found.continuations.append(continuation)
        found.findings.extend(judge_decoding(own, continuation))
        deciding = replace(own, decides=dtype == "float32")
        found.findings.append(judge_tokens(deciding, torch_BX, flax_BX, continuation))
    return found


def follow(
    config: MixtralConfig, sides: tuple[Generates, Generates, Side], batch: Batch, ids_BX: Array, dtype: Precision
) -> Continuation:
    """Run every side on a prompt and the tokens after it, Flax and the oracle with the experts that torch chose.

    Args:
        config: the model's.
        sides: torch and Flax, which decode with their caches, and the oracle, which runs all tokens in one forward.
        batch: the prompt.
        ids_BX: the tokens to feed.
        dtype: what torch and Flax compute in.
    """
    torch, flax, oracle = sides
    whole = continued(batch, ids_BX)
    torch_found = torch.decode(batch, ids_BX)
    assert torch_found is not None, "a side that generates also decodes"
    experts = [own["router_ids"] for own in torch_found.routing]
    flax_found = flax.decode(batch, ids_BX, experts)
    assert flax_found is not None, "a side that generates also decodes"
    exact_BTV, exact = exact_logits(config, oracle, whole, experts)
    routing = [
        _compare_routing(torch_found.routing[layer], own, exact[layer], whole)
        for layer, own in enumerate(flax_found.routing)
    ]
    exact_BXV = exact_BTV[:, batch.input_ids.shape[1] - 1 :]
    return Continuation(batch, whole, torch_found, flax_found, exact_BXV, routing, dtype)


def exact_logits(
    config: MixtralConfig, oracle: Side, batch: Batch, routing: Sequence[Array]
) -> tuple[Array, list[Trace]]:
    """Run the oracle over a whole batch with the given experts: logits [B, T, V], and each layer's trace."""
    x_BTD, traces = oracle.embed(batch), []
    for layer in range(config.num_hidden_layers):
        trace = oracle.block(layer, x_BTD, batch, routing[layer])
        x_BTD = trace["resid_out"]
        traces.append(Trace({name: trace[name] for name in ("router_logits", "router_ids")}))
    return oracle.head(x_BTD, batch)["logits"], traces


def judge_decoding(place: Place, found: Continuation) -> Iterator[Finding]:
    """Judge the logits after the prompt, and those of the tokens fed through the cache.

    Args:
        place: in mode cache, without a layer.
        found: how every side ran.
    """
    for name, part in (("prefill_logits", slice(0, 1)), ("decode_logits", slice(1, None))):
        sides = [x_BXV[:, part] for x_BXV in (found.torch.logits_BXV, found.flax.logits_BXV, found.exact_BXV)]
        if len({x_BXV.shape for x_BXV in sides}) == 1 and sides[0].size // sides[0].shape[-1] < FEW_ROWS:
            sides = [x_BXV.reshape(1, 1, -1) for x_BXV in sides]
        yield judge(name, BY_NAME[name], place, *sides)


def judge_tokens(place: Place, torch_BX: Array, flax_BX: Array, found: Continuation) -> Finding:
    """Judge the greedy tokens of both sides' `generate`: equal, or first different within rounding.

    As for experts, that is where the exact logits of the two candidates are at most `EXCUSED_ERRORS` times the
    calibrated error of torch's logits apart: the largest at that place, at least the median over all places; or where
    torch's own are equal; or after a token of the row for which the sides chose different experts.

    Args:
        place: in mode cache, without a layer.
        torch_BX: torch's new tokens; all but the last were fed to every side.
        flax_BX: Flax's.
        found: how every side ran.
    """
    if torch_BX.shape != flax_BX.shape:
        return place.finding("tokens", "fail", f"shapes differ: torch {torch_BX.shape}, flax {flax_BX.shape}")
    if torch_BX.size == 0:
        return place.finding("tokens", "unchecked", "empty")
    V = found.exact_BXV.shape[-1]
    if flax_BX.dtype.kind not in "iu" or not ((flax_BX >= 0) & (flax_BX < V)).all():
        return place.finding("tokens", "fail", f"Flax's tokens are not all integers from 0 to {V - 1}")
    error_BX = np.abs(found.torch.logits_BXV.astype(np.float64) - found.exact_BXV).max(axis=-1)
    calibrated_BX = np.maximum(error_BX, np.median(error_BX))
    flipped_BX = _flipped(found)
    excused, reasons = 0, []
    for b, x in _first_differences(torch_BX, flax_BX):
        pair = [int(torch_BX[b, x]), int(flax_BX[b, x])]
        exact, own = found.exact_BXV[b, x, pair], found.torch.logits_BXV[b, x, pair]
        apart = float(abs(exact[0] - exact[1]))
        if flipped_BX[b, x] or own[0] == own[1] or apart <= EXCUSED_ERRORS * calibrated_BX[b, x]:
            excused += 1
        else:
            reasons.append(
                f"row {b} parts at new token {x}: torch {pair[0]}, Flax {pair[1]}, whose exact logits are {apart:.3g} "
                f"apart at a logit error of {calibrated_BX[b, x]:.3g}"
            )
    if reasons:
        return place.finding("tokens", "fail", "; ".join(reasons))
    return place.finding(
        "tokens", "pass", f"{excused} of {len(torch_BX)} rows part within rounding" if excused else None
    )


def _first_differences(torch_BX: Array, flax_BX: Array) -> Iterator[tuple[int, int]]:
    for b, differs_X in enumerate(torch_BX != flax_BX):
        if differs_X.any():
            yield b, int(differs_X.argmax())


def _compare_routing(torch: Trace, flax: Trace, exact: Trace, whole: Batch) -> LayerRouting | None:
    if any(name not in flax.arrays or len(flax[name]) != len(torch[name]) for name in torch.arrays):
        return None
    return compare_routing(torch, flax, exact, whole)


def _flipped(found: Continuation) -> Array:
    """Mark the places of logits [B, X] by which some layer has chosen other experts, within rounding, in that row."""
    flipped_M = np.zeros(found.whole.input_ids.size, bool)
    flips = (flip for layer in found.routing if layer is not None for flip in layer.flips if flip.excused)
    flipped_M[[flip.token for flip in flips]] = True
    by_row_BT = np.logical_or.accumulate(flipped_M.reshape(found.whole.input_ids.shape), axis=1)
    flipped_BX: Array = by_row_BT[:, found.prompt.input_ids.shape[1] - 1 :]
    return flipped_BX
