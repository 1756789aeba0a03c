"""How a fault gets into a port: through its weights, its configuration, a function, its input or its recording."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax

from flax_mixtral.config import MixtralConfig
from parity.decoding import Decoded
from parity.metrics import Precision
from parity.port import Port
from parity.sides import Keeping, Operations, Side
from parity.sides.flax import FlaxSide
from parity.trace import Array, Batch, Trace

__all__ = ["GENERATES", "Fault", "Functions", "Need", "Scene", "Weights", "planted", "replaced"]

Weights = Mapping[str, Array]
Functions = tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]


def _same_leaf(config: MixtralConfig, weights: Weights, leaf: str) -> Array:
    return weights[leaf]


class Scene(NamedTuple):
    """What a fault is to be planted into.

    Args:
        config: the model's.
        ties: tokens of the inputs whose last expert ties exactly, at the layer in question.
        tokens: of the largest batch, padding included.
        longest: real tokens of the inputs' longest row.
        quietest: the smallest mean square of a real token in what the layer is fed.
    """

    config: MixtralConfig
    ties: int
    tokens: int
    longest: int
    quietest: float


@dataclass(frozen=True, slots=True)
class Need:
    """What a model or its inputs must have for a fault to exist."""

    says: str
    met: Callable[[Scene], bool]


GENERATES = Need("a language model", lambda scene: scene.config.architecture == "MixtralForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of the catalogue.

    Args:
        slug: its name.
        shows: the points that may show it first; "expert.gate" stands for that of any expert.
        place: whether it is planted into one layer, into the head, into the model as a whole, or into its cache.
        dtypes: where it exists.
        weights: gives a leaf as the fault has it, from the configuration, all leaves and the leaf's path.
        config: changes the configuration.
        functions: pairs of a function of flax_mixtral and what takes its place, for a configuration.
        batch: changes what the side is fed.
        trace: changes what the side records, in place; the side is there to compute with.
        needs: without which there is nothing to plant; None where every model can have it.
        unchecked: whether "unchecked" is the right verdict, there being nothing to compare.
        fixed_layer: the layer that shows a fault of the whole model, where it is not the embedding or the head.
    """

    slug: str
    shows: tuple[str, ...]
    place: Literal["layer", "head", "model", "cache"] = "layer"
    dtypes: tuple[Precision, ...] = ("float32", "bfloat16")
    weights: Callable[[MixtralConfig, Weights, str], Array] = _same_leaf
    config: Callable[[MixtralConfig], MixtralConfig] = lambda config: config
    functions: Callable[[MixtralConfig], Functions] = lambda config: ()
    batch: Callable[[Batch], Batch] = lambda batch: batch
    trace: Callable[[Trace, FlaxSide, Batch], None] = lambda trace, side, batch: None
    needs: Need | None = None
    unchecked: bool = False
    fixed_layer: int | None = None

    def lacks(self, scene: Scene) -> str | None:
        """Say what is missing for the fault to exist, or None."""
        return None if self.needs is None or self.needs.met(scene) else self.needs.says


def planted(fault: Fault, layer: int) -> Callable[[Port], Port]:
    """Give the change that puts a fault into a port; `layer` counts for faults of one layer."""

    def change(port: Port) -> Port:
        where = f"layers.{layer}." if fault.place == "layer" else ""
        weights = port.weights
        if fault.weights is not _same_leaf:
            weights = PlantedWeights(fault, port.config, weights, where)
        return replace(
            port,
            weights=weights,
            side=lambda config, weights: _PlantedSide(fault, layer, config, weights, port.side(config, weights)),
        )

    return change


class PlantedWeights(Mapping[str, Array]):
    """Weights as a fault has them, in one layer or everywhere."""

    def __init__(self, fault: Fault, config: MixtralConfig, weights: Weights, where: str):
        self._fault, self._config, self._weights, self._where = fault, config, weights, where

    def __getitem__(self, leaf: str) -> Array:
        if self._where in leaf:
            return self._fault.weights(self._config, self._weights, leaf)
        return self._weights[leaf]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@contextmanager
