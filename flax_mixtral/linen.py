"""Mixtral for Linen: `init` and `apply` over the same functions, and the same parameters under the same paths.

A thin adapter. The NNX model's structure is known before anything is computed; its parameters become Linen's, and a
call fills the structure with them. So every parameter exists before any control flow (docs/control-flow.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from flax_mixtral import heads
from flax_mixtral.cache import KVCache
from flax_mixtral.config import MixtralConfig
from flax_mixtral.experts import Choice

__all__ = ["Mixtral"]

Tree = dict[str, Any]


class Mixtral(linen.Module):
    """Mixtral with the head that the configuration names.

    Args:
        config: the model.
        dtype: of all parameters.
        experts: the backend, see `experts.choose_backend`.
    """

    config: MixtralConfig
    dtype: Any = jnp.float32
    experts: Choice = "auto"

    @linen.compact
    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> heads.MixtralOutput:
        """Run the model; see `heads.Mixtral.__call__`."""
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))
        initial = nnx.state(self._build(self.make_rng("params"))) if self.is_initializing() else abstract
        params = {name: self.param(name, _give(tree)) for name, tree in _nested(initial).items()}
        filled = flatten_dict(params)  # type: ignore[no-untyped-call]  # Flax's own, without annotations
        leaves = [(path, leaf.replace(filled[_names(path)])) for path, leaf in nnx.to_flat_state(abstract)]
        model = nnx.merge(graphdef, nnx.from_flat_state(leaves))
        output: heads.MixtralOutput = model(input_ids, attention_mask, position_ids, cache, key)
        return output

    def _build(self, key: jax.Array) -> heads.Model:
        model = heads.MODELS[self.config.architecture]
        return model(self.config, dtype=self.dtype, rngs=nnx.Rngs(key), experts=self.experts)


def _nested(state: nnx.State[Any, Any]) -> Tree:
    flat = {_names(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    tree: Tree = unflatten_dict(flat)  # type: ignore[no-untyped-call]  # as above
    return tree


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(map(str, path))


def _give(tree: Tree) -> Any:
    """Make an initialiser that gives these arrays; of abstract ones, zeros, which Linen only takes the shapes of."""

    def init(key: jax.Array) -> Tree:
        given: Tree = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, tree
        )
        return given

    return init
