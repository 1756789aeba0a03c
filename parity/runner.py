"""One run from checkpoints to Result: open, compare weights, walk, run the models whole."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert import BadInput, Checkpoint
from flax_mixtral.config import MixtralConfig
from parity.backward import compare_gradients
from parity.cast import ATTENTION, EXPERTS, flax_side, oracle_side, recorded_side, torch_side
from parity.comparison import Comparison, Outcome, Parts
from parity.diagnosis.cache_causes import cache_causes
from parity.diagnosis.cause import Cause
from parity.diagnosis.causes import name_causes
from parity.inputs import Suite, suite, words
from parity.meeting import Meeting, Part
from parity.memory import too_large
from parity.metrics import Precision
from parity.pages import Pages
from parity.port import FlaxFactory, Port
from parity.provenance import code_sha256, environment, provenance
from parity.read_ahead import ReadAhead
from parity.recordings.detail import ALL
from parity.recordings.recording import Recording
from parity.result import Result
from parity.sides.timed import Timed
from parity.steps import Progress, Steps
from parity.tokens import Tokens, compare_tokens
from parity.trace import Batch
from parity.verdict import Finding
from parity.weights import AsStored, Difference, compare_configs, compare_hashes, compare_weights

__all__ = ["Progress", "run"]

SHAPES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_local_experts num_experts_per_tok architecture num_labels tie_word_embeddings token_classification_bias"
).split()


def run(
    src: str | Path,
    flax: str | Path | None = None,
    *,
    dtype: Precision = "float32",
    inputs: Suite | Sequence[Batch] = "standard",
    seed: int = 0,
    change: Callable[[Port], Port] | None = None,
    grad: bool = False,
    generate: int = 0,
    layers: range | None = None,
    reference: str | Path | None = None,
    side: FlaxFactory | None = None,
    meeting: Meeting | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Result:
    """Compare Flax with PyTorch on one checkpoint, block by block.

    Args:
        src: a Mixtral checkpoint as torch reads it.
        flax: the converted one, or any of the same model; None maps src in memory.
        dtype: what both sides compute in; the weights are rounded to it for all sides alike. bfloat16 also walks in
            float32, on the same rounded weights.
        inputs: a suite's name, or batches.
        seed: of the suite's token ids.
        change: replaces what is tested, as a planted fault does.
        grad: compare the gradients of the training loss as well; this holds whole models in memory.
        generate: continue the prompts by so many greedy tokens as well; likewise.
        layers: the blocks to compare; all, and the head, unless given. Torch runs those before them alone.
        reference: torch's recording, in place of torch; inputs, dtype and layers are those that it was made with.
        side: builds what is tested in place of flax_mixtral: any implementation of `Side`, whole or in part.
        meeting: of several processes that each compare a range of the layers, see `parity.meeting`.
        progress: called before each step.

    Returns:
        The findings; `verdict` sums them up. At a meeting, those of all processes if this is the last one to end.

    Raises:
        BadInput: a checkpoint cannot be read, or the two are not the same model.
        ConfigError: a config.json cannot be honoured.
    """
    source = Checkpoint.open(src)
    target = source if flax is None else Checkpoint.open(flax)
    port = Port(target.config, target.view("flax")) if side is None else Port(target.config, target.view("flax"), side)
    if change is not None:
        port = change(port)
    differences = _same_model(source.config, port.config, f"{src} and {flax or 'its changed port'}")
    torch = None if reference is None else _reference(reference, source, dtype)
    batches = (
        torch.batches if torch else suite(inputs, source.config, seed) if isinstance(inputs, str) else list(inputs)
    )
    compared = flax is not None or change is not None
    blocks = _layers(layers, torch, source.config)
    if meeting is not None:
        if len(blocks) < source.config.num_hidden_layers:
            raise BadInput(f"share {meeting.share}: shares are of all layers, not of {blocks.start}:{blocks.stop}")
        blocks = meeting.layers(len(blocks))
    last = blocks.stop == source.config.num_hidden_layers or meeting is None
    leaves = (source.view("flax"), port.weights)
    tokens: list[Tokens] = []
    pages = Pages()

    def parts(walk_dtype: Precision) -> Parts:
        pages.give_back()  # another dtype's tensors have other sizes
        return {
            "torch": recorded_side(torch, walk_dtype) if torch else torch_side(source, dtype, walk_dtype, pages),
            "flax": flax_side(port, dtype, walk_dtype, pages),
            "oracle": oracle_side(source, dtype),
        }

    def not_whole(walk_dtype: Precision) -> dict[str, str]:
        pages.give_back()
        reason = too_large(source.config, walk_dtype)
        live = {} if reason is None else dict.fromkeys(("torch", "flax"), reason)
        if torch is None:
            return live
        recorded = {"torch": torch.manifest.whole[walk_dtype]} if walk_dtype in torch.manifest.whole else {}
        return {part: why for part, why in live.items() if part != "torch"} | recorded

    def after(sides: Mapping[str, Timed], walk_dtype: Precision) -> Iterable[Finding]:
        own: Any = (sides["torch"], sides["flax"], sides["oracle"])
        for batch in batches if grad and last else ():
            yield from compare_gradients(
                source.config, sides["torch"], sides["flax"], sides["oracle"], batch, walk_dtype
            )
        if generate and last and not (tokens and tokens[-1].failed):
            tokens.append(compare_tokens(source.config, own, batches, generate, walk_dtype))
            yield from tokens[-1].findings

    hashed = list(leaves[0]) if meeting is None else meeting.leaves(source)
    hashed = hashed if compared or torch else []
    steps = Steps(progress, len(hashed) + 1)
    with ReadAhead([source.view("flax"), target.view("flax")]) as read_ahead:
        comparison = Comparison(
            config=source.config,
            batches=batches,
            dtype=dtype,
            layers=blocks,
            follow=meeting is not None,
            detail=torch.manifest.detail if torch else ALL,
            parts=parts,
            too_large=not_whole,
            steps=steps,
            read_ahead=read_ahead,
            after=after,
        )
        steps.total += comparison.walks
        hashes: dict[str, str] = {}
        if hashed:
            hashes, unequal = compare_weights(*leaves, steps.advance, hashed)
            differences += unequal
        recorded = torch.manifest.provenance["weights_sha256"] if torch else {}
        if wrong := compare_hashes({name: recorded[name] for name in hashes if torch}, hashes):
            raise BadInput(
                f"{src} is not what {reference} was recorded from: {len(wrong)} of {len(hashes)} weights have other "
                f"bytes, {wrong[0].name} the first"
            )
        outcome = comparison.run()
    steps.advance("diagnosis")
    legacy = AsStored(source.view("hf-legacy"), dtype)

    def causes_of(differences: Sequence[Difference], found: Outcome) -> list[Cause]:
        return name_causes(source.config, differences, leaves, found.findings, found.suspect, legacy)

    def causes_of_cache() -> list[Cause]:
        return cache_causes(source.config, legacy, tokens[-1]) if tokens else []

    part = Part(
        outcome=outcome,
        hashes=hashes,
        differences=differences,
        causes=causes_of([], Outcome(suspect=outcome.suspect)) if meeting else [],
        suspected=outcome.suspect.dtype if outcome.suspect else None,
        cache_causes=causes_of_cache() if meeting else [],
    )
    if meeting is not None:
        part = meeting.hand_in(_identity(source, target, torch, batches, port, dtype, seed, grad, generate), part)
        part.outcome.suspect = None  # its causes are known
        if not meeting.missing:
            comparison = replace(comparison, layers=range(source.config.num_hidden_layers))
    found = part.outcome
    return Result(
        causes=causes_of(part.differences, found)
        or (part.causes or part.cache_causes if meeting else causes_of_cache()),
        findings=found.findings,
        routing=found.routing,
        drift=found.drift,
        tokens={batch.name: batch.input_ids.reshape(-1).tolist() for batch in batches},
        words=words(Path(src), batches, found.drift),
        differences=part.differences,
        weights_compared=len(part.hashes) if compared else 0,
        notes=[*comparison.notes(found), *(meeting.notes() if meeting else [])],
        dtype=dtype,
        environment={**environment(), "torch_attention": ATTENTION, "torch_experts": EXPERTS},
        provenance=provenance(src, flax, batches, seed, part.hashes),
        cost=found.cost,
    )


def _reference(path: str | Path, source: Checkpoint, dtype: Precision) -> Recording:
    """Open torch's recording, and refuse one of another model or another run."""
    recording = Recording.open(path)
    if recording.manifest.side != "torch":
        raise BadInput(f"{path} is a recording of {recording.manifest.side}; the reference must be one of torch")
    if recording.manifest.dtype != dtype:
        raise BadInput(f"{path} was recorded for a run in {recording.manifest.dtype}; this one is in {dtype}")
    if wrong := compare_configs(recording.config, source.config):
        lines = "\n".join(f"  - {d.name}: {d.reason}" for d in wrong)
        raise BadInput(f"{path} and {source.path} are not the same model:\n{lines}")
    return recording


