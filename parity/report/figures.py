"""All charts of report.html, in the order in which they stand there."""

from collections.abc import Callable, Iterator

from parity.metrics import Precision
from parity.report import depth, heat_maps
from parity.report.chart import Chart
from parity.result import Result

__all__ = ["charts"]

OF_A_DTYPE: tuple[Callable[[Result, Precision], Chart | None], ...] = (
    depth.errors,
    depth.divergence,
    depth.agreement,
    depth.router_margins,
    heat_maps.load,
    heat_maps.experts,
    heat_maps.gradients,
)


def charts(result: Result) -> list[Chart]:
    """Draw all that the result has data for."""
    return [chart for chart in _drawn(result) if chart is not None]


def _drawn(result: Result) -> Iterator[Chart | None]:
    dtypes = sorted({finding.dtype for finding in result.findings}, key=lambda dtype: dtype != result.dtype)
    for dtype in dtypes:
        for mode in heat_maps.STREAMS:  # two in a row, where there is room: what is local beside what was inherited
            yield heat_maps.margins(result, dtype, mode)
    for dtype in dtypes:
        yield heat_maps.margins(result, dtype, "operation")
    for dtype in dtypes:
        for draw in OF_A_DTYPE:
            yield draw(result, dtype)
