"""Write the checkpoints of tests/convert/transformers_4_57, with that version of transformers.

    python -m venv build/old
    build/old/bin/python -m pip install 'transformers==4.57.1' torch
    build/old/bin/python scripts/write_with_4_57.py tests/convert/transformers_4_57

Standard library, torch and transformers only, as nothing else is in that environment.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

assert transformers.__version__.startswith("4.57."), transformers.__version__

SIZES: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 3,
    "max_position_embeddings": 64,
}
"""Every axis has a size of its own, and the files stay small."""

torch.manual_seed(0)
model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).bfloat16()
for parameter in model.parameters():
    parameter.data.normal_()  # ones in every norm would hide one that took another's place
target = Path(sys.argv[1])
model.save_pretrained(target / "safetensors")
model.save_pretrained(target / "bin", safe_serialization=False)
