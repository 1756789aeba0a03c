"""The layouts by the name that the command line uses. A new one is a table beside these and a line here."""

from convert.layouts.flax import FLAX
from convert.layouts.hf_fused import HF_FUSED
from convert.layouts.hf_legacy import HF_LEGACY
from convert.layouts.mistral_native import MISTRAL, MISTRAL_STACKED
from convert.rules import Layout

__all__ = ["LAYOUTS"]

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (FLAX, HF_LEGACY, HF_FUSED, MISTRAL, MISTRAL_STACKED)}
