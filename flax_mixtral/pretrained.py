"""Reading and writing checkpoints from the model's side.

The one module here that imports convert. It does so inside its functions, since convert imports this package's
neutral modules.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_mixtral.arrays import Mould, arrays_of
from flax_mixtral.config import MixtralConfig
from flax_mixtral.sharding import partition_specs, placed

if TYPE_CHECKING:
    from convert import View
    from convert.unread import Unread

__all__ = ["load", "save"]

Built = TypeVar("Built", bound=nnx.Module)
Build = Callable[[MixtralConfig, nnx.Rngs], Built]

THREADS = os.cpu_count() or 1


def load(build: Build[Built], path: str | Path, dtype: jnp.dtype | None, mesh: jax.sharding.Mesh | None) -> Built:
    """Build a model from a checkpoint directory; see `heads.Mixtral.from_pretrained`."""
    from convert import BadInput, Checkpoint

    checkpoint = Checkpoint.open(path)
    view = checkpoint.view("flax")
    found = sorted({str(view.dtype(name)) for name in view})
    if dtype is None and len(found) > 1:
        raise BadInput(f"{path} holds parameters of {' and '.join(found)}; name one for all with dtype=")
    wanted = None if dtype is None else np.dtype(dtype)
    mould = Mould(lambda rngs: build(checkpoint.config, rngs))
    if mesh is not None:
        specs = partition_specs(checkpoint.config, mesh)

        def on_mesh(name: str) -> jax.Array:
            stored = view.shape(name), wanted or view.dtype(name)
            return placed(*stored, mesh, specs[name], lambda index: view.part(name, index, wanted))

        return mould.fill({name: on_mesh(name) for name in view})
    return read(mould, view, wanted)


def read(mould: Mould[Built], view: "View", dtype: np.dtype[Any] | None) -> Built:
    """Fill a mould with what a view has, by all processors; see `load`."""
    from convert.unread import Unread

    unread = {name: Unread(view, name, dtype) for name in view}
    with ThreadPoolExecutor(THREADS) as threads:
        return mould.fill(unread, own=lambda parts: threads.map(_own, parts))


def _own(unread: "Unread") -> jax.Array:
    """Read a tensor, or an expert of one; JAX brings its axes into order, or takes it over as it is mapped."""
    with unread.read() as array:
        owned: jax.Array = jax.device_put(array, may_alias=True)
        return owned.block_until_ready()


def save(module: nnx.Module, config: MixtralConfig, path: str | Path) -> None:
    """Write a model as a checkpoint directory; see `heads.Mixtral.save_pretrained`."""
    import convert

    convert.save(path, {name: np.asarray(array) for name, array in arrays_of(module).items()}, config)
