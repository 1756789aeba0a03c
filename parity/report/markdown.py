"""report.md: what a CI job summary shows."""

import re

from parity.report import templates
from parity.report.summary import (
    cause_line,
    command,
    environment_rows,
    failures,
    group_of,
    headline,
    title,
    tokens_compared,
    verdict_of,
)
from parity.report.summary import worst_of as worst
from parity.result import Result

__all__ = ["render"]

MOST_FAILURES = 20
MOST_LAYERS = 40


def render(result: Result) -> str:
    """Give the text of report.md."""
    layers = sorted({finding.layer for finding in result.findings if finding.layer is not None})
    rows = [(f"layer {layer}", [finding for finding in result.findings if finding.layer == layer]) for layer in layers]
    ends = [finding for finding in result.findings if finding.layer is None]
    rows += [("ends", ends)] if ends else []
    shown = [row for row in rows if verdict_of(row[1]) != "pass"] if len(rows) > MOST_LAYERS else rows
    text = templates.load("report.md.j2").render(
        result=result,
        title=title(result),
        headline=headline(result),
        causes=[cause_line(cause) for cause in result.causes],
        rows=shown,
        hidden=len(rows) - len(shown),
        failures=failures(result)[:MOST_FAILURES],
        more=max(len(failures(result)) - MOST_FAILURES, 0),
        command=command(result),
        environment=environment_rows(result),
        tokens=tokens_compared(result),
        verdict_of=verdict_of,
        worst=worst,
        group_of=group_of,
    )
    return re.sub(r"\n{3,}", "\n\n", text)  # what a section that is left out leaves behind
