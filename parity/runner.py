"""One run from checkpoints to Result: open, compare weights, walk, run the models whole."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    if torch is not None:
        batches: Sequence[Batch] = torch.batches
    else:
        batches = suite(inputs, source.config, seed) if isinstance(inputs, str) else list(inputs)
    blocks = _layers(layers, torch, source.config)
    if meeting is not None:
        if len(blocks) < source.config.num_hidden_layers:
            raise BadInput(f"share {meeting.share}: shares are of all layers, not of {blocks.start}:{blocks.stop}")
        blocks = meeting.layers(len(blocks))
    task = _Task(source, target, port, torch, batches, dtype, blocks, grad, generate, meeting)
    compared = flax is not None or change is not None
    hashed = task.leaves if compared or torch else []
    steps = Steps(progress, len(hashed) + 1)
    with ReadAhead([source.view("flax"), target.view("flax")]) as read_ahead:
        comparison = task.comparison(steps, read_ahead)
        steps.total += comparison.walks
        hashes, unequal = task.compare_weights(hashed, steps.advance)
        outcome = comparison.run()
    steps.advance("diagnosis")
    part = task.part(outcome, hashes, [*differences, *unequal])
    if meeting is not None:
        part = meeting.hand_in(task.identity(seed), part)
        if not meeting.missing:
            comparison = replace(comparison, layers=range(source.config.num_hidden_layers))
    found = part.outcome
    return Result(
        causes=task.causes(part),
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


@dataclass(slots=True)
class _Task:
    """What one process compares, and with what; see `run` for the fields."""

    source: Checkpoint
    target: Checkpoint
    port: Port
    torch: Recording | None
    batches: Sequence[Batch]
    dtype: Precision
    blocks: range
    grad: bool
    generate: int
    meeting: Meeting | None
    pages: Pages = field(default_factory=Pages)
    tokens: list[Tokens] = field(default_factory=list)

    @property
    def leaves(self) -> list[str]:
        """The leaves whose weights this process compares."""
        return list(self.source.view("flax")) if self.meeting is None else self.meeting.leaves(self.source)

    def comparison(self, steps: Steps, read_ahead: ReadAhead) -> Comparison:
        """Set up the walks and what follows them."""
        return Comparison(
            config=self.source.config,
            batches=self.batches,
            dtype=self.dtype,
            layers=self.blocks,
            follow=self.meeting is not None,
            detail=self.torch.manifest.detail if self.torch else ALL,
            parts=self._parts,
            too_large=self._too_large,
            steps=steps,
            read_ahead=read_ahead,
            after=self._after,
        )

    def compare_weights(
        self, names: Sequence[str], advance: Callable[[str], None]
    ) -> tuple[dict[str, str], list[Difference]]:
        """Compare leaves bit for bit, and with those that the reference was recorded from.

        Raises:
            BadInput: it was recorded from others.
        """
        hashes, unequal = compare_weights(self.source.view("flax"), self.port.weights, advance, names)
        if self.torch is None:
            return hashes, unequal
        recorded = self.torch.manifest.provenance["weights_sha256"]
        if wrong := compare_hashes({name: recorded[name] for name in hashes}, hashes):
            raise BadInput(
                f"{self.source.path} is not what {self.torch.path} was recorded from: {len(wrong)} of "
                f"{len(hashes)} weights have other bytes, {wrong[0].name} the first"
            )
        return hashes, unequal

    def part(self, outcome: Outcome, hashes: Mapping[str, str], differences: Sequence[Difference]) -> Part:
        """Put together what this process found; at a meeting with its causes: no other process has its suspect."""
        return Part(
            outcome=outcome,
            hashes=hashes,
            differences=differences,
            causes=self._causes([], Outcome(suspect=outcome.suspect)) if self.meeting else [],
            suspected=outcome.suspect.dtype if outcome.suspect else None,
            cache_causes=cache_causes(self.source.config, self._legacy, self.tokens[-1]) if self.tokens else [],
        )

    def causes(self, part: Part) -> Sequence[Cause]:
        """Give the surest causes: differences before anything is computed, then a block's, then the cache's."""
        found = replace(part.outcome, suspect=None) if self.meeting else part.outcome  # the causes of that are known
        return self._causes(part.differences, found) or part.causes or part.cache_causes

    def identity(self, seed: int) -> list[Any]:
        """Give all that a part of this run depends on, as JSON."""
        files = [each.path / name for each in (self.source, self.target) for name in each.files.readers]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        inputs = provenance(self.source.path, None, self.batches, 0, {})["inputs"]
        configs, code = [self.source.config.to_hf(), self.port.config.to_hf()], code_sha256(self.port.side)
        recorded, options = self.torch and self.torch.manifest.fingerprint, [self.dtype, seed, self.grad, self.generate]
        return [*options, configs, stats, inputs, recorded, environment()["packages"], code]

    @property
    def _legacy(self) -> AsStored:
        return AsStored(self.source.view("hf-legacy"), self.dtype)

    def _causes(self, differences: Sequence[Difference], found: Outcome) -> list[Cause]:
        leaves = (self.source.view("flax"), self.port.weights)
        return name_causes(self.source.config, differences, leaves, found.findings, found.suspect, self._legacy)

    def _parts(self, walk_dtype: Precision) -> Parts:
        self.pages.give_back()  # another dtype's tensors have other sizes
        live = (self.source, self.dtype, walk_dtype, self.pages)
        return {
            "torch": recorded_side(self.torch, walk_dtype) if self.torch else torch_side(*live),
            "flax": flax_side(self.port, self.dtype, walk_dtype, self.pages),
            "oracle": oracle_side(self.source, self.dtype),
        }

    def _too_large(self, walk_dtype: Precision) -> dict[str, str]:
        self.pages.give_back()
        reason = too_large(self.source.config, walk_dtype)
        live = {} if reason is None else dict.fromkeys(("torch", "flax"), reason)
        if self.torch is None:
            return live
        whole = self.torch.manifest.whole
        recorded = {"torch": whole[walk_dtype]} if walk_dtype in whole else {}
        return {part: why for part, why in live.items() if part != "torch"} | recorded

    def _after(self, sides: Mapping[str, Timed], walk_dtype: Precision) -> Iterable[Finding]:
        """Compare gradients and tokens: whole models, so of several processes the one that has the head does."""
        config, last = self.source.config, self.blocks.stop == self.source.config.num_hidden_layers
        if self.meeting is not None and not last:
            return
        own: Any = (sides["torch"], sides["flax"], sides["oracle"])
        for batch in self.batches if self.grad else ():
            yield from compare_gradients(config, own[0], own[1], own[2], batch, walk_dtype)
        if self.generate and not (self.tokens and self.tokens[-1].failed):
            self.tokens.append(compare_tokens(config, own, self.batches, self.generate, walk_dtype))
            yield from self.tokens[-1].findings


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
