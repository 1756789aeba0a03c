"""Outside jit, compile the model part by part instead of operation by operation."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import jax

__all__ = ["apply_part"]

Out = TypeVar("Out")


def apply_part(part: Callable[..., Out], *args: Any, static: Mapping[str, Any] | None = None, **named: Any) -> Out:
    """Apply a function or an unbound method; outside jit as one compiled function, which all layers share.

    A first forward outside jit would otherwise compile some 150 operations, and every forward run each by itself.

    Args:
        part: the same object at every call, since what is compiled is found by it.
        args: arrays, modules, or trees of them.
        static: what is no array, by name.
        named: arrays by name.
    """
    static = static or {}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, named))):
        return part(*args, **static, **named)  # whoever traces compiles, and nothing stands between
    out: Out = _compiled(part, tuple(static))(*args, **static, **named)
    return out


@cache
def _compiled(part: Callable[..., Out], static: tuple[str, ...]) -> Callable[..., Out]:
    return jax.jit(part, static_argnames=static)
