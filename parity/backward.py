"""The backward pass compared: the training loss's gradients of torch and of Flax against the oracle's.

Whole models are differentiated: this is the part of a run that needs memory for all of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from convert import Checkpoint
from flax_mixtral.axes import axis_sizes
from flax_mixtral.config import MixtralConfig
from parity.gradient_points import KINDS, GradientPoint, gradient_points
from parity.gradients import Gradients, Losses, training_labels
from parity.metrics import Precision
from parity.points import Point
from parity.sides.timed import Timed
from parity.trace import Array, Batch
from parity.verdict import Finding, Place, judge

__all__ = ["compare_gradients"]

SEVERITY = {"pass": 0, "unchecked": 1, "fail": 2}


def compare_gradients(
    config: MixtralConfig, torch: Timed, flax: Timed, oracle: Timed, batch: Batch, dtype: Precision
) -> Iterator[Finding]:
    """Differentiate on all sides and judge every gradient, in the order in which the backward pass reaches it.

    Torch routes freely and the oracle as torch did. Flax routes freely as well; where that differs for a real token,
    gradients are of another function, so it is run once more with torch's experts and every finding says `forced`.

    Args:
        config: the model's.
        torch: gives gradients in any of convert's layouts.
        flax: gives gradients by leaf.
        oracle: as torch.
        batch: what they are run on.
        dtype: what torch and Flax compute in.
    """
    place = Place(None, "backward", batch.name, dtype)
    labels_BT = training_labels(batch)
    if config.architecture != "MixtralForCausalLM":
        yield place.finding("training_loss", "unchecked", f"{config.architecture} has no training loss to compare")
        return
    if (labels_BT < 0).all():
        yield place.finding("training_loss", "unchecked", "empty: no token to predict")
        return
    torch_found = torch.gradients(batch, labels_BT)
    if torch_found is None or (exact := oracle.gradients(batch, labels_BT, torch_found.routing)) is None:
        yield place.finding("training_loss", "unchecked", "torch or the oracle gives no gradients")
        return
    flax_found = flax.gradients(batch, labels_BT)
    forced = flax_found is not None and not _same_routing(torch_found, flax_found, batch)
    if forced:
        flax_found = flax.gradients(batch, labels_BT, torch_found.routing)
    place = replace(place, forced=forced)
    yield from _judge_losses(place, torch_found, flax_found, exact, dtype)
    torch_leaves, exact_leaves = (_leaves(config, found.parameters) for found in (torch_found, exact))
    for row in gradient_points(config):
        own = replace(place, layer=row.layer)
        if row.leaf is None:
            yield _judge_stream(row, own, (torch_found, flax_found, exact), batch, dtype)
        else:
            flax_array = None if flax_found is None else flax_found.parameters.get(row.leaf)
            arrays = (torch_leaves[row.leaf], flax_array, exact_leaves[row.leaf])
            yield _judge_leaf(config, row, own, arrays, dtype)


def _leaves(config: MixtralConfig, parameters: Mapping[str, Array]) -> Mapping[str, Array]:
    """See gradients of any layout as Flax leaves, through the weights' own map."""
    return Checkpoint.of_arrays(config, parameters, "gradients").view("flax")


def _same_routing(torch: Gradients, flax: Gradients, batch: Batch) -> bool:
    real_M = batch.real_M
    return all(
        np.array_equal(np.sort(torch_MA[real_M], axis=1), np.sort(flax_MA[real_M], axis=1))
        for torch_MA, flax_MA in zip(torch.routing, flax.routing, strict=True)
    )


def _judge_losses(
    place: Place, torch: Gradients, flax: Gradients | None, exact: Gradients, dtype: str
) -> Iterator[Finding]:
    for name in Losses._fields:
        arrays = (None if found is None else getattr(found.losses, name) for found in (torch, flax, exact))
        yield judge(name, Point(name, "whole", "", "a scalar of the batch"), place, *arrays)


def _judge_stream(
    row: GradientPoint,
    place: Place,
    found: tuple[Gradients, Gradients | None, Gradients],
    batch: Batch,
    dtype: str,
) -> Finding:
    number = -1 if row.layer is None else row.layer
    arrays = (None if one is None else one.stream[number] for one in found)
    return judge(row.point.name, row.point, place, *arrays, rows=batch.real_M)


def _judge_leaf(
    config: MixtralConfig,
    row: GradientPoint,
    place: Place,
    arrays: tuple[Array | None, Array | None, Array | None],
    dtype: str,
) -> Finding:
    """Judge a leaf as [rows, channels]; a stacked one expert by expert, of which the worst stands for the leaf."""
    name = row.point.name
    torch, flax, exact = arrays
    if torch is None or flax is None or exact is None or not torch.shape == flax.shape == exact.shape:
        return judge(name, row.point, place, *arrays)
    kind = next(kind for kind in KINDS if name.endswith(f".{kind}"))
    rows = math.prod(axis_sizes(config)[axis] for axis in KINDS[kind].split())
    if not row.by_expert:
        return judge(name, row.point, place, *(x.reshape(rows, -1) for x in (torch, flax, exact)))
    findings = []
    for expert in range(len(exact)):
        own = [x[expert].reshape(rows, -1) for x in (torch, flax, exact)]
        finding = _no_gradient(name, place, own) or judge(name, row.point, place, *own)
        reason = None if finding.reason is None else f"expert {expert}: {finding.reason}"
        findings.append(replace(finding, reason=reason))
    return max(findings, key=lambda finding: (SEVERITY[finding.verdict], finding.margin or 0.0))


def _no_gradient(name: str, place: Place, arrays: Sequence[Array]) -> Finding | None:
    """Judge an expert that some side gives no gradient at all: nothing is right where the exact answer is nothing."""
    torch, flax, exact = (bool(np.any(array)) for array in arrays)
    if (torch and flax and exact) or not np.isfinite(arrays[1].astype(np.float64)).all():
        return None  # for `judge`
    if not exact and not flax:
        return place.finding(name, "pass" if not torch else "unchecked", "torch has a gradient" if torch else None)
    if exact and not torch:
        return place.finding(name, "unchecked", "torch has no gradient although tokens went there")
    wrong = "has a gradient although no token went there" if flax else "has no gradient although tokens went there"
    return place.finding(name, "fail", f"Flax {wrong}")
