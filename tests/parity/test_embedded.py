"""The shipped model: whole, small, trained, and with its tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import click
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from convert import Checkpoint
from flax_mixtral import Mixtral, causal_lm_loss
from parity import embedded
from scripts.train_embedded import tidy

ROOT = Path(__file__).resolve().parents[2]


def test_it_is_a_checkpoint_of_at_most_8_mb_with_4_layers_and_8_experts() -> None:
    checkpoint = Checkpoint.open(embedded.path())
    view = checkpoint.view("flax")
    assert checkpoint.config.num_hidden_layers >= 4
    assert checkpoint.config.num_local_experts >= 8
    assert {str(view.dtype(name)) for name in view} == {"bfloat16"}
    assert sum(file.stat().st_size for file in embedded.path().glob("*.safetensors")) <= 8e6


def test_the_module_prints_where_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "parity.embedded"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert Path(done.stdout.strip()) == embedded.path()


def test_the_tokenizer_gives_the_text_back_and_starts_with_bos() -> None:
    tokenizer = Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))
    text = embedded.held_out_text()[:5000]
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.token_to_id("<s>") == 1
    assert max(ids) < json.loads((embedded.path() / "config.json").read_text())["vocab_size"]


def test_it_has_learnt_and_every_expert_works() -> None:
    """In float32, on the beginning of the text that it has not seen."""
    tokenizer = Tokenizer.from_file(str(embedded.path() / "tokenizer.json"))
    ids = tokenizer.encode(embedded.held_out_text()).ids
    ids_BT = jnp.asarray(np.asarray(ids[: 4 * 200]).reshape(4, 200))
    output = Mixtral.from_pretrained(embedded.path(), dtype=jnp.float32)(ids_BT)
    page = (ROOT / "docs" / "embedded-model.md").read_text()
    trained, untrained = map(float, page.split("| loss, nats per token |")[1].split("|")[:2])
    assert output.logits is not None
    assert float(causal_lm_loss(output.logits, ids_BT)) == pytest.approx(trained, abs=0.4), "its average, or near it"
    assert trained < 0.55 * untrained
    for logits_ME in output.router_logits:
        chosen_MA = np.argsort(-np.asarray(logits_ME), axis=1)[:, :2]
        load_E = np.bincount(chosen_MA.reshape(-1), minlength=8) / chosen_MA.size
        assert load_E.min() > 0.04, "an eighth is perfect balance"


def test_no_text_with_somebody_elses_terms_was_or_will_be_used(tmp_path: Path) -> None:
    shipped = embedded.path() / "held_out.txt"
    assert tidy(shipped) == shipped.read_text()
    text = tmp_path / "play.txt"
    text.write_text("HAMLET\n\nThis Etext is Copyright 1990-1993 by World Library, Inc.\n")
    with pytest.raises(click.ClickException, match="Etext"):
        tidy(text)
