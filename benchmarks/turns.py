"""Measure several ways of doing one thing in turn, so that whatever else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Row", "Run", "take_turns"]

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One thing measured: seconds of every round, by way of doing it; the first is ours."""

    what: str
    dtype: str
    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    @property
    def ours(self) -> str:
        return next(iter(self.seconds))

    @property
    def best(self) -> str:
        """Name the fastest of the others."""
        return min(list(self.seconds)[1:], key=self.median)

    @property
    def ratio(self) -> float:
        return self.median(self.ours) / self.median(self.best)

    @property
    def spread(self) -> tuple[float, float]:
        """Give the smallest and the largest ratio of one round."""
        rounds = zip(self.seconds[self.ours], self.seconds[self.best], strict=True)
        ratios = [ours / theirs for ours, theirs in rounds]
        return min(ratios), max(ratios)


def take_turns(what: str, dtype: str, runs: Mapping[str, Run], rounds: int) -> Row:
    """Run each once to compile and to warm caches, then all of them in turn."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return Row(what, dtype, seconds)
