"""How far a run is, for a progress bar."""

from collections.abc import Callable

__all__ = ["Progress", "Steps"]

Progress = Callable[[str, int, int], None]
"""Called with what is done now, how many steps are done, and how many there are."""


class Steps:
    """Counts steps for a progress callback.

    Args:
        progress: the callback.
        total: how many there will be, as far as is known.
    """

    def __init__(self, progress: Progress, total: int):
        self._progress, self.total, self._done = progress, total, 0

    def advance(self, step: str) -> None:
        """Tell that a step begins."""
        self._progress(step, self._done, self.total)
        self._done += 1
