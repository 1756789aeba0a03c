"""Outside jit, compile the model part by part instead of operation by operation."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import jax

__all__ = ["apply_part"]

Out = TypeVar("Out")


def apply_part(part: Callable[..., Out], *args: Any, static: tuple[int, ...] = ()) -> Out:
    """Apply a function or an unbound method; outside jit as one compiled function, which all layers share.

    A first forward outside jit would otherwise compile some 150 operations, and every forward run each by itself.

    Args:
        part: the same object at every call, since what is compiled is found by it.
        args: arrays, modules, or trees of them; whatever is none has its place in `static`.
        static: places of arguments that are part of what is compiled.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
        return part(*args)  # whoever traces compiles, and nothing stands between
    out: Out = _compiled(part, static)(*args)
    return out


@cache
def _compiled(part: Callable[..., Out], static: tuple[int, ...]) -> Callable[..., Out]:
    return jax.jit(part, static_argnums=static)
