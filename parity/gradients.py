"""What a side gives back of one backward pass, and the labels that all sides are trained on.

Imports NumPy and parity's traces only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from parity.trace import Array, Batch

__all__ = ["IGNORED", "Differentiable", "Gradients", "Losses", "training_labels"]

IGNORED = -100
"""The label of a token that is not predicted, as in torch's cross entropy."""


class Losses(NamedTuple):
    """The scalars of one batch, all []."""

    loss: Array
    """Mean cross entropy of the labels."""
    aux_loss: Array
    """Load-balancing loss of the real tokens, without its coefficient."""
    training_loss: Array
    """What is differentiated: loss + router_aux_loss_coef * aux_loss."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of the training loss of one batch.

    Args:
        losses: the scalars.
        parameters: the gradient of every parameter, by the names of any of convert's layouts.
        stream: L + 1 arrays [B, T, D]: with respect to the input of each block, and to the last one's output.
        routing: L arrays [M, A]: the experts that each token went to.
    """

    losses: Losses
    parameters: Mapping[str, Array]
    stream: Sequence[Array]
    routing: Sequence[Array]


@runtime_checkable
class Differentiable(Protocol):
    """A side that can also give gradients."""

    def gradients(self, batch: Batch, labels_BT: Array, routing: Sequence[Array] | None = None) -> Gradients:
        """Differentiate the training loss of the whole model.

        Args:
            batch: what it is run on.
            labels_BT: as `training_labels` gives them.
            routing: L arrays [M, A] of expert ids to use instead of the routers' own choice.
        """
        ...


def training_labels(batch: Batch) -> Array:
    """Give the tokens to predict, [B, T]: the batch's own; none that is padding, or that follows padding.

    The first real token of a row padded on the left would be predicted from a padding token, which sees no token at
    all: its gradient depends on how an implementation fills the attention of such a row.
    """
    real_BT = batch.real_BT
    follows_BT = np.pad(real_BT, ((0, 0), (1, 0)))[:, :-1]
    labels: Array = np.where(real_BT & follows_BT, batch.input_ids, IGNORED)
    return labels
