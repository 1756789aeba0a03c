"""The table of a selftest: found and placed per fault, false alarms per control."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.selftest.trials import Absent, Alarm, Row, Trial

__all__ = ["render"]


def render(rows: Sequence[Row]) -> RenderableType:
    """Show one line for each fault and control, and the sums."""
    trials = [row for row in rows if isinstance(row, Trial)]
    alarms = [row for row in rows if isinstance(row, Alarm)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("fault or control", "in", "found", "placed", "named", "at", "margin"):
        table.add_column(heading, justify="right" if heading == "margin" else "left")
    for trial in trials:
        table.add_row(
            trial.slug,
            trial.dtype,
            _yes(trial.found),
            _yes(trial.placed),
            _named(trial),
            trial.at,
            f"{trial.margin:.3g}",
        )
    for alarm in alarms:
        verdict = Text("false alarm", style="red") if alarm.false_alarm else Text("silent", style="green")
        table.add_row(alarm.slug, alarm.dtype, verdict, "", "", alarm.at, f"{alarm.margin:.3g}")
    for absent in (row for row in rows if isinstance(row, Absent)):
        table.add_row(absent.slug, absent.dtype, Text(f"not tried: needs {absent.needs}", style="yellow"))
    found, placed = sum(trial.found for trial in trials), sum(trial.placed for trial in trials)
    named = sum(trial.named for trial in trials)
    false = sum(alarm.false_alarm for alarm in alarms)
    text = Text(f"{len(trials)} faults planted: {found} found, {placed} placed, {named} named first; ", style="bold")
    return Group(table, Text(), text.append(f"{len(alarms)} controls: {false} false alarms"))


def _named(trial: Trial) -> Text:
    return Text("yes", style="green") if trial.named else Text(trial.cause or "no cause", style="bold red")


def _yes(right: bool) -> Text:
    return Text("yes", style="green") if right else Text("NO", style="bold red")
