"""What holds for every test: the CPU, no network, and the same examples on every run."""

import os

# Before the first import of JAX, torch or transformers: all three read these once.
os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
