"""Reading and writing checkpoints from the model's side.

The one module here that imports convert. It does so inside its functions, since convert imports this package's
neutral modules.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
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

    checkpoint = Checkpoint.open(path)
    view = checkpoint.view("flax")
    found = sorted({str(view.dtype(name)) for name in view})
    if dtype is None and len(found) > 1:
        raise BadInput(f"{path} holds parameters of {' and '.join(found)}; name one for all with dtype=")
    if mesh is None:
        arrays: Mapping[str, Any] = _OneByOne(view, dtype)
    else:
        specs = partition_specs(checkpoint.config, mesh)
        arrays = {
            name: placed(view.shape(name), dtype or view.dtype(name), mesh, specs[name], partial(view.part, name))
            for name in view
        }
    return Mould(lambda rngs: build(checkpoint.config, rngs)).fill(arrays)


class _OneByOne(Mapping[str, npt.NDArray[Any]]):
    """Leaves that are brought into order on access: beside the model's own memory, one of them is held at a time."""

    def __init__(self, view: "View", dtype: jnp.dtype | None):
        self._view, self._dtype = view, dtype

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        from convert.transpose import contiguous

        leaf = self._view[name]
        ordered = contiguous(leaf).view(leaf.dtype)
        return ordered if self._dtype is None else ordered.astype(self._dtype, copy=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._view)

    def __len__(self) -> int:
        return len(self._view)


def save(module: nnx.Module, config: MixtralConfig, path: str | Path) -> None:
    """Write a model as a checkpoint directory; see `heads.Mixtral.save_pretrained`."""
    import convert

    convert.save(path, {name: np.asarray(array) for name, array in arrays_of(module).items()}, config)
