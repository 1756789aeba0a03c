"""Compare recordings of the sides: the same walk as a live run's, and so the same result."""

import sys
from collections.abc import Mapping
from pathlib import Path

from convert import BadInput, Checkpoint
from parity.cast import oracle_side, recorded_side
from parity.comparison import Comparison, Parts
from parity.diagnosis.cause import UNKNOWN, Cause
from parity.diagnosis.causes import name_causes
from parity.inputs import words
from parity.metrics import Precision
from parity.recordings.recording import Recording
from parity.result import Result
from parity.sides.offered import Nothing
from parity.steps import Progress, Steps
from parity.weights import AsStored, compare_configs, compare_hashes

__all__ = ["compare"]


def compare(
    reference: str | Path,
    other: str | Path,
    oracle: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Result:
    """Compare two recordings, with a third one of the oracle or with the oracle run now.

    Args:
        reference: torch's recording.
        other: that of the side under test, recorded with this reference.
        oracle: the oracle's, recorded with this reference; None to run it on the checkpoint.
        checkpoint: the model, for the oracle and for naming causes; where torch was recorded unless given. Where there
            is none, a failure has no cause, and without the oracle's recording nothing can be checked.
        progress: called before each step.

    Raises:
        BadInput: one of them is no recording, or they are not of the same model and inputs.
    """
    torch, flax = Recording.open(reference), Recording.open(other)
    exact = Recording.open(oracle) if oracle is not None else None
    _check_parts(torch, flax, exact)
    dtype, config = torch.manifest.dtype, torch.config
    source = _source(torch, checkpoint)
    differences = compare_configs(config, flax.config)
    hashes = torch.manifest.provenance["weights_sha256"]
    differences += compare_hashes(hashes, flax.manifest.provenance["weights_sha256"])

    def parts(walk_dtype: Precision) -> Parts:
        live = Nothing("oracle") if source is None else oracle_side(source, dtype)
        return {
            "torch": recorded_side(torch, walk_dtype),
            "flax": recorded_side(flax, walk_dtype),
            "oracle": live if exact is None else recorded_side(exact, walk_dtype),
        }

    def not_whole(walk_dtype: Precision) -> Mapping[str, str]:
        recordings = {"torch": torch, "flax": flax}
        return {
            part: recording.manifest.whole[walk_dtype]
            for part, recording in recordings.items()
            if walk_dtype in recording.manifest.whole
        }

    steps = Steps(progress, 1)
    comparison = Comparison(
        config=config,
        batches=torch.batches,
        dtype=dtype,
        layers=range(*torch.manifest.layers),
        detail=torch.manifest.detail,
        parts=parts,
        too_large=not_whole,
        steps=steps,
    )
    steps.total += comparison.walks
    outcome = comparison.run()
    steps.advance("diagnosis")
    causes = [Cause(UNKNOWN, None, d.name, d.reason) for d in differences if not d.name.startswith("config.")][:1]
    if not causes and source is not None:
        weights = AsStored(source.view("hf-legacy"), dtype)
        causes = name_causes(config, differences, ({}, {}), outcome.findings, outcome.suspect, weights)
    path = torch.manifest.provenance["torch_checkpoint"] if source is None else source.path
    return Result(
        causes=causes,
        findings=outcome.findings,
        routing=outcome.routing,
        drift=outcome.drift,
        tokens={batch.name: batch.input_ids.reshape(-1).tolist() for batch in torch.batches},
        words=words(Path(path), torch.batches, outcome.drift),
        differences=differences,
        weights_compared=len(hashes),
        notes=[*comparison.notes(outcome), *_interrupted(torch, flax, exact), *_of_other(torch, flax, exact)],
        dtype=dtype,
        environment={"torch": dict(torch.manifest.environment), "flax": dict(flax.manifest.environment)},
        provenance={**torch.manifest.provenance, "command": sys.argv, "reference": str(reference), "other": str(other)},
        cost=outcome.cost,
    )


def _check_parts(torch: Recording, flax: Recording, exact: Recording | None) -> None:
    wanted = {"torch": torch, "flax": flax, **({} if exact is None else {"oracle": exact})}
    for part, recording in wanted.items():
        if recording.manifest.side != part:
            raise BadInput(f"{recording.path} is a recording of {recording.manifest.side}; expected one of {part} here")
    for recording in list(wanted.values())[1:]:
        if recording.manifest.provenance["inputs"] != torch.manifest.provenance["inputs"]:
            raise BadInput(
                f"{recording.path} and {torch.path} were recorded on other inputs; use --reference to record"
            )
        if recording.manifest.dtype != torch.manifest.dtype:
            raise BadInput(f"{recording.path} is of {recording.manifest.dtype}, {torch.path} of {torch.manifest.dtype}")


def _source(torch: Recording, checkpoint: str | Path | None) -> Checkpoint | None:
    """Open the model: the one given must be there; the one that torch was recorded on may be elsewhere by now."""
    if checkpoint is not None:
        return Checkpoint.open(checkpoint)
    recorded = Path(torch.manifest.provenance["torch_checkpoint"])
    return Checkpoint.open(recorded) if (recorded / "config.json").is_file() else None


def _interrupted(*recordings: Recording | None) -> list[str]:
    return [
        f"the recording {recording.path.name} was interrupted: what it lacks is unchecked; record --resume goes on"
        for recording in recordings
        if recording is not None and not recording.manifest.complete
    ]


def _of_other(torch: Recording, *recordings: Recording | None) -> list[str]:
    return [
        f"{recording.path.name} was not recorded with --reference {torch.path.name}: on torch's input it is unchecked"
        for recording in recordings
        if recording is not None and recording.manifest.reference != torch.manifest.fingerprint
    ]
