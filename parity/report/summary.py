"""What every rendering says alike: the verdict in words, the groups of points, the command that reproduces the run."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from parity.diagnosis.cause import UNKNOWN, Cause
from parity.points import POINTS, kind_of
from parity.result import Divergence, Result
from parity.verdict import MARGIN_LIMIT, Finding, Verdict

__all__ = [
    "COLUMNS",
    "cause_line",
    "command",
    "environment_rows",
    "failures",
    "group_of",
    "headline",
    "place",
    "title",
    "tokens_compared",
    "verdict_of",
    "worst_of",
]

GROUPS = {
    "embedding": "embed",
    "attention": "input_norm q k v q_rot k_rot attn_scores attn_probs attn_context attn_out resid_mid",
    "router": "post_attn_norm router_logits router_probs router_ids router_weights",
    "experts": "expert.gate expert.up expert.act expert.down moe_out",
    "output": "resid_out lens",
    "head": "final_norm logits",
    "losses": "loss aux_loss",
    "decoding": "prefill_logits decode_logits tokens",
}
"""The point groups of a block and of the model's ends, in the order of computation."""

GROUP_OF = {point: group for group, points in GROUPS.items() for point in points.split()}

COLUMNS = tuple(kind_of(point.name) for point in POINTS)
"""The kinds of points of the forward pass, in the order of computation."""

TITLES: dict[Verdict, str] = {
    "pass": "Flax computes what PyTorch computes",
    "fail": "Flax does not compute what PyTorch computes",
    "unchecked": "Not everything could be checked",
}

MODES = {
    "local": "on PyTorch's input of the block",
    "operation": "alone, on PyTorch's input of the operation",
    "propagated": "on its own stream",
    "reference": "PyTorch as users run it, against its own walk",
    "whole": "the whole model as users run it",
    "cache": "continuing a prompt through the cache",
    "backward": "in the backward pass",
}
"""What each mode compares, in words."""


def group_of(finding: Finding) -> str:
    """Name the group that a finding belongs to."""
    if finding.mode in ("reference", "whole"):
        return "whole model"
    if finding.mode == "backward":
        return "gradients"
    return GROUP_OF.get(kind_of(finding.point), kind_of(finding.point))


def place(layer: int | None, point: str) -> str:
    """Say where a point stands."""
    return point if layer is None else f"layer {layer}, {point}"


def title(result: Result) -> str:
    """Give the verdict as a sentence."""
    if result.error is not None:
        return "The comparison stopped before it had a verdict"
    if result.verdict == "fail" and result.baseline is not None and not _parity_failed(result):
        return "Flax still computes what PyTorch computes, but less closely than the baseline"
    return TITLES[result.verdict]


def headline(result: Result) -> list[str]:
    """Explain the verdict in a few plain sentences."""
    if result.error is not None:
        lines = result.error.strip().splitlines()
        return [lines[-1] if lines[0].startswith("Traceback") else lines[0]]
    sentences = []
    first = result.first_divergence
    if first is not None:
        sentences.append(_first_sentence(result, first))
    elif result.worst is not None and result.worst.margin is not None:
        sentences.append(
            f"Nowhere is Flax more than {result.worst.margin:.2f} times as far from the exact answer as PyTorch is "
            f"({place(result.worst.layer, result.worst.point)}, {MODES[result.worst.mode]}); "
            f"the limit is {MARGIN_LIMIT[result.worst.dtype]:g} in {result.worst.dtype}."
        )
    if result.differences:
        names = ", ".join(difference.name for difference in result.differences[:3])
        more = f" and {len(result.differences) - 3} more" if len(result.differences) > 3 else ""
        sentences.append(f"Configuration or weights differ before anything is computed: {names}{more}.")
    unchecked = [finding for finding in result.findings if finding.verdict == "unchecked" and finding.decides]
    if unchecked:
        sentences.append(
            f"{len(unchecked)} of {len(result.findings)} comparisons could not be made, first "
            f"{place(unchecked[0].layer, unchecked[0].point)}: {unchecked[0].reason}."
        )
    if not result.findings:
        sentences.append("Nothing was compared.")
    if result.baseline is not None and result.baseline.failed:
        worse, compared = len(result.baseline.regressions), result.baseline.compared
        sentences.append(f"Against the baseline, {worse} of {compared} margins are worse, or gone.")
    return sentences


def cause_line(cause: Cause) -> str:
    """Say what is wrong, where, and what speaks for it."""
    name = "no known fault explains it" if cause.fault == UNKNOWN else cause.fault
    return f"{name}, at {place(cause.layer, cause.point)}: {cause.evidence}"


def failures(result: Result) -> list[Finding]:
    """List what did not pass and decides: failures first, each in the order of computation."""
    wrong = [finding for finding in result.findings if finding.verdict != "pass" and finding.decides]
    return sorted(wrong, key=lambda finding: finding.verdict != "fail")


def verdict_of(findings: Iterable[Finding]) -> Verdict:
    """Give the worst verdict among those that decide; pass where there is none."""
    verdicts = {finding.verdict for finding in findings if finding.decides}
    return "fail" if "fail" in verdicts else "unchecked" if "unchecked" in verdicts else "pass"


def worst_of(findings: Iterable[Finding]) -> Finding | None:
    """Give the finding with the largest margin."""
    measured = [finding for finding in findings if finding.margin is not None]
    return max(measured, key=lambda finding: finding.margin or 0.0, default=None)


def tokens_compared(result: Result) -> int:
    """Count the real tokens of all inputs."""
    return sum(each["real_tokens"] for each in result.provenance.get("inputs", ()))


def command(result: Result) -> str:
    """Give the command line that makes this result again."""
    argv: Sequence[str] = result.provenance.get("command", ())
    if not argv:
        return ""
    program = Path(argv[0])
    is_package = program.name == "__main__.py"  # python -m gives the file that it found
    return shlex.join([*(("python", "-m", program.parent.name) if is_package else (program.name,)), *argv[1:]])


def environment_rows(result: Result) -> list[tuple[str, str]]:
    """List the machine and the versions, of each side where each was recorded on its own."""
    recorded = {side: each for side, each in result.environment.items() if side in ("torch", "flax")}
    rows = []
    for side, environment in (recorded or {"": result.environment}).items():
        before = f"{side} side: " if side else ""
        packages = environment.get("packages", {})
        for name, value in {**environment, **packages}.items():
            if name != "packages":
                rows.append((before + name, "not installed" if value is None else str(value)))
    return rows


def _first_sentence(result: Result, first: Divergence) -> str:
    found = next(
        (
            finding
            for finding in result.findings
            if (finding.layer, finding.point) == (first.layer, first.point) and finding.verdict == "fail"
        ),
        None,
    )
    if found is None:
        return f"The first difference is at {place(first.layer, first.point)}."
    limit = MARGIN_LIMIT[found.dtype]
    if found.margin is not None and found.margin > limit:
        times = float(f"{found.margin:.3g}")  # three digits, and no exponent in a sentence
        reason = f"Flax is {times:,.12g} times as far from the exact answer as PyTorch, and {limit:g} is allowed"
    else:
        reason = found.reason or "it failed"
    return f"The two part first at {place(first.layer, first.point)}, {MODES[found.mode]}: {reason}."


def _parity_failed(result: Result) -> bool:
    return bool(result.differences) or any(f.verdict == "fail" and f.decides for f in result.findings)
