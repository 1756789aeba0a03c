"""Tensors that are known and not read yet, for several threads to read.

Imports the standard library, NumPy and convert's checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.checkpoint import View

__all__ = ["Unread"]


@dataclass(frozen=True)
class Unread:
    """A tensor of a view in the layout flax, or one expert of it."""

    view: View
    name: str
    dtype: np.dtype[Any] | None
    """To cast to; None to leave every value as it is."""
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        whole = self.view.shape(self.name)
        return whole if self.expert is None else whole[1:]

    def __getitem__(self, expert: int) -> "Unread":
        """Give one expert of a stacked tensor, not read either."""
        return replace(self, expert=expert)

    @contextmanager
    def read(self) -> Iterator[NDArray[Any]]:
        """Give the values for as long as the context lasts; see `View.part`."""
        index = () if self.expert is None else (slice(self.expert, self.expert + 1),)
        with self.view.part(self.name, index, self.dtype) as array:
            yield array if self.expert is None else array[0]
