"""One run from checkpoints to Result: open, compare weights, walk, run the models whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from convert import BadInput, Checkpoint
from flax_mixtral.config import MixtralConfig
from parity.backward import compare_gradients
from parity.cache_causes import cache_causes
from parity.causes import Suspect, name_causes
from parity.drift import Drift
from parity.inputs import Suite, suite, texts, unexercised
from parity.metrics import Precision
from parity.oracle import Oracle
from parity.points import head_points
from parity.port import Port
from parity.provenance import environment, provenance
from parity.result import Result
from parity.router import LayerRouting
from parity.sides import Side, WholeModel
from parity.sides.timed import Cost, Timed
from parity.sides.torch_hf import Attention, Experts, TorchSide, whole_logits
from parity.tokens import Tokens, compare_tokens
from parity.trace import Array, Batch
from parity.verdict import Finding, Place, judge
from parity.walk import RoutingKey, Sides, Walk
from parity.weights import Difference, Rounded, compare_configs, compare_weights

__all__ = ["Progress", "run"]

Progress = Callable[[str, int, int], None]
"""Called with what is done now, how many steps are done, and how many there are."""

WALKS: dict[Precision, tuple[Precision, ...]] = {"float32": ("float32",), "bfloat16": ("bfloat16", "float32")}
"""The dtypes that a run walks in: what bfloat16's rounding hides, float32 on the same weights shows."""

ATTENTION: Attention = "eager"
EXPERTS: Experts = "grouped_mm"
"""transformers' implementations that the torch side runs: the one whose softmax is written out, and the default."""

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
        progress: called before each step.

    Returns:
        The findings; `verdict` sums them up.

    Raises:
        BadInput: a checkpoint cannot be read, or the two are not the same model.
        ConfigError: a config.json cannot be honoured.
    """
    source = Checkpoint.open(src)
    target = source if flax is None else Checkpoint.open(flax)
    port = Port(target.config, target.view("flax"))
    if change is not None:
        port = change(port)
    differences = _same_model(source.config, port.config, f"{src} and {flax or 'its changed port'}")
    batches = suite(inputs, source.config, seed) if isinstance(inputs, str) else list(inputs)
    compared = flax is not None or change is not None
    steps = Steps(
        progress, compared * len(port.weights) + len(WALKS[dtype]) * (source.config.num_hidden_layers + 3) + 1
    )
    hashes: dict[str, str] = {}
    if compared:
        hashes, unequal = compare_weights(source.view("flax"), port.weights, steps.advance)
        differences += unequal
    findings: list[Finding] = []
    drift: list[Drift] = []
    routing: dict[RoutingKey, LayerRouting] = {}
    cost: dict[str, Cost] = {}
    suspect: Suspect | None = None
    tokens: Tokens | None = None
    for walk_dtype in WALKS[dtype]:
        sides = _sides(source, port, dtype, walk_dtype)
        walk = Walk(source.config, Sides(**sides), batches, dtype=walk_dtype, advance=steps.advance)
        findings += walk.run()
        routing |= walk.routing
        drift += walk.drift
        suspect = suspect or walk.suspect
        steps.advance("whole models")
        if walk_dtype == dtype and source.config.architecture != "MixtralModel":
            findings += _whole(src, source.config, sides["flax"].side, walk)
        for batch in batches if grad else ():
            findings += compare_gradients(
                source.config, sides["torch"], sides["flax"], sides["oracle"], batch, walk_dtype
            )
        if generate and (tokens is None or not tokens.failed):
            tokens = compare_tokens(
                source.config, (sides["torch"], sides["flax"], sides["oracle"]), batches, generate, walk_dtype
            )
            findings += tokens.findings
        for name, side in sides.items():
            cost[name] = cost.get(name, Cost()) + side.cost
    steps.advance("diagnosis")
    legacy = Rounded(source.view("hf-legacy"), dtype)
    computed_with = Rounded(legacy, suspect.dtype if suspect else dtype)
    leaves = (source.view("flax"), port.weights)
    causes = name_causes(source.config, differences, leaves, findings, suspect, computed_with)
    if not causes and tokens is not None:
        causes = cache_causes(source.config, legacy, tokens)
    return Result(
        causes=causes,
        findings=findings,
        routing=routing,
        drift=drift,
        texts=texts(Path(src), batches),
        differences=differences,
        weights_compared=len(hashes),
        notes=unexercised(batches, source.config),
        dtype=dtype,
        environment={**environment(), "torch_attention": ATTENTION, "torch_experts": EXPERTS},
        provenance=provenance(src, flax, batches, seed, hashes),
        cost=cost,
    )


class Steps:
    """Counts steps for a progress callback."""

    def __init__(self, progress: Progress, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def advance(self, step: str) -> None:
        """Tell that a step begins."""
        self._progress(step, self._done, self._total)
        self._done += 1


def _same_model(torch: MixtralConfig, flax: MixtralConfig, which: str) -> list[Difference]:
    """List the configuration fields that differ; refuse where they make weights of other shapes."""
    differences = compare_configs(torch, flax)
    if other := [d for d in differences if d.name.removeprefix("config.") in SHAPES]:
        lines = "\n".join(f"  - {d.name}: {d.reason}" for d in other)
        raise BadInput(f"{which} are not the same model:\n{lines}")
    return differences


def _sides(source: Checkpoint, port: Port, dtype: Precision, walk_dtype: Precision) -> dict[str, Timed]:
    """Build the three sides on weights that are rounded to the run's dtype and computed with in the walk's."""

    def rounded(weights: Mapping[str, Array]) -> Mapping[str, Array]:
        return Rounded(Rounded(weights, dtype), walk_dtype)

    torch = TorchSide(
        source.config,
        source.raw_config,
        rounded(source.view("hf-fused")),
        dtype=walk_dtype,
        attention=ATTENTION,
        experts=EXPERTS,
    )
    flax = port.side(port.config, rounded(port.weights))
    return {
        "torch": Timed(torch),
        "flax": Timed(flax),
        "oracle": Timed(Oracle(source.config, rounded(source.view("hf-legacy")))),
    }


def _whole(src: str | Path, config: MixtralConfig, flax: Side, walk: Walk) -> Iterator[Finding]:
    """Hold both models as users run them against the walk: torch's against its own, Flax's against the oracle.

    In bfloat16 the whole model routes freely, so that a benign flip changes its logits at will: it informs.
    """
    point = dict(head_points(config))["logits"]
    by_token = point.axes.startswith("B T")
    for stream in walk.streams:
        batch, clean_M = stream.batch, stream.clean_M
        clean_BT = clean_M.reshape(batch.input_ids.shape) | ~batch.real_BT
        rows = clean_M if by_token else np.flatnonzero(clean_BT.all(axis=1))
        walked, exact = stream.torch_logits, stream.oracle_logits
        torch_logits = whole_logits(Path(src), batch, walk.dtype, ATTENTION, EXPERTS)
        reference = Place(None, "reference", batch.name, walk.dtype)
        real_M = batch.real_M if by_token else None
        yield judge("logits", point, reference, walked, torch_logits, exact, rows=real_M)
        flax_logits = flax.whole(batch) if isinstance(flax, WholeModel) else None
        whole = Place(None, "whole", batch.name, walk.dtype, decides=walk.dtype != "bfloat16")
        yield judge("logits", point, whole, walked, flax_logits, exact, rows=rows)
