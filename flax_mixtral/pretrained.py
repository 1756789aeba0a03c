"""Reading and writing checkpoints from the model's side.

The one module here that imports convert. It does so inside its functions, since convert imports this package's
neutral modules.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from flax_mixtral.arrays import Mould, arrays_of
from flax_mixtral.config import MixtralConfig
from flax_mixtral.sharding import partition_specs, placed

if TYPE_CHECKING:
    from convert import View

__all__ = ["load", "save"]

Built = TypeVar("Built", bound=nnx.Module)
Build = Callable[[MixtralConfig, nnx.Rngs], Built]


def load(build: Build[Built], path: str | Path, dtype: jnp.dtype | None, mesh: jax.sharding.Mesh | None) -> Built:
    """Build a model from a checkpoint directory; see `heads.Mixtral.from_pretrained`."""
    from convert import BadInput, Checkpoint
    from convert.memory import THREADS, InMemory

    checkpoint = Checkpoint.open(path)
    view = checkpoint.view("flax")
    found = sorted({str(view.dtype(name)) for name in view})
    if dtype is None and len(found) > 1:
        raise BadInput(f"{path} holds parameters of {' and '.join(found)}; name one for all with dtype=")
    mould = Mould(lambda rngs: build(checkpoint.config, rngs))
    if mesh is not None:
        specs = partition_specs(checkpoint.config, mesh)
        return mould.fill({name: _placed(view, name, dtype, mesh, specs[name]) for name in view})
    with ThreadPoolExecutor(THREADS) as threads:
        return mould.fill(InMemory(view, None if dtype is None else np.dtype(dtype), threads), alias=True)


def _placed(
    view: "View", name: str, dtype: jnp.dtype | None, mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec
) -> jax.Array:
    """Read what the devices of this process hold of a leaf."""
    from convert.transpose import contiguous

    def read(index: tuple[slice, ...]) -> npt.NDArray[Any]:
        part = view.part(name, index)
        return contiguous(part).view(part.dtype)

    return placed(view.shape(name), dtype or view.dtype(name), mesh, spec, read)


def save(module: nnx.Module, config: MixtralConfig, path: str | Path) -> None:
    """Write a model as a checkpoint directory; see `heads.Mixtral.save_pretrained`."""
    import convert

    convert.save(path, {name: np.asarray(array) for name, array in arrays_of(module).items()}, config)
