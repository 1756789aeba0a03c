"""The backward pass compared: the training loss's gradients of torch and of Flax against the oracle's.

Whole models are differentiated: this is the part of a run that needs memory for all of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from convert import Checkpoint
from flax_mixtral.axes import axis_sizes
from flax_mixtral.config import MixtralConfig
from parity.gradient_points import KINDS, GradientPoint, gradient_points
from parity.gradients import Gradients, Losses, training_labels
from parity.judging import terms
from parity.metrics import UNIT_ROUNDOFF, Precision
from parity.oracle.model import Oracle
from parity.points import Point
from parity.sides.timed import Timed
from parity.trace import Array, Batch
from parity.verdict import Finding, Place, judge

__all__ = ["compare_gradients"]


class Sides(NamedTuple):
    """The gradients of one batch on all sides, by Flax leaf."""

    torch: Gradients
    flax: Gradients
    exact: Gradients


Arrays = tuple[Array | None, Array | None, Array | None]
"""One gradient of torch, of Flax and of the oracle."""

FEW_TOKENS = 16
"""What fewer tokens made is judged in one row: a row or a channel of it is hardly more than one number of one token,
whose rounding error over its own size is no average (a benign variant reached 6.9 so)."""

SHAKES = (0, 1)
"""Seeds of the two other exact runs that a failure is measured against: their weights are off by one rounding. Where a
token amplifies rounding (two keys in balance under large scores), torch may be right by luck: such a token brought a
correct Flax to 25 times torch's error, and the oracle in float32 to 28 times."""

SEVERITY = {"pass": 0, "unchecked": 1, "fail": 2}


def compare_gradients(
    config: MixtralConfig, torch: Timed, flax: Timed, oracle: Timed, batch: Batch, dtype: Precision
) -> Iterator[Finding]:
    """Differentiate on all sides and judge every gradient, in the order in which the backward pass reaches it.

    Torch routes freely and the oracle as torch did. Flax routes freely as well; where that differs for a real token,
    gradients are of another function, so it is run once more with torch's experts and every finding says `forced`.
    A failure is held against what one rounding of the weights does to the exact gradients before it counts. In bfloat16
    gradients inform: a few correct variants in a hundred exceed any limit that would find a fault.

    Args:
        config: the model's.
        torch: gives gradients in any of convert's layouts.
        flax: gives gradients by leaf.
        oracle: as torch.
        batch: what they are run on.
        dtype: what torch and Flax compute in.
    """
    place = Place(None, "backward", batch.name, dtype, decides=dtype == "float32")
    labels_BT = training_labels(batch)
    if config.architecture != "MixtralForCausalLM":
        yield place.finding("training_loss", "unchecked", f"{config.architecture} has no training loss to compare")
        return
    if (labels_BT < 0).all():
        yield place.finding("training_loss", "unchecked", "empty: no token to predict")
        return
    torch_found, flax_found = torch.gradients(batch, labels_BT), flax.gradients(batch, labels_BT)
    exact = None if torch_found is None else oracle.gradients(batch, labels_BT, torch_found.routing)
    if torch_found is None or flax_found is None or exact is None:
        yield place.finding("training_loss", "unchecked", "a side gives no gradients")
        return
    if not _same_routing(torch_found, flax_found, batch):
        place = replace(place, forced=True)
        flax_found = flax.gradients(batch, labels_BT, torch_found.routing)
        assert flax_found is not None
    torch_found, exact = _by_leaf(config, torch_found), _by_leaf(config, exact)
    findings = list(_judge_all(config, place, Sides(torch_found, flax_found, exact), batch, dtype))
    if isinstance(oracle.side, Oracle) and any(finding.verdict == "fail" for finding in findings):
        shaken = [
            _by_leaf(
                config, oracle.side.shaken(UNIT_ROUNDOFF[dtype], seed).gradients(batch, labels_BT, torch_found.routing)
            )
            for seed in SHAKES
        ]
        near = Sides(_farther([torch_found, *shaken], exact), flax_found, exact)
        again = _judge_all(config, place, near, batch, dtype)
        findings = [new if new.verdict == "pass" else old for old, new in zip(findings, again, strict=True)]
    yield from findings


def _by_leaf(config: MixtralConfig, found: Gradients) -> Gradients:
    """Name gradients of any layout as Flax leaves, through the weights' own map."""
    return replace(found, parameters=dict(Checkpoint.of_arrays(config, found.parameters, "gradients").view("flax")))


def _farther(found: Sequence[Gradients], exact: Gradients) -> Gradients:
    """Give gradients whose error is the root of the sum of the squares of all errors, in the dtype of the first."""

    def sum_up(arrays: Sequence[Array], truth: Array) -> Array:
        error = np.sqrt(sum(np.square(array.astype(np.float64) - truth) for array in arrays))
        return np.asarray(truth + error).astype(arrays[0].dtype)

    losses = (sum_up([one.losses[i] for one in found], exact.losses[i]) for i in range(len(exact.losses)))
    return replace(
        exact,
        losses=Losses(*losses),
        parameters={leaf: sum_up([one.parameters[leaf] for one in found], x) for leaf, x in exact.parameters.items()},
        stream=[sum_up([one.stream[i] for one in found], x) for i, x in enumerate(exact.stream)],
    )


