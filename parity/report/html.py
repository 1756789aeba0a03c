"""report.html: one file that opens offline, with the numbers to look at and to point to."""

import json
import re
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from parity.report import templates
from parity.report.figures import charts
from parity.report.summary import cause_line, command, environment_rows, failures, headline, title, tokens_compared
from parity.result import Result

__all__ = ["render"]

MOST_FLIPS = 200
MOST_FAILURES = 200
CONTEXT = 12
"""Tokens shown before one that is spoken of."""

SECTIONS = {
    "Where": "Every block and point, coloured by its margin: how many times farther Flax is from the exact answer than "
    "PyTorch, as a part of what is allowed. Blue passes, red does not; where they part first is outlined.",
    "Drift": "What a user sees: logits read after each layer, each side on its own stream.",
    "Routing": "Which experts the tokens went to, and how sure the router was.",
    "Experts": "Each expert by itself.",
    "Gradients": "The backward pass.",
}
"""The sections that hold charts, and what stands under their headings."""


def render(result: Result) -> str:
    """Give the text of report.html, with all that it needs inside."""
    drawn = charts(result)
    return templates.load("report.html.j2").render(
        result=result,
        title=title(result),
        headline=headline(result),
        causes=[cause_line(cause) for cause in result.causes],
        sections={name: [c for c in drawn if c.section == name] for name in SECTIONS},
        intros=SECTIONS,
        failures=failures(result)[:MOST_FAILURES],
        more_failures=max(len(failures(result)) - MOST_FAILURES, 0),
        flips=_flips(result),
        worst=_worst_tokens(result),
        command=command(result),
        environment=environment_rows(result),
        tokens=tokens_compared(result),
        figures=_script_json({chart.name: chart.figure for chart in drawn}),
        style=_asset("report.css"),
        script=_asset("report.js"),
        plotly=_inline(get_plotlyjs()),
    )


def _flips(result: Result) -> list[dict[str, Any]]:
    """List the tokens that were routed differently, with their text."""
    flips = [(key, flip) for key, routing in result.routing.items() for flip in routing.flips]
    flips.sort(key=lambda each: each[1].excused)
    return [
        {
            "layer": layer,
            "mode": mode,
            "dtype": dtype,
            "text": _in_context(result, batch, flip.token),
            "flip": flip,
        }
        for (layer, mode, batch, dtype), flip in flips[:MOST_FLIPS]
    ]


def _worst_tokens(result: Result) -> list[dict[str, Any]]:
    """List the tokens after which the sides expect the most different things, at the model's end."""
    rows = [
        {
            "batch": drift.batch,
            "dtype": drift.dtype,
            "token": token,
            "text": _in_context(result, drift.batch, token.token),
            "torch_next": _word(result, token.torch_next),
            "flax_next": _word(result, token.flax_next),
        }
        for drift in result.drift
        if drift.layer is None and drift.dtype == result.dtype
        for token in drift.worst
    ]
    return sorted(rows, key=lambda row: -row["token"].kl)


def _in_context(result: Result, batch: str, token: int) -> tuple[str, str]:
    """Give the text before a token, and its own; ids where there is no tokenizer."""
    ids = result.tokens.get(batch, ())
    if token >= len(ids):
        return "", f"token {token}"
    if ids[token] not in result.words:
        return "", f"token {token}, id {ids[token]}"
    before = "…" * (token > CONTEXT) + "".join(result.words.get(id, "") for id in ids[max(token - CONTEXT, 0) : token])
    return before.replace("\n", "⏎ "), result.words[ids[token]].replace("\n", "⏎")


def _word(result: Result, id: int) -> str:
    return repr(result.words[id]) if id in result.words else f"id {id}"


def _asset(name: str) -> str:
    return files("parity.report").joinpath("templates", name).read_text(encoding="utf-8")


def _script_json(value: Any) -> str:
    """Write JSON that can stand inside a script element: no tag can end it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _inline(script: str) -> str:
    """Keep a script from ending its own element."""
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)
