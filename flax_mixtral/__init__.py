"""Mixtral for Flax NNX, computing what Hugging Face's PyTorch Mixtral computes.

Names are imported on first use: the configuration alone, which the converter reads, needs neither JAX nor Flax.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_mixtral.cache import KVCache, init_cache
    from flax_mixtral.config import ConfigError, MixtralConfig
    from flax_mixtral.generation import generate
    from flax_mixtral.heads import (
        MODELS,
        Mixtral,
        MixtralForQuestionAnswering,
        MixtralForSequenceClassification,
        MixtralForTokenClassification,
        MixtralModel,
        MixtralOutput,
    )
    from flax_mixtral.losses import causal_lm_loss, load_balancing_loss
    from flax_mixtral.rope_config import RopeConfig

__all__ = [
    "MODELS",
    "ConfigError",
    "KVCache",
    "Mixtral",
    "MixtralConfig",
    "MixtralForQuestionAnswering",
    "MixtralForSequenceClassification",
    "MixtralForTokenClassification",
    "MixtralModel",
    "MixtralOutput",
    "RopeConfig",
    "causal_lm_loss",
    "generate",
    "init_cache",
    "load_balancing_loss",
]

_HOME = {
    "ConfigError": "config",
    "KVCache": "cache",
    "MixtralConfig": "config",
    "RopeConfig": "rope_config",
    "causal_lm_loss": "losses",
    "generate": "generation",
    "init_cache": "cache",
    "load_balancing_loss": "losses",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'heads')}"), name)
