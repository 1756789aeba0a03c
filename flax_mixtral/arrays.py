"""Between modules and named arrays: fill a tree by path, and list what a tree holds."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy.typing as npt
from flax import nnx

__all__ = ["arrays_of", "fill"]

Built = TypeVar("Built", bound=nnx.Module)


def fill(
    build: Callable[[nnx.Rngs], Built],
    arrays: Mapping[str, npt.NDArray[Any] | jax.Array],
    prefix: str = "",
    *,
    partial: bool = False,
) -> Built:
    """Build a module whose parameters are the given arrays; no initial value is ever computed.

    Args:
        build: constructs the module.
        arrays: one array for each parameter, by its dotted path; others are not looked at.
        prefix: stands before every path, as `model.layers.3.`.
        partial: leave a parameter without an array abstract (a shape and a dtype) instead of refusing.

    Raises:
        ValueError: a parameter has no array, or one of another shape.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    problems = []
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
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
        raise ValueError("the arrays do not fill the module:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def arrays_of(module: nnx.Module) -> dict[str, jax.Array]:
    """Give every parameter by its dotted path, in the tree's order."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}
