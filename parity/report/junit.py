"""junit.xml: one test case for each block and group of points, with the numbers in the text of a failure.

What could not be checked is an error, not a skip: tools let skipped tests pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from parity.report.summary import cause_line, command, environment_rows, group_of, headline, place
from parity.result import Result
from parity.verdict import Finding

__all__ = ["render"]

Problem = Literal["failure", "error"]

MOST_LINES = 40
"""Of one failure's text: the rest is in result.json."""


@dataclass(frozen=True, slots=True)
class Case:
    """One test case; a problem has a message of one line and a text."""

    classname: str
    name: str
    problem: Problem | None = None
    message: str = ""
    text: str = ""


def render(result: Result) -> str:
    """Give the text of junit.xml."""
    cases = list(_cases(result))
    counts = {problem: sum(case.problem == problem for case in cases) for problem in ("failure", "error")}
    totals = {
        "time": f"{sum(cost.seconds for cost in result.cost.values()):.3f}",
        "tests": str(len(cases)),
        "failures": str(counts["failure"]),
        "errors": str(counts["error"]),
    }
    suites = ElementTree.Element("testsuites", {"name": "mixtral-parity", **totals})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": f"mixtral-parity.{result.dtype}", **totals})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(result):
        ElementTree.SubElement(properties, "property", name=name, value=value)
    for case in cases:
        element = ElementTree.SubElement(suite, "testcase", classname=case.classname, name=case.name)
        if case.problem is not None:
            problem = ElementTree.SubElement(element, case.problem, type="parity", message=_clean(case.message))
            problem.text = _clean(case.text)
    ElementTree.indent(suites, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _cases(result: Result) -> Iterator[Case]:
    if result.error is not None:
        yield Case("parity", "run", "error", headline(result)[0], result.error)
        return
    yield _weights(result)
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in result.findings:
        groups.setdefault((_classname(finding), group_of(finding)), []).append(finding)
    if not groups:
        yield Case("parity", "findings", "error", "nothing was compared", "no comparison was made")
    for (classname, name), findings in groups.items():
        yield _case(classname, name, findings, result)
    if result.baseline is not None:
        lines = [*result.baseline.lines, *result.baseline.changes]
        failed: Problem | None = "failure" if result.baseline.failed else None
        message = f"{len(result.baseline.regressions)} margins grew beyond their noise" if failed else ""
        yield Case("parity", "baseline", failed, message, "\n".join(lines) if failed else "")


def _classname(finding: Finding) -> str:
    where = "ends" if finding.layer is None else f"layer_{finding.layer:02}"
    return f"parity.{finding.dtype}.{finding.mode}.{where}"


def _case(classname: str, name: str, findings: Sequence[Finding], result: Result) -> Case:
    wrong = [finding for finding in findings if finding.verdict != "pass" and finding.decides]
    if not wrong:
        return Case(classname, name)
    failed = any(finding.verdict == "fail" for finding in wrong)
    causes = [cause for cause in result.causes if cause.layer == findings[0].layer]
    lines = [_line(finding) for finding in wrong[:MOST_LINES]]
    lines += [f"and {len(wrong) - MOST_LINES} more"] if len(wrong) > MOST_LINES else []
    lines += [f"cause: {cause_line(cause)}" for cause in causes]
    first = wrong[0]
    message = f"{place(first.layer, first.point)}: {first.reason or first.verdict}"
    return Case(classname, name, "failure" if failed else "error", message, "\n".join(lines))


def _line(finding: Finding) -> str:
    numbers = [
        f"{name} {value:.3g}"
        for name, value in (
            ("margin", finding.margin),
            ("torch error", finding.torch_error),
            ("Flax error", finding.flax_error),
        )
        if value is not None
    ]
    return f"{finding.point} [{finding.batch}] {finding.verdict}: {'; '.join([finding.reason or '', *numbers])}"


def _weights(result: Result) -> Case:
    if not result.differences:
        return Case("parity", "weights and configuration")
    lines = [f"{difference.name}: {difference.reason}" for difference in result.differences]
    return Case("parity", "weights and configuration", "failure", lines[0], "\n".join(lines))


def _properties(result: Result) -> Iterator[tuple[str, str]]:
    yield "verdict", result.verdict
    yield from ((f"summary.{number}", sentence) for number, sentence in enumerate(headline(result)))
    yield from ((f"cause.{number}", cause_line(cause)) for number, cause in enumerate(result.causes))
    yield from environment_rows(result)
    yield "command", command(result)


def _clean(text: str) -> str:
    """Drop what XML 1.0 cannot hold."""
    return "".join(c for c in text if c in "\t\n" or c.isprintable() or c == "\ufffd")
