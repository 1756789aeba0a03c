"""Between modules and named arrays: fill a tree by path, and list what a tree holds."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy.typing as npt
from flax import nnx

__all__ = ["Mould", "arrays_of"]

Built = TypeVar("Built", bound=nnx.Module)
Arrays = Mapping[str, npt.NDArray[Any] | jax.Array]


class Mould(Generic[Built]):
    """A module's structure, to be filled with arrays any number of times; no initial value is ever computed.

    Args:
        build: constructs the module.
    """

    def __init__(self, build: Callable[[nnx.Rngs], Built]):
        self._graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
        self._leaves = nnx.to_flat_state(state)

    def fill(self, arrays: Arrays, prefix: str = "", *, partial: bool = False) -> Built:
        """Make a module whose parameters are the given arrays.

        Args:
            arrays: one array for each parameter, by its dotted path; others are not looked at.
            prefix: stands before every path, as `model.layers.3.`.
            partial: leave a parameter without an array abstract (a shape and a dtype) instead of refusing.

        Raises:
            ValueError: a parameter has no array, or one of another shape.
        """
        problems = []
        leaves = []
        for path, leaf in self._leaves:
            name = prefix + ".".join(map(str, path))
            if name not in arrays:
                leaves.append((path, leaf))
                if not partial:
                    problems.append(f"{name}: no array")
                continue
            array = jnp.asarray(arrays[name])
            if array.shape != leaf.shape:
                problems.append(f"{name}: expected shape {leaf.shape}, got {array.shape}")
            leaves.append((path, leaf.replace(array)))
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ValueError(f"the arrays do not fill the module:\n{listed}")
        return nnx.merge(self._graphdef, nnx.from_flat_state(leaves))


def arrays_of(module: nnx.Module) -> dict[str, jax.Array]:
    """Give every parameter by its dotted path, in the tree's order."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}
