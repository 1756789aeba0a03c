"""The models as users run them, whole, against the walk: where they fit in memory."""

from collections.abc import Iterator, Mapping

import numpy as np

from flax_mixtral.config import MixtralConfig
from parity.judging import unless_rerouted
from parity.points import head_points
from parity.sides import WholeModel
from parity.verdict import Finding, Place, judge
from parity.walk import Walk

__all__ = ["compare_whole"]


def compare_whole(
    config: MixtralConfig, walk: Walk, torch: WholeModel, flax: WholeModel, too_large: Mapping[str, str]
) -> Iterator[Finding]:
    """Hold torch's whole model against its own walk, and Flax's against the oracle.

    In bfloat16 the whole model routes freely, so that a benign flip changes its logits at will: it informs.

    Args:
        config: the model's.
        walk: one that has come to its end.
        torch: its side; flax: Flax's.
        too_large: why a side is not run whole, by its part; that is unchecked, and decides nothing.
    """
    point = dict(head_points(config))["logits"]
    by_token = point.axes.startswith("B T")
    for stream in walk.streams:
        batch = stream.batch
        clean_BT = stream.clean_M.reshape(batch.input_ids.shape) | ~batch.real_BT
        rows = stream.clean_M if by_token else np.flatnonzero(clean_BT.all(axis=1))
        walked, exact = stream.torch_logits, stream.oracle_logits
        real_M = batch.real_M if by_token else None
        reference = Place(None, "reference", batch.name, walk.dtype, decides="torch" not in too_large)
        whole = Place(
            None, "whole", batch.name, walk.dtype, decides=walk.dtype != "bfloat16" and "flax" not in too_large
        )
        for place, part, side, compared in ((reference, "torch", torch, real_M), (whole, "flax", flax, rows)):
            if part in too_large:
                yield place.finding("logits", "unchecked", too_large[part])
            else:
                finding = judge("logits", point, place, walked, side.whole(batch), exact, rows=compared)
                yield unless_rerouted(finding, part == "torch" or stream.settled)