def _judge_all(config: MixtralConfig, place: Place, sides: Sides, batch: Batch, dtype: str) -> Iterator[Finding]:
    """Judge every point, in the order in which the backward pass reaches it."""
    for name in Losses._fields:
        scalars = (getattr(found.losses, name) for found in sides)
        point, summed = Point(name, "whole", "", "a scalar of the batch"), terms(name, config, batch)
        yield judge(name, point, place, *scalars, summed=summed)
    for row in gradient_points(config):
        own = replace(place, layer=row.layer)
        if row.leaf is None:
            streams = (found.stream[-1 if row.layer is None else row.layer] for found in sides)
            yield judge(row.point.name, row.point, own, *streams, rows=batch.real_M)
            continue
        arrays = (
            sides.torch.parameters[row.leaf],
            sides.flax.parameters.get(row.leaf),
            sides.exact.parameters[row.leaf],
        )
        if row.by_expert:
            assert row.layer is not None
            ids_MA = sides.exact.routing[row.layer][batch.real_M]
            tokens_E = np.bincount(ids_MA.ravel(), minlength=config.num_local_experts)
            yield _judge_experts(config, row, own, arrays, tokens_E, dtype)
        elif sides.exact.parameters[row.leaf].any():
            yield _judge_leaf(config, row, own, arrays, int(batch.real_M.sum()), dtype)
        else:
            yield _judge_cancelled(row, own, arrays, _largest(sides.exact, row.leaf), dtype)


def _largest(found: Gradients, leaf: str) -> float:
    """Give the largest element of all gradients of a leaf's layer."""

    def layer(path: str) -> str:
        return path.split(".")[2] if ".layers." in path else ""

    return max(float(np.abs(x).max()) for path, x in found.parameters.items() if layer(path) == layer(leaf))


def _same_routing(torch: Gradients, flax: Gradients, batch: Batch) -> bool:
    real_M = batch.real_M
    return all(
        np.array_equal(np.sort(torch_MA[real_M], axis=1), np.sort(flax_MA[real_M], axis=1))
        for torch_MA, flax_MA in zip(torch.routing, flax.routing, strict=True)
    )


def _judge_leaf(
    config: MixtralConfig, row: GradientPoint, place: Place, arrays: Arrays, tokens: int, dtype: str
) -> Finding:
    """Judge one parameter, or one expert of it, as [rows, channels]; all in one row where few tokens made it."""
    name = row.point.name
    if any(array is None or array.size == 0 for array in arrays):
        return judge(name, row.point, place, *arrays)
    kind = next(kind for kind in KINDS if name.endswith(f".{kind}"))
    rows = math.prod(axis_sizes(config)[axis] for axis in KINDS[kind].split()) if tokens >= FEW_TOKENS else 1
    shaped = (array if array is None else array.reshape(rows, -1) for array in arrays)
    return judge(name, row.point, place, *shaped)


def _judge_experts(
    config: MixtralConfig, row: GradientPoint, place: Place, arrays: Arrays, tokens_E: Array, dtype: str
) -> Finding:
    """Judge a stacked parameter expert by expert; the worst stands for all."""
    name = row.point.name
    torch, flax, exact = arrays
    if torch is None or flax is None or exact is None or not torch.shape == flax.shape == exact.shape:
        return judge(name, row.point, place, *arrays)
    findings = []
    for expert, tokens in enumerate(tokens_E):
        own = (torch[expert], flax[expert], exact[expert])
        finding = _no_gradient(name, place, own) or _judge_leaf(config, row, place, own, int(tokens), dtype)
        reason = None if finding.reason is None else f"expert {expert}: {finding.reason}"
        findings.append(replace(finding, reason=reason))
    return max(findings, key=lambda finding: (SEVERITY[finding.verdict], finding.margin or 0.0))


def _no_gradient(name: str, place: Place, arrays: tuple[Array, Array, Array]) -> Finding | None:
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


def _judge_cancelled(row: GradientPoint, place: Place, arrays: Arrays, scale: float, dtype: str) -> Finding:
    """Judge a parameter whose exact gradient is zero since its parts cancel (queries that see one key, one expert).

    Rounding leaves something of the size of the parts, or nothing, and neither is wrong: all arrays are compared after
    adding `scale`, the largest element of the layer's gradients: a side may leave roundings of that.
    """
    torch, flax, exact = arrays
    if torch is None or flax is None or exact is None or torch.dtype != flax.dtype:
        return judge(row.point.name, row.point, place, *arrays)
    shifted = (np.add(array.reshape(1, -1), scale, dtype=np.float64) for array in (torch, flax, exact))
    return judge(row.point.name, row.point, place, *shifted)
