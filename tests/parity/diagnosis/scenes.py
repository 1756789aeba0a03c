"""The guilty block of a checkpoint, and what torch made of it: what diagnoses are tried on."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import Checkpoint
from flax_mixtral.config import MixtralConfig
from parity.diagnosis.cause import Cause
from parity.diagnosis.diagnose import replay, replay_head
from parity.inputs import suite
from parity.metrics import Precision
from parity.oracle.model import EXACT, Oracle
from parity.sides import Side
from parity.sides.torch_hf import TorchSide
from parity.trace import Array, Batch, Trace
from parity.weights import Rounded

LAYER = 2
"""The guilty one, of twelve: in the order of text, layer 10 stands here."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """One checkpoint, what the guilty block is fed, and torch's trace of it."""

    config: MixtralConfig
    raw: dict[str, Any]
    legacy: Mapping[str, Array]
    flax_leaves: Mapping[str, Array]
    batch: Batch
    x_BTD: Array
    torch: Trace
    torch_head: Trace
    dtype: Precision
    layer: int

    def fake(self, config: MixtralConfig | None = None, weights: Mapping[str, Array] | None = None, **ops: Any) -> Side:
        """A Flax side that is NumPy in float32, with faulty operations."""
        weights = self.legacy if weights is None else weights
        return Oracle(config or self.config, weights, dataclasses.replace(EXACT, **ops), dtype=np.float32)

    def causes(self, side: Side, **options: Any) -> list[Cause]:
        trace = side.block(self.layer, self.x_BTD, self.batch)
        return replay(
            self.config, self.legacy, self.batch, self.layer, self.x_BTD, self.torch, trace, dtype=self.dtype, **options
        )

    def head_causes(self, side: Side) -> list[Cause]:
        trace = side.head(self.x_BTD, self.batch)
        return replay_head(self.config, self.legacy, self.batch, self.x_BTD, self.torch_head, trace, dtype=self.dtype)


def make_scene(path: Path, dtype: Precision, layer: int, ties: bool) -> Scene:
    source = Checkpoint.open(path)
    config = source.config
    (batch,) = suite("quick", config, 0)
    legacy, fused = (dict(Rounded(source.view(layout), dtype)) for layout in ("hf-legacy", "hf-fused"))
    if ties:  # experts 1 and 3 with the same router row
        for weights, name in ((legacy, "block_sparse_moe.gate"), (fused, "mlp.gate")):
            router_ED = weights[f"model.layers.{layer}.{name}.weight"].copy()
            router_ED[3] = router_ED[1]
            weights[f"model.layers.{layer}.{name}.weight"] = router_ED
    torch = TorchSide(config, source.raw_config, fused, dtype=dtype)
    x_BTD = torch.embed(batch)
    for below in range(min(layer, 2)):
        x_BTD = torch.block(below, x_BTD, batch)["resid_out"]
    leaves = Rounded(source.view("flax"), dtype)
    trace, head = torch.block(layer, x_BTD, batch), torch.head(x_BTD, batch)
    return Scene(config, source.raw_config, legacy, leaves, batch, x_BTD, trace, head, dtype, layer)
