"""The charts with a cell for each block and point, or block and expert."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from parity.metrics import Precision
from parity.points import kind_of
from parity.report.chart import Chart, number
from parity.report.summary import COLUMNS, MODES, verdict_of, worst_of
from parity.result import Result
from parity.verdict import MARGIN_LIMIT, Finding, Mode

__all__ = ["STREAMS", "experts", "gradients", "load", "margins"]

STREAMS: tuple[Mode, ...] = ("local", "propagated")
"""The modes that walk whole blocks."""

FLOOR = -2.0
"""Colours start at a hundredth of the limit, in powers of ten."""

TOP = 1.0
"""And reach at least to ten times the limit."""

MOST_TICKS = 5
"""Of the scale of colours."""

TOLD = (
    "<b>%{y}, %{x}</b>: %{customdata[3]}<br>margin %{customdata[0]}<br>"
    "relative error: PyTorch %{customdata[1]}, Flax %{customdata[2]}<br>%{customdata[4]}<extra></extra>"
)
"""What a cell answers a hover."""

MARKS = {"fail": "×", "unchecked": "?", "pass": ""}
"""A verdict is written into its cell as well: colour alone is not read by everyone."""


def margins(result: Result, dtype: Precision, mode: Mode) -> Chart | None:
    """Draw the margin of each block and point in one mode, what is first to fail outlined."""
    findings = [f for f in result.findings if f.mode == mode and f.dtype == dtype]
    present = {kind_of(f.point) for f in findings}
    columns = [column for column in COLUMNS if column in present] + sorted(present - set(COLUMNS))
    first = result.first_divergence
    informs = "" if any(f.decides for f in findings) else " It informs and does not decide: each side routes freely."
    return _heat_map(
        f"margins-{dtype}-{mode}",
        "Where",
        f"{mode.capitalize()}, {dtype}: margin of each block and point, Flax {MODES[mode]}.{informs}",
        findings,
        columns,
        lambda finding: kind_of(finding.point),
        None if first is None else (_row(first.layer), kind_of(first.point)),
    )


def experts(result: Result, dtype: Precision) -> Chart | None:
    """Draw each expert's worst margin."""
    findings = [f for f in result.findings if f.mode == "local" and f.dtype == dtype and f.point.startswith("expert.")]
    numbers = sorted({int(f.point.split(".")[1]) for f in findings})
    return _heat_map(
        f"experts-{dtype}",
        "Experts",
        f"{dtype}: the worst of each expert's four points (gate, up, act, down), on PyTorch's input of the block.",
        findings,
        [f"expert {expert}" for expert in numbers],
        lambda finding: f"expert {finding.point.split('.')[1]}",
    )


def gradients(result: Result, dtype: Precision) -> Chart | None:
    """Draw the margin of each parameter's gradient."""
    findings = [f for f in result.findings if f.mode == "backward" and f.dtype == dtype]
    columns = list(dict.fromkeys(_parameter(f) for f in findings))
    return _heat_map(
        f"gradients-{dtype}",
        "Gradients",
        f"{dtype}: margin of the training loss's gradients, in the order of the backward pass.",
        findings,
        columns,
        _parameter,
    )


def _parameter(finding: Finding) -> str:
    return kind_of(finding.point).removeprefix("grad.")