def _layers(asked: range | None, torch: Recording | None, config: MixtralConfig) -> range:
    """Give the blocks to compare: those asked for, which must be there."""
    there = torch.layers if torch else range(config.num_hidden_layers)
    layers = there if asked is None else asked
    if not (there.start <= layers.start < layers.stop <= there.stop):
        held = "the recording holds" if torch else "the model has"
        raise BadInput(f"layers {layers.start}:{layers.stop} are not there: {held} {there.start}:{there.stop}")
    return layers


def _same_model(torch: MixtralConfig, flax: MixtralConfig, which: str) -> list[Difference]:
    """List the configuration fields that differ; refuse where they make weights of other shapes."""
    differences = compare_configs(torch, flax)
    if other := [d for d in differences if d.name.removeprefix("config.") in SHAPES]:
        lines = "\n".join(f"  - {d.name}: {d.reason}" for d in other)
        raise BadInput(f"{which} are not the same model:\n{lines}")
    return differences


def _identity(
    source: Checkpoint, target: Checkpoint, torch: Recording | None, batches: Sequence[Batch], port: Port, *options: Any
) -> list[Any]:
    """Give all that a part of this run depends on, as JSON."""
    files = [checkpoint.path / name for checkpoint in (source, target) for name in checkpoint.files.readers]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    inputs = provenance(source.path, None, batches, 0, {})["inputs"]
    configs, code = [source.config.to_hf(), port.config.to_hf()], code_sha256(port.side)
    return [*options, configs, stats, inputs, torch and torch.manifest.fingerprint, environment()["packages"], code]
