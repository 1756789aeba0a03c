"""Who plays the three parts of a walk: each side live on a checkpoint, or as it was recorded.

torch is imported where its side is live, and only then: the other machine has none.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import BadInput, Checkpoint
from parity.metrics import Precision
from parity.oracle.model import Oracle
from parity.pages import Pages
from parity.port import Port
from parity.recordings.recording import Recording
from parity.sides.offered import Nothing
from parity.sides.remembering import Remembering
from parity.weights import AsStored, Rounded

if TYPE_CHECKING:
    from parity.sides.torch_hf import Attention, Experts

__all__ = ["ATTENTION", "EXPERTS", "WALKS", "flax_side", "oracle_side", "recorded_side", "torch_side"]

WALKS: dict[Precision, tuple[Precision, ...]] = {"float32": ("float32",), "bfloat16": ("bfloat16", "float32")}
"""The dtypes that a run walks in: what bfloat16's rounding hides, float32 on the same weights shows."""

ATTENTION: "Attention" = "eager"
EXPERTS: "Experts" = "grouped_mm"
"""transformers' implementations that the torch side runs: the one whose softmax is written out, and the default."""


def torch_side(source: Checkpoint, dtype: Precision, walk_dtype: Precision, pages: Pages | None = None) -> Any:
    """Build torch's side.

    Args:
        source: the checkpoint.
        dtype: of the run, which all weights are rounded to.
        walk_dtype: what this walk computes in.
        pages: the memory that its weights and those of the other sides take in turn.

    Raises:
        BadInput: torch is not installed, or transformers loads no checkpoint of this layout.
    """
    if not source.layout.startswith("hf-"):
        raise BadInput(
            f"{source.path} has the layout {source.layout}, which transformers does not load: expected Hugging Face's. "
            f"Make such a checkpoint of it first: mixtral-convert {source.path} DST --to hf-legacy"
        )
    try:
        from parity.sides.torch_hf import TorchSide
    except ImportError as error:
        raise BadInput(
            f"{error}: torch's side needs torch and transformers (pip install 'flax-mixtral[parity]'), or give its "
            "recording with --reference"
        ) from error
    weights = Rounded(source.view("hf-fused"), dtype, walk_dtype, pages=pages)
    return TorchSide(
        source.config,
        source.raw_config,
        weights,
        dtype=walk_dtype,
        attention=ATTENTION,
        experts=EXPERTS,
        path=Path(source.path),
    )


def flax_side(port: Port, dtype: Precision, walk_dtype: Precision, pages: Pages | None = None) -> Any:
    """Build the side under test; arguments as `torch_side`."""
    return port.side(port.config, Rounded(port.weights, dtype, walk_dtype, pages=pages))


def oracle_side(source: Checkpoint, dtype: Precision) -> Oracle:
    """Build the oracle, on the same weights: a walk is never in less precision than they were rounded to."""
    return Oracle(source.config, AsStored(source.view("hf-legacy"), dtype))


def recorded_side(recording: Recording, walk_dtype: Precision) -> Remembering:
    """Give a recording's answers; what it does not hold is not offered."""
    return Remembering(Nothing(recording.manifest.side), recording.answers(walk_dtype), learns=False)
