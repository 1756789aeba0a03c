"""Continue a text greedily, with transformers and with Flax, and print what each writes: the demo's first proof."""

import sys
from pathlib import Path
from typing import Any

import click
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from flax_mixtral import Mixtral, generate


@click.command()
@click.argument("torch_checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("flax_checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("text")
@click.option("--new", default=48, show_default=True, type=click.IntRange(1), help="Tokens to add.")
def main(torch_checkpoint: Path, flax_checkpoint: Path, text: str, new: int) -> None:
    """Continue TEXT with both checkpoints, of which the first has the tokenizer; exit 1 where they differ."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = Tokenizer.from_file(str(torch_checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    hf: Any = transformers.MixtralForCausalLM.from_pretrained(torch_checkpoint, dtype=torch.float32)
    written = {
        "PyTorch": hf.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False).numpy()[0],
        "Flax": np.asarray(
            generate(Mixtral.from_pretrained(flax_checkpoint, dtype=jnp.float32), np.asarray([ids]), new)
        )[0],
    }
    for side, tokens in written.items():
        click.echo(f"{side} writes:\n  {tokenizer.decode(tokens.tolist()).replace(chr(10), f'{chr(10)}  ')}\n")
    same = np.array_equal(written["PyTorch"], written["Flax"])
    click.echo(f"The same {new} tokens.\n" if same else "They differ.\n")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
