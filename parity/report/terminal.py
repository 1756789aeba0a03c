"""The table that a run prints, and the verdict under it."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.result import Result
from parity.verdict import MARGIN_LIMIT, Finding, Mode, Verdict

__all__ = ["render", "verdict"]

COLOURS: dict[Verdict, str] = {"pass": "green", "fail": "red", "unchecked": "yellow"}

MOST_REASONS = 5
MOST_CAUSES = 3
MOST_LAYERS = 12
"""What is shown fits on a screen of some 30 lines."""


def render(result: Result) -> RenderableType:
    """Show the worst margin of each block, the logits layer by layer, routing, and the verdict.

    Args:
        result: of a run.
    """
    if result.error is not None:
        return verdict(result)
    table = Table(box=None, header_style="bold", pad_edge=False)
    modes: tuple[Mode, ...] = ("local", "propagated")
    if any(finding.mode == "backward" for finding in result.findings):
        modes += ("backward",)
    for heading in ("layer", *(word for mode in modes for word in (mode, "at")), "lens", "routing", ""):
        table.add_column(heading, justify="right" if heading in ("layer", "lens", *modes) else "left")
    layers = sorted({finding.layer for finding in result.findings if finding.layer is not None})
    shown = _shown(result, layers)
    for layer in shown:
        own = [finding for finding in result.findings if finding.layer == layer and finding.decides]
        table.add_row(str(layer), *_cells(own, modes), _lens(own), _routing(result, layer), _mark(own))
    ends = [finding for finding in result.findings if finding.layer is None]
    if len(shown) < len(layers):
        table.add_row("...", f"{len(layers) - len(shown)} more")
    table.add_row("ends", *_cells(ends, modes), "", "", _mark(ends))
    whole = [finding for finding in ends if finding.mode in ("whole", "reference")]
    if whole:
        table.add_row("whole", "", "", *_cells(whole, ("whole",)), *[""] * (2 * len(modes) - 2), _mark(whole))
    return Group(table, Text(), *_reasons(result), verdict(result))


def _cells(findings: Iterable[Finding], modes: tuple[Mode, ...]) -> list[str]:
    cells = []
    for mode in modes:
        measured = [f for f in findings if f.mode == mode and f.margin is not None]
        worst = max(measured, key=lambda f: f.margin or 0.0, default=None)
        cells += ["", ""] if worst is None else [f"{worst.margin:.2f}", worst.point]
    return cells


def _lens(findings: Iterable[Finding]) -> str:
    errors = [
        f.flax_error for f in findings if f.point == "lens" and f.mode == "propagated" and f.flax_error is not None
    ]
    return f"{max(errors):.1e}" if errors else ""


def _routing(result: Result, layer: int) -> str:
    compared = [routing for key, routing in result.routing.items() if key[0] == layer and key[1] == "propagated"]
    tokens, flips = sum(r.tokens for r in compared), [flip for r in compared for flip in r.flips]
    if not tokens:
        return ""
    if not flips:
        return "equal"
    excused = sum(flip.excused for flip in flips)
    return f"{len(flips)} of {tokens} flip, {excused} within rounding"


def _mark(findings: Iterable[Finding]) -> Text:
    verdicts = {finding.verdict for finding in findings}
    verdict: Verdict = "fail" if "fail" in verdicts else "unchecked" if "unchecked" in verdicts else "pass"
    return Text(verdict, style=COLOURS[verdict])


def _reasons(result: Result) -> list[Text]:
    lines = [f"{difference.name}: {difference.reason}" for difference in result.differences]
    for finding in result.findings:
        if finding.verdict != "pass":
            where = "" if finding.layer is None else f"layer {finding.layer} "
            lines.append(f"{where}{finding.point} ({finding.mode}, {finding.batch}): {finding.reason}")
    shown = [Text(f"  {line}") for line in lines[:MOST_REASONS]]
    if len(lines) > MOST_REASONS:
        shown.append(Text(f"  and {len(lines) - MOST_REASONS} more; --report DIR writes them all to result.json"))
    return [*shown, *(Text(f"  note: {note}", style="yellow") for note in result.notes)]


def _shown(result: Result, layers: Sequence[int]) -> Sequence[int]:
    """Keep the table short: of many layers, those that did not pass, the one with the worst margin, and the last."""
    if len(layers) <= MOST_LAYERS:
        return layers
    wrong = sorted({f.layer for f in result.findings if f.layer is not None and f.decides and f.verdict != "pass"})
    worst = [] if result.worst is None or result.worst.layer is None else [result.worst.layer]
    return sorted({*worst, layers[-1], *wrong[: MOST_LAYERS - 2]})


def verdict(result: Result) -> Text:
    """Say the verdict, where the sides part first, and why."""
    if result.error is not None:
        return Text(f"verdict: {result.verdict}, {result.error}", style=f"bold {COLOURS[result.verdict]}")
    text = Text("verdict: ").append(result.verdict, style=f"bold {COLOURS[result.verdict]}")
    if result.worst is not None:
        where = "" if result.worst.layer is None else f"layer {result.worst.layer} "
        text.append(
            f", worst margin {result.worst.margin:.2f} at {where}{result.worst.point} ({result.worst.mode}); "
            f"limit {MARGIN_LIMIT[result.dtype]:g} in {result.dtype}"
        )
    if result.first_divergence is not None:
        where = "" if result.first_divergence.layer is None else f"layer {result.first_divergence.layer}, "
        text.append(f"\nfirst divergence: {where}{result.first_divergence.point}", style="bold")
    if result.baseline is not None:
        text.append(
            f"\nbaseline: {len(result.baseline.regressions)} of {result.baseline.compared} margins grew", "bold"
        )
        for line in result.baseline.lines[:MOST_REASONS]:
            text.append(f"\n  {line}")
        for line in result.baseline.changes:
            text.append(f"\n  {line}")
    for cause in result.causes[:MOST_CAUSES]:
        where = "" if cause.layer is None else f"layer {cause.layer}, "
        text.append(f"\ncause: {cause.fault}", style="bold").append(f" at {where}{cause.point}: {cause.evidence}")
    return text
