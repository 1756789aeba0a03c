"""The charts over depth: what becomes of the logits, the tokens and the router, layer by layer."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from parity.metrics import Precision
from parity.report.chart import Chart, number
from parity.result import Result
from parity.router import LayerRouting

__all__ = ["agreement", "divergence", "errors", "router_margins"]

MOST_LABELS, FEW_DECADES = 6, 1.5
"""Of an axis of powers of ten."""


def errors(result: Result, dtype: Precision) -> Chart | None:
    """Draw both sides' relative error of the logits read after each layer, the worst of all batches."""
    lens = [f for f in result.findings if f.point in ("lens", "logits") and f.mode == "propagated" and f.dtype == dtype]
    lines = {
        "PyTorch": _by_depth(max, [(f.layer, f.torch_error) for f in lens]),
        "Flax": _by_depth(max, [(f.layer, f.flax_error) for f in lens]),
    }
    caption = f"{dtype}: relative error of the logits against the exact answer, layer by layer, of the worst batch."
    return _lines(f"errors-{dtype}", "Drift", caption, lines, log=True)


def divergence(result: Result, dtype: Precision) -> Chart | None:
    """Draw how far the sides' expectations of the next token part."""
    drift = [each for each in result.drift if each.dtype == dtype]
    lines = {
        "mean": _by_depth(max, [(each.layer, each.kl) for each in drift]),
        "worst token": _by_depth(max, [(each.layer, each.worst_kl) for each in drift]),
    }
    caption = f"{dtype}: KL(PyTorch ‖ Flax) of the next token, in nats, of the worst batch."
    return _lines(f"kl-{dtype}", "Drift", caption, lines, log=True)


def agreement(result: Result, dtype: Precision) -> Chart | None:
    """Draw the share of tokens with the same likeliest successor, and with the same experts."""
    drift = [each for each in result.drift if each.dtype == dtype]
    lines = {
        "likeliest next token": _by_depth(min, [(each.layer, 100 * each.top1) for each in drift]),
        "experts": _by_depth(min, [(layer, 100 * each.agreement) for layer, each in _routing(result, dtype)]),
    }
    caption = f"{dtype}: share of tokens where both sides agree, in percent, of the worst batch."
    return _lines(f"agreement-{dtype}", "Drift", caption, lines, log=False)


def router_margins(result: Result, dtype: Precision) -> Chart | None:
    """Draw how near the router is to another choice."""
    routing = _routing(result, dtype)
    lines = {
        "closest token": _by_depth(min, [(layer, each.min_margin) for layer, each in routing]),
        "median token": _by_depth(min, [(layer, each.median_margin) for layer, each in routing]),
    }
    caption = f"{dtype}: how far the exact router is from choosing another expert, in logits, of the closest batch."
    return _lines(f"router-{dtype}", "Routing", caption, lines, log=True)


def _routing(result: Result, dtype: Precision) -> list[tuple[int, LayerRouting]]:
    """List the layers' routing where each side is on its own stream."""
    return [
        (layer, routing)
        for (layer, mode, _, at), routing in result.routing.items()
        if (mode, at) == ("propagated", dtype)
    ]


Line = Mapping[float, float]
"""A value at each depth; the model's end is at infinity."""


def _by_depth(pick: Callable[[list[float]], float], values: Iterable[tuple[int | None, float | None]]) -> Line:
    """Pick one finite value for each depth; there is none at a depth without any."""
    at: dict[float, list[float]] = {}
    for layer, value in values:
        if value is not None and math.isfinite(value):
            at.setdefault(math.inf if layer is None else layer, []).append(value)
    return {depth: pick(at[depth]) for depth in sorted(at)}


def _lines(name: str, section: str, caption: str, lines: Mapping[str, Line], *, log: bool) -> Chart | None:
    depths = sorted({depth for line in lines.values() for depth in line})
    if not depths:
        return None
    labels = ["end" if depth == math.inf else str(int(depth)) for depth in depths]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label,
            "x": labels,
            "y": [_drawn(line.get(depth), log) for depth in depths],
            "marker": {"symbol": symbol, "size": 8},
            "line": {"dash": dash},
            "hovertemplate": f"layer %{{x}}, {label}: %{{y:.3g}}<extra></extra>",
        }
        for (label, line), symbol, dash in zip(lines.items(), ("circle", "diamond"), ("solid", "dot"), strict=True)
    ]
    drawn = [value for line in data for value in line["y"] if value is not None]
    axis = {"type": "log", "exponentformat": "power", **_decades(drawn)} if log else {"type": "linear"}
    layout = {
        "height": 300,
        "xaxis": {"type": "category", "title": {"text": "layer"}},
        "yaxis": axis,
        "legend": {"orientation": "h", "y": 1.15},
        "hovermode": "x unified",
    }
    table = [
        [label, *(number(line.get(at)) for line in lines.values())] for label, at in zip(labels, depths, strict=True)
    ]
    return Chart(name, section, caption, {"data": data, "layout": layout}, ("layer", *lines), table)


def _decades(drawn: Sequence[float]) -> dict[str, int]:
    """Label whole powers of ten where there are a few; Plotly's own choice mixes them with 2 and 5."""
    spanned = math.log10(max(drawn) / min(drawn)) if drawn else 0
    return {"dtick": math.ceil(spanned / MOST_LABELS)} if spanned > FEW_DECADES else {"nticks": MOST_LABELS}


def _drawn(value: float | None, log: bool) -> float | None:
    """A logarithm has no zero: there is a gap."""
    return None if log and value == 0 else value
