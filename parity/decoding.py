"""What a side gives back of a continuation, and the batch that a continuation makes.

Imports NumPy and parity's traces only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from parity.trace import Array, Batch, Trace

__all__ = ["Decoded", "Generates", "continuable", "continued", "in_steps", "joined"]


class Decoded(NamedTuple):
    """A prompt and the tokens after it, fed one at a time through the cache.

    Args:
        logits_BXV: after the prompt and after each token: X is one more than the tokens that were fed.
        routing: a trace per layer with `router_logits` and the router's own choice `router_ids`; M = B * (T + X - 1),
            row by row.
    """

    logits_BXV: Array
    routing: Sequence[Trace]


@runtime_checkable
class Generates(Protocol):
    """A side that can also continue a prompt."""

    def generate(self, batch: Batch, new: int) -> Array | None:
        """Continue every row greedily, as users do: the new tokens [B, new]. No token ends a row. None: it cannot."""
        ...

    def decode(self, batch: Batch, ids_BX: Array, routing: Sequence[Array] | None = None) -> Decoded | None:
        """Run the prompt, then the given tokens one by one, with a cache; None from a side that cannot.

        Args:
            batch: the prompt.
            ids_BX: the tokens after it.
            routing: L arrays [M, A] of expert ids for prompt and tokens, to use instead of the routers' own choice.
        """
        ...


def continuable(batch: Batch) -> bool:
    """Say whether a batch can be a prompt: every row ends in a real token, and positions count the real ones."""
    if not batch.real_BT[:, -1].all():
        return False
    return batch.position_ids is None or np.array_equal(batch.position_ids, _counted(batch.real_BT))


def continued(batch: Batch, ids_BX: Array) -> Batch:
    """Put tokens after a prompt: the batch that one full forward takes instead of many steps."""
    input_ids = np.concatenate([batch.input_ids, ids_BX], axis=1)
    if batch.attention_mask is None:
        return Batch(batch.name, input_ids)
    real_BT = np.concatenate([batch.real_BT, np.ones(ids_BX.shape, bool)], axis=1)
    return Batch(batch.name, input_ids, real_BT.astype(np.int64), _counted(real_BT))


def in_steps(batch: Batch, ids_BX: Array) -> Iterator[slice]:
    """Walk prompt and tokens as decoding does: the prompt at once, then one token after the other."""
    T = batch.input_ids.shape[1]
    yield slice(0, T)
    yield from (slice(t, t + 1) for t in range(T, T + ids_BX.shape[1]))


def joined(steps: Sequence[Sequence[Mapping[str, Array]]], rows: int) -> list[Trace]:
    """Put each layer's arrays together, [tokens of a step, ...] each, as if all tokens had been run at once."""
    traces = []
    for layer in zip(*steps, strict=True):
        by_row = {name: [step[name].reshape(rows, -1, *step[name].shape[1:]) for step in layer] for name in layer[0]}
        joined = {name: np.concatenate(arrays, axis=1) for name, arrays in by_row.items()}
        traces.append(Trace({name: array.reshape(-1, *array.shape[2:]) for name, array in joined.items()}))
    return traces


def _counted(real_BT: Array) -> Array:
    counted_BT: Array = np.maximum(real_BT.cumsum(axis=1) - 1, 0)
    return counted_BT
