"""From a run's failures to their causes: weights first, then what no arithmetic explains, then replay of the block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flax_mixtral.config import MixtralConfig
from parity.diagnosis.cause import Cause
from parity.diagnosis.diagnose import replay, replay_head
from parity.diagnosis.weight_causes import weight_causes
from parity.metrics import Precision
from parity.points import block_points
from parity.trace import Array, Batch, Trace
from parity.verdict import Finding
from parity.weights import Difference

__all__ = ["Suspect", "name_causes"]


@dataclass(frozen=True, slots=True)
class Suspect:
    """The first block, or the head, that failed on torch's own input.

    Args:
        layer: 0-based; None for the head.
        batch: what it was run on.
        x_BTD: its input.
        torch: torch's points.
        flax: Flax's points.
        dtype: what both computed in.
        routing: torch's experts where they were forced on Flax.
        inputs: what each operation was fed, where that was not Flax's own points.
        point: the point to explain; None for any that fails.
    """

    layer: int | None
    batch: Batch
    x_BTD: Array
    torch: Trace
    flax: Trace
    dtype: Precision
    routing: Array | None = None
    inputs: Trace | None = None
    point: str | None = None


def name_causes(
    config: MixtralConfig,
    differences: Sequence[Difference],
    leaves: tuple[Mapping[str, Array], Mapping[str, Array]],
    findings: Sequence[Finding],
    suspect: Suspect | None,
    weights: Mapping[str, Array],
) -> list[Cause]:
    """Name what is behind a run's failures, the surest first.

    Args:
        config: the model's.
        differences: of configuration and weights.
        leaves: the source's and Flax's leaves by path.
        findings: of the whole run.
        suspect: what to replay.
        weights: Hugging Face's legacy names to the arrays that were computed with.
    """
    wrong = [difference.name for difference in differences if not difference.name.startswith("config.")]
    causes = weight_causes(config, *leaves, wrong)
    if causes:
        return causes
    causes = [*_of_inputs(findings), *_of_recordings(config, findings)]
    if causes or suspect is None:
        return causes
    if suspect.layer is None:
        return replay_head(
            config, weights, suspect.batch, suspect.x_BTD, suspect.torch, suspect.flax, dtype=suspect.dtype
        )
    return replay(
        config,
        weights,
        suspect.batch,
        suspect.layer,
        suspect.x_BTD,
        suspect.torch,
        suspect.flax,
        dtype=suspect.dtype,
        routing=suspect.routing,
        inputs=suspect.inputs,
        point=suspect.point,
    )


def _of_inputs(findings: Sequence[Finding]) -> Iterator[Cause]:
    """Blame the tokens where the embedding differs although its weights do not."""
    for finding in findings:
        if finding.point == "embed" and finding.verdict == "fail":
            evidence = f"{finding.reason}, although every weight is equal: the sides were fed other tokens"
            yield Cause("inputs-differ", None, "embed", evidence)
            return


def _of_recordings(config: MixtralConfig, findings: Sequence[Finding]) -> Iterator[Cause]:
    """Blame the recording where points are missing or empty; all of a block's points are no overlap."""
    missing: dict[int | None, set[str]] = {}
    for finding in findings:
        if finding.verdict == "unchecked" and finding.decides and finding.mode == "local":
            missing.setdefault(finding.layer, set()).add(finding.point)
    names = [name for name, _ in block_points(config) if name not in ("resid_out", "lens")]
    for layer, points in missing.items():
        if layer is None:
            continue
        first = next(name for name in [*names, *sorted(points)] if name in points)
        if points >= set(names):
            yield Cause(
                "traces-do-not-overlap", layer, first, f"none of the {len(names)} points before resid_out is there"
            )
        else:
            yield Cause(
                "points-missing", layer, first, f"{len(points)} of {len(names)} points: {', '.join(sorted(points))}"
            )
