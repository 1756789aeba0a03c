"""Between modules and named arrays: fill a tree by path, and list what a tree holds."""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy.typing as npt
from flax import nnx

__all__ = ["Mould", "arrays_of"]

Built = TypeVar("Built", bound=nnx.Module)
Path = tuple[Any, ...]
Arrays = Mapping[str, npt.NDArray[Any] | jax.Array]


class Mould(Generic[Built]):
    """A module's structure, to be filled with arrays any number of times; no initial value is ever computed.

    Args:
        build: constructs the module.
    """

    def __init__(self, build: Callable[[nnx.Rngs], Built]):
        self._graphdef, state = nnx.split(nnx.eval_shape(lambda: build(_OneKey(0))))
        self._leaves = nnx.to_flat_state(state)

    def fill(self, arrays: Arrays, prefix: str = "", *, partial: bool = False, alias: bool = False) -> Built:
        """Make a module whose parameters are the given arrays.

        Args:
            arrays: one array for each leaf of `tree`, by its dotted path; others are not looked at. A module that holds
                every expert by itself takes its parts of the stacked array.
            prefix: stands before every path, as `model.layers.3.`.
            partial: leave a parameter without an array abstract (a shape and a dtype) instead of refusing.
            alias: take NumPy's memory over where it begins on a cache line, instead of copying it; nobody may write to
                it afterwards.

        Raises:
            ValueError: a parameter has no array, or one of another shape.
        """
        problems = []
        leaves = []
        for leaf_path, group in groupby(self._leaves, key=lambda row: _leaf_path(row[0])):
            name, rows = prefix + leaf_path, list(group)
            array, expected = (
                arrays.get(name),
                _stacked_shape(rows),
            )  # once: `in` too would read it, of a mapping of files
            if array is None:
                leaves += rows
                if not partial:
                    problems.append(f"{name}: no array")
                continue
            if array.shape != expected:
                problems.append(f"{name}: expected shape {expected}, got {array.shape}")
                continue
            for path, leaf in rows:
                part = array[path[-1]] if isinstance(path[-1], int) else array
                owned = jax.device_put(part, may_alias=True) if alias else jnp.asarray(part)
                leaves.append((path, leaf.replace(owned)))
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ValueError(f"the arrays do not fill the module:\n{listed}")
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
