"""Between modules and named arrays: fill a tree by path, and list what a tree holds."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["Mould", "arrays_of", "taken_over"]

Built = TypeVar("Built", bound=nnx.Module)
Path = tuple[Any, ...]


class Shaped(Protocol):
    """An array of NumPy's or JAX's, or something that `own` makes one of."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def __getitem__(self, expert: int, /) -> Any:
        """Give one expert of a stack."""


Arrays = Mapping[str, Shaped]


def copied(parts: Iterable[Any]) -> Iterator[jax.Array]:
    """Make arrays of JAX's own."""
    return map(jnp.asarray, parts)


def taken_over(parts: Iterable[Any]) -> Iterator[jax.Array]:
    """Take NumPy's memory over where it begins on a cache line, else copy; nobody may write to it afterwards."""
    return (jax.device_put(part, may_alias=True) for part in parts)


class Mould(Generic[Built]):
    """A module's structure, to be filled with arrays any number of times; no initial value is ever computed.

    Args:
        build: constructs the module.
    """

    def __init__(self, build: Callable[[nnx.Rngs], Built]):
        self._graphdef, state = nnx.split(nnx.eval_shape(lambda: build(_OneKey(0))))
        self._leaves = nnx.to_flat_state(state)

    def fill(
        self,
        arrays: Arrays,
        prefix: str = "",
        *,
        partial: bool = False,
        own: Callable[[Iterable[Any]], Iterable[jax.Array]] = copied,
    ) -> Built:
        """Make a module whose parameters are the given arrays.

        Args:
            arrays: one array for each leaf of `tree`, by its dotted path; others are not looked at. A module that holds
                every expert by itself takes its parts of the stacked array.
            prefix: stands before every path, as `model.layers.3.`.
            partial: leave a parameter without an array abstract (a shape and a dtype) instead of refusing.
            own: makes arrays of JAX's of the given ones, in their order.

        Raises:
            ValueError: a parameter has no array, or one of another shape.
        """
        problems: list[str] = []
        leaves: list[tuple[Path, Any]] = []
        filled: list[tuple[Path, Any]] = []

        def parts() -> Iterator[Any]:
            for leaf_path, group in groupby(self._leaves, key=lambda row: _leaf_path(row[0])):
                name, rows = prefix + leaf_path, list(group)
                array = arrays.get(name)  # once: `in` too reads what it is asked for, of a mapping of files
                if array is None:
                    leaves.extend(rows)
                    if not partial:
                        problems.append(f"{name}: no array")
                elif array.shape != (expected := _stacked_shape(rows)):
                    problems.append(f"{name}: expected shape {expected}, got {array.shape}")
                else:
                    filled.extend(rows)
                    yield from (array[path[-1]] if isinstance(path[-1], int) else array for path, _ in rows)

        owned = list(own(parts()))  # one after the other, so that what was copied can go
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ValueError(f"the arrays do not fill the module:\n{listed}")
        leaves += [(path, leaf.replace(array)) for (path, leaf), array in zip(filled, owned, strict=True)]
        return nnx.merge(self._graphdef, nnx.from_flat_state(leaves))


class _OneKey(nnx.Rngs):
    """Gives one key to all parameters, as nobody will see their values.

    Counting keys under a trace makes NNX look through all that has been traced: seconds in a model of 200 parameters,
    and growing with their square.
    """

    def params(self) -> jax.Array:
        """Give the key."""
        return jax.random.key(0)


def arrays_of(module: nnx.Module) -> dict[str, jax.Array]:
    """Give every leaf of `tree` by its dotted path, in the tree's order; experts held one by one are stacked."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {
        name: jnp.stack([leaf[...] for _, leaf in rows]) if _is_part(rows[0][0]) else rows[0][1][...]
        for name, group in groupby(flat, key=lambda row: _leaf_path(row[0]))
        if (rows := list(group))
    }


def _is_part(path: Path) -> bool:
    """Say whether a parameter is one expert's part of a stacked leaf: its path then ends in the expert's number."""
    return isinstance(path[-1], int)


def _leaf_path(path: Path) -> str:
    return ".".join(map(str, path[:-1] if _is_part(path) else path))


def _stacked_shape(rows: list[tuple[Path, Any]]) -> tuple[int, ...]:
    path, leaf = rows[0]
    return (len(rows), *leaf.shape) if _is_part(path) else tuple(leaf.shape)
