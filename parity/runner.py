"""One run from checkpoints to Result: open, compare weights, walk, run the models whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from convert import BadInput, Checkpoint
from flax_mixtral.config import MixtralConfig
from parity.inputs import Suite, suite, unexercised
from parity.oracle import Oracle
from parity.points import head_points
from parity.provenance import environment, provenance
from parity.result import Result
from parity.sides import Side, WholeModel
from parity.sides.flax import FlaxSide
from parity.sides.timed import Timed
from parity.sides.torch_hf import Attention, Experts, Precision, TorchSide, whole_logits
from parity.trace import Array, Batch
from parity.verdict import Finding, Place, judge
from parity.walk import Sides, Stream, Walk
from parity.weights import Rounded, compare_configs, compare_weights

__all__ = ["Progress", "run"]

Progress = Callable[[str, int, int], None]
"""Called with what is done now, how many steps are done, and how many there are."""

FlaxFactory = Callable[[MixtralConfig, Mapping[str, Array]], Side]

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
    flax_side: FlaxFactory = FlaxSide,
    progress: Progress = lambda step, done, total: None,
) -> Result:
    """Compare Flax with PyTorch on one checkpoint, block by block.

    Args:
        src: a Mixtral checkpoint as torch reads it.
        flax: the converted one, or any of the same model; None maps src in memory.
        dtype: what both sides compute in; the weights are rounded to it for all sides alike.
        inputs: a suite's name, or batches.
        seed: of the suite's token ids.
        flax_side: builds the Flax side from its configuration and its leaves by dotted path.
        progress: called before each step.

    Returns:
        The findings; `verdict` sums them up.

    Raises:
        BadInput: a checkpoint cannot be read, or the two are not the same model.
        ConfigError: a config.json cannot be honoured.
    """
    source = Checkpoint.open(src)
    target = source if flax is None else Checkpoint.open(flax)
    config = source.config
    differences = compare_configs(config, target.config)
    if other_model := [d for d in differences if d.name.removeprefix("config.") in SHAPES]:
        lines = "\n".join(f"  - {d.name}: {d.reason}" for d in other_model)
        raise BadInput(f"{src} and {flax} are not the same model:\n{lines}")
    batches = suite(inputs, config, seed) if isinstance(inputs, str) else list(inputs)
    has_logits = config.architecture != "MixtralModel"

    leaves = len(source.view("flax")) if flax is not None else 0
    total = leaves + config.num_hidden_layers + 2 + has_logits * len(batches)
    steps = iter(range(total))

    def advance(step: str) -> None:
        progress(step, next(steps), total)

    hashes: dict[str, str] = {}
    if flax is not None:
        hashes, unequal = compare_weights(source.view("flax"), target.view("flax"), advance)
        differences += unequal
    torch_side = Timed(
        TorchSide(
            config,
            source.raw_config,
            Rounded(source.view("hf-fused"), dtype),
            dtype=dtype,
            attention=ATTENTION,
            experts=EXPERTS,
        )
    )
    flax_model = flax_side(target.config, Rounded(target.view("flax"), dtype))
    flax_timed, oracle = Timed(flax_model), Timed(Oracle(config, Rounded(source.view("hf-legacy"), dtype)))
    walk = Walk(config, Sides(torch_side, flax_timed, oracle), batches, dtype=dtype, advance=advance)
    findings = list(walk.run())
    if has_logits:
        for stream in walk.streams:
            advance(f"whole models, {stream.batch.name}")
            torch_logits = whole_logits(Path(src), stream.batch, dtype, ATTENTION, EXPERTS)
            findings += _judge_whole(
                config,
                stream,
                torch_logits,
                flax_model.whole(stream.batch) if isinstance(flax_model, WholeModel) else None,
                dtype,
            )
    return Result(
        findings=findings,
        routing=walk.routing,
        differences=differences,
        weights_compared=leaves,
        notes=unexercised(batches, config),
        dtype=dtype,
        environment={**environment(), "torch_attention": ATTENTION, "torch_experts": EXPERTS},
        provenance=provenance(src, flax, batches, seed, hashes),
        cost={"torch": torch_side.cost, "flax": flax_timed.cost, "oracle": oracle.cost},
    )


def _judge_whole(
    config: MixtralConfig, stream: Stream, torch_logits: Array, flax_logits: Array | None, dtype: Precision
) -> Iterator[Finding]:
    """Hold both models as users run them against the walk: torch's against its own, Flax's against the oracle."""
    point = dict(head_points(config))["logits"]
    by_token = point.axes.startswith("B T")
    batch, clean_M = stream.batch, stream.clean_M
    clean_BT = clean_M.reshape(batch.input_ids.shape) | ~batch.real_BT
    rows = clean_M if by_token else np.flatnonzero(clean_BT.all(axis=1))
    walked, exact = stream.torch_logits, stream.oracle_logits
    reference = Place(None, "reference", batch.name)
    real_M = batch.real_M if by_token else None
    yield judge("logits", point, reference, walked, torch_logits, exact, dtype=dtype, rows=real_M)
    yield judge("logits", point, Place(None, "whole", batch.name), walked, flax_logits, exact, dtype=dtype, rows=rows)
