"""The next block's weights are read from disk while this one is run."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from convert.checkpoint import View

__all__ = ["ReadAhead"]

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class ReadAhead:
    """Has the system read a layer's bytes, in a thread of its own.

    Args:
        views: the checkpoints that the sides read; one that is given twice is read once.
    """

    def __init__(self, views: Sequence[View]):
        self._views = list({view.checkpoint.path: view for view in views}.values())
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __call__(self, layer: int) -> None:
        """Begin with a layer; one that is not there is none."""
        self._worker.submit(self._read, layer)

    def _read(self, layer: int) -> None:
        for view in self._views:
            names = [name for name in view if (found := LAYER.search(name)) and int(found[1]) == layer]
            for source in dict.fromkeys(source for name in names for source in view.sources(name)):
                view.checkpoint.will_need(view.checkpoint.stored(source))

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop; what is not begun is left."""
        self._worker.shutdown(cancel_futures=True)