def replaced(functions: Functions) -> Iterator[None]:
    """Put substitutes wherever flax_mixtral and the Flax side hold the originals, modules and methods alike."""
    with ExitStack() as stack:
        for original, substitute in functions:
            for holder, name in _holders(original):
                stack.enter_context(mock.patch.object(holder, name, substitute))
        yield


def _holders(original: Callable[..., Any]) -> Iterator[tuple[ModuleType | type, str]]:
    if "." in original.__qualname__:
        owner, name = original.__qualname__.split(".")
        yield getattr(sys.modules[original.__module__], owner), name
        return
    for module in list(sys.modules.values()):
        own = module.__name__.startswith(("flax_mixtral.", "parity.sides.flax"))
        if own and getattr(module, original.__name__, None) is original:
            yield module, original.__name__


class _PlantedSide(FlaxSide):
    """The Flax side with a fault in one layer, in the head, or in what the whole model is fed.

    Args:
        fault: what is planted.
        layer: where, if it is a fault of one layer; all others are `sound`'s.
        config: the model's.
        weights: as the fault has them.
        sound: the port's own side.
    """

    def __init__(self, fault: Fault, layer: int, config: MixtralConfig, weights: Weights, sound: Side):
        super().__init__(config, weights)
        self._fault, self._layer, self._sound = fault, layer, sound
        self._functions = fault.functions(config)
        self._faulty = FlaxSide(fault.config(config), weights)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Compute as the fault has it, op by op.

        What was compiled of the sound port is then not found in its place, XLA cannot widen a rounding that is planted,
        and nothing is compiled that runs once.
        """
        with replaced(self._functions), jax.disable_jit():
            yield

    def embed(self, batch: Batch) -> Array:
        """See `Side.embed`."""
        return super().embed(self._fault.batch(batch) if self._fault.place == "model" else batch)

    def block(self, layer: int, x_BTD: Array, batch: Batch, routing: Array | None = None) -> Trace:
        """See `Side.block`."""
        if self._fault.place == "model":
            return super().block(layer, x_BTD, batch, routing)
        if self._fault.place != "layer" or layer != self._layer:
            return self._sound.block(layer, x_BTD, batch, routing)
        with self._at_work():
            trace = self._faulty.block(layer, x_BTD, self._fault.batch(batch), routing)
        self._fault.trace(trace, self._faulty, batch)
        return trace

    def done(self, layer: int) -> None:
        """See `Keeping.done`."""
        super().done(layer)
        self._faulty.done(layer)
        if isinstance(self._sound, Keeping):
            self._sound.done(layer)

    def operations(self, layer: int, x_BTD: Array, given: Trace, batch: Batch) -> Trace:
        """See `Operations.operations`."""
        if self._fault.place == "model":
            return super().operations(layer, x_BTD, given, batch)
        if self._fault.place != "layer" or layer != self._layer:
            assert isinstance(self._sound, Operations), f"{self._sound.name} runs no single operations"
            return self._sound.operations(layer, x_BTD, given, batch)
        with self._at_work():
            trace = self._faulty.operations(layer, x_BTD, given, self._fault.batch(batch))
        self._fault.trace(trace, self._faulty, batch)
        return trace

    def head(self, x_BTD: Array, batch: Batch) -> Trace:
        """See `Side.head`."""
        if self._fault.place == "layer":
            return self._sound.head(x_BTD, batch)
        if self._fault.place != "head":
            return super().head(x_BTD, batch)
        with self._at_work():
            return super().head(x_BTD, batch)

    def generate(self, batch: Batch, new: int) -> Array:
        """See `Generates.generate`."""
        if self._fault.place != "cache":
            return super().generate(batch, new)
        with self._at_work():
            return self._faulty.generate(batch, new)

    def decode(self, batch: Batch, ids_BX: Array, routing: Sequence[Array] | None = None) -> Decoded:
        """See `Generates.decode`."""
        if self._fault.place != "cache":
            return super().decode(batch, ids_BX, routing)
        with self._at_work():
            return self._faulty.decode(batch, ids_BX, routing)
