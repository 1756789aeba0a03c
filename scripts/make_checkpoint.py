"""Write a small random Mixtral as transformers saves it, at scales where faults show.

Run as a script, or import `write_checkpoint`. Imports torch and transformers (the extra `parity`).
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from transformers.utils import logging as transformers_logging

__all__ = ["SMALL", "make_model", "write_checkpoint"]

SMALL: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""All axis sizes differ and N*H is not D, so that a transposed or wrongly split axis cannot pass unseen."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

NORM_SIGMA = 0.25
"""Spread of the norm weights' logarithm: a norm that is skipped, swapped or applied twice shows."""

BIAS_SIGMA = 0.5

GAINS = {
    "lm_head.weight": 2.5,  # logits with a standard deviation between 2 and 3
    "score.weight": 2.5,  # the same for the classification heads
    "qa_outputs.weight": 2.5,
    "mlp.gate.weight": 1.0,  # router logits about 1: choices are clear for most tokens and close for some
    "self_attn.q_proj.weight": 1.3,  # scores about 1.5: attention selects, and yet looks at many positions
    "self_attn.k_proj.weight": 1.3,
}
"""Standard deviation of a projection's output for an input of unit scale, where it is not 1."""


def make_model(
    *, seed: int = 0, dtype: str = "float32", architecture: str = "MixtralForCausalLM", **config_overrides: Any
) -> transformers.PreTrainedModel:
    """Build a random Mixtral.

    Args:
        seed: The weights depend on the seed and the configuration alone.
        dtype: "float32", "bfloat16" or "float16". Weights are drawn in float32 and rounded, so that models of one seed
            are roundings of each other.
        architecture: A class of transformers.
        **config_overrides: Fields of transformers' MixtralConfig that replace those of `SMALL`.
    """
    config = transformers.MixtralConfig(**{**SMALL, **config_overrides})
    config.architectures = [architecture]
    model = getattr(transformers, architecture)(config).float()
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return model.to(DTYPES[dtype]).eval()


def write_checkpoint(path: str | Path, *, seed: int = 0, dtype: str = "float32", **config_overrides: Any) -> Path:
    """Write a random Mixtral with transformers' `save_pretrained`, without a tokenizer.

    Args:
        path: Directory to write; it is made where it is missing.
        seed: See `make_model`.
        dtype: See `make_model`.
        **config_overrides: See `make_model`; also `architecture`.

    Returns:
        `path`.
    """
    make_model(seed=seed, dtype=dtype, **config_overrides).save_pretrained(path)
    return Path(path)


@torch.no_grad()
def _draw_weights(model: transformers.PreTrainedModel, generator: torch.Generator) -> None:
    """Fill every parameter, in the order of their names, from one generator."""
    tied = model.config.tie_word_embeddings
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            weight.copy_(torch.exp(NORM_SIGMA * noise))
        elif name.endswith("bias"):
            weight.copy_(BIAS_SIGMA * noise)
        elif name.endswith("embed_tokens.weight"):
            # A tied embedding is the head as well; the first norm undoes its small scale.
            weight.copy_(noise * (GAINS["lm_head.weight"] / math.sqrt(weight.shape[-1]) if tied else 1.0))
        else:
            gain = next((gain for suffix, gain in GAINS.items() if name.endswith(suffix)), 1.0)
            weight.copy_(noise * gain / math.sqrt(weight.shape[-1]))


def _override(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Read FIELD=JSON pairs; what is no JSON is taken as text."""
    overrides = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals:
            raise click.BadParameter(f"{value!r} is not FIELD=VALUE")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    return overrides


@click.command()
@click.argument("path", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--layers", type=click.IntRange(1), default=SMALL["num_hidden_layers"], show_default=True)
@click.option("--experts", type=click.IntRange(1), default=SMALL["num_local_experts"], show_default=True)
@click.option(
    "--set", "overrides", multiple=True, callback=_override, metavar="FIELD=JSON", help="Any other field of the config."
)
@click.option("--overwrite", is_flag=True, help="Replace PATH where it is a checkpoint.")
def main(
    path: Path, seed: int, dtype: str, layers: int, experts: int, overrides: dict[str, Any], overwrite: bool
) -> None:
    """Write a small random Mixtral checkpoint to PATH, as transformers saves it."""
    if path.exists() and any(path.iterdir()):
        if not (overwrite and (path / "config.json").is_file()):
            raise click.UsageError(f"{path} is not empty. Name another PATH, or --overwrite a checkpoint.")
        shutil.rmtree(path)
    transformers_logging.disable_progress_bar()
    config = {"num_hidden_layers": layers, "num_local_experts": experts, **overrides}
    write_checkpoint(path, seed=seed, dtype=dtype, **config)
    size_mb = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    click.echo(
        f"wrote {path}: Mixtral with {layers} layers of {experts} experts, {dtype}, seed {seed}, {size_mb:.1f} MB"
    )


if __name__ == "__main__":
    main()