def _heat_map(
    name: str,
    section: str,
    caption: str,
    findings: Sequence[Finding],
    columns: Sequence[str],
    column_of: Callable[[Finding], str],
    outlined: tuple[str, str] | None = None,
) -> Chart | None:
    """Colour the worst margin of each cell by its distance from the limit, in powers of ten; outline one of them."""
    if not findings:
        return None
    cells: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        cells.setdefault((_row(finding.layer), column_of(finding)), []).append(finding)
    rows = sorted({row for row, _ in cells}, key=_row_order)
    z = [[_colour(cells.get((row, column), ())) for column in columns] for row in rows]
    marks = [[MARKS[verdict_of(cells.get((row, column), ()))] for column in columns] for row in rows]
    told = [[_told(cells.get((row, column), ())) for column in columns] for row in rows]
    top = max(TOP, *(value for row in z for value in row if value is not None))
    trace = {
        "type": "heatmap",
        "x": list(columns),
        "y": rows,
        "z": z,
        "text": marks,
        "texttemplate": "%{text}",
        "customdata": told,
        "hovertemplate": TOLD,
        "hoverongaps": False,
        "zmin": FLOOR,
        "zmax": top,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "margin / limit"}, "thickness": 10, **_ticks(top)},
    }
    layout = {
        "height": _height(rows, columns),
        "xaxis": {"tickangle": -90, "type": "category", "side": "bottom"},
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    if outlined is not None and verdict_of(cells.get(outlined, ())) == "fail":
        x, y = columns.index(outlined[1]), rows.index(outlined[0])
        layout["shapes"] = [{"type": "rect", "x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}]
    table = [
        [row, column, *_numbers(cells[row, column])] for row in rows for column in columns if (row, column) in cells
    ]
    header = ("block", "point", "margin", "PyTorch's error", "Flax's error", "verdict")
    return Chart(name, section, caption, {"data": [trace], "layout": layout}, header, table)


def _ticks(top: float) -> dict[str, Any]:
    """Label whole powers of ten, the limit among them."""
    step = math.ceil((top - FLOOR) / MOST_TICKS)
    powers = [power for power in range(math.ceil(FLOOR), math.floor(top) + 1) if power % step == 0]
    return {"tickvals": powers, "ticktext": [f"10<sup>{power}</sup>" if power else "1" for power in powers]}


def _height(rows: Sequence[str], columns: Sequence[str]) -> int:
    """Give each row its height in pixels, and the slanted names under them theirs."""
    return 50 + 26 * len(rows) + 7 * max(map(len, columns))


def _row(layer: int | None) -> str:
    return "ends" if layer is None else f"layer {layer}"


def _row_order(row: str) -> float:
    return math.inf if row == "ends" else int(row.split()[1])


def _colour(findings: Sequence[Finding]) -> float | None:
    """Give log10(margin / limit) of a cell; a failure without a margin is at the top, no finding is a gap."""
    if not findings:
        return None
    worst = worst_of(findings)
    failed = verdict_of(findings) == "fail"
    if worst is None or worst.margin is None:
        return TOP if failed else FLOOR
    ratio = worst.margin / MARGIN_LIMIT[worst.dtype]
    if not math.isfinite(ratio):
        return TOP
    value = round(math.log10(max(ratio, 10**FLOOR)), 3)
    return max(value, 0.01) if failed else value


def _told(findings: Sequence[Finding]) -> list[str]:
    """Give what `TOLD` shows of a cell."""
    if not findings:
        return []
    reason = next((f.reason for f in findings if f.verdict != "pass" and f.reason), "")
    return [*_numbers(findings), reason]


def _numbers(findings: Sequence[Finding]) -> list[str]:
    worst = worst_of(findings)
    verdict = verdict_of(findings) if any(f.decides for f in findings) else "informs"
    if worst is None:
        return ["none", "none", "none", verdict]
    return [number(worst.margin), number(worst.torch_error), number(worst.flax_error), verdict]


def load(result: Result, dtype: Precision) -> Chart | None:
    """Draw the share of a layer's choices that went to each expert."""
    counts: dict[int, list[int]] = {}
    for (layer, mode, _, at), routing in result.routing.items():
        if (mode, at) == ("propagated", dtype):
            so_far = counts.setdefault(layer, [0] * len(routing.load))
            counts[layer] = [a + b for a, b in zip(so_far, routing.load, strict=True)]
    counts = {layer: counts[layer] for layer in sorted(counts) if any(counts[layer])}
    if not counts:
        return None
    rows = [_row(layer) for layer in counts]
    shares = [[100 * count / sum(row) for count in row] for row in counts.values()]
    columns = [f"expert {expert}" for expert in range(len(shares[0]))]
    trace = {
        "type": "heatmap",
        "x": columns,
        "y": rows,
        "z": [[round(share, 1) for share in row] for row in shares],
        "text": [[f"{share:.0f}" for share in row] for row in shares],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y}, %{x}: %{z:.1f} % of the choices<extra></extra>",
        "xgap": 1,
        "ygap": 1,
        "zmin": 0,
        "showscale": False,
    }
    layout = {
        "height": _height(rows, columns),
        "xaxis": {"type": "category", "tickangle": -90},
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    table = [[row, *(f"{share:.1f}" for share in line)] for row, line in zip(rows, shares, strict=True)]
    caption = f"{dtype}: load of each expert, in percent of the layer's choices, all batches together."
    return Chart(f"load-{dtype}", "Routing", caption, {"data": [trace], "layout": layout}, ("block", *columns), table)
