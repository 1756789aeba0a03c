"""What a run feeds the model: the standard suites, and a user's own ids."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from tokenizers import Tokenizer

from convert import BadInput
from flax_mixtral.config import MixtralConfig
from parity.drift import Drift
from parity.trace import Array, Batch

__all__ = ["SUITES", "Suite", "padded", "read_ids", "suite", "tokenized", "unexercised", "words"]

Suite = Literal["quick", "standard", "long"]
SUITES: tuple[Suite, ...] = get_args(Suite)

LENGTHS: dict[Suite, tuple[int, ...]] = {"quick": (64, 47), "standard": (512, 389), "long": (1024, 389)}
"""The real tokens of each row; the shorter row is padded. Distinct and odd, so that no axis has another's size."""


def suite(name: Suite, config: MixtralConfig, seed: int) -> list[Batch]:
    """Draw a suite's batches: rows of unequal length, padded left and (but for quick) right.

    Args:
        name: quick looks at 111 tokens, standard at 901 twice, long also beyond the sliding window.
        config: gives the vocabulary, the window and the padding token.
        seed: of the ids.
    """
    lengths = list(LENGTHS[name])
    if name == "long" and config.sliding_window is not None:
        lengths[0] = max(lengths[0], config.sliding_window + 65)
    rng = np.random.default_rng(seed)
    rows = [_draw(rng, config, length) for length in lengths]
    left = padded("left-padded", rows, config, side="left")
    return [left] if name == "quick" else [left, padded("right-padded", rows, config, side="right")]


def unexercised(batches: Sequence[Batch], config: MixtralConfig) -> list[str]:
    """List what the configuration has and these inputs cannot show."""
    longest = max(int(batch.real_BT.sum(axis=1).max()) for batch in batches)
    notes = []
    if config.sliding_window is not None and longest <= config.sliding_window:
        notes.append(f"no input is longer ({longest}) than the sliding window ({config.sliding_window})")
    rope = config.rope
    stretch_from = {"dynamic": config.max_position_embeddings, "longrope": rope.original_max_position_embeddings}
    limit = stretch_from.get(rope.rope_type)
    if limit is not None and longest <= limit:
        notes.append(f"no input is longer ({longest}) than the length where {rope.rope_type} rope stretches ({limit})")
    return notes


def read_ids(path: Path, config: MixtralConfig) -> list[Batch]:
    """Read a user's token ids.

    Args:
        path: JSON: one list of ids, or a list of such lists, which are padded on the left.
        config: every id must be below its vocab_size.

    Raises:
        BadInput: the file cannot be read, or is not that.
    """
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read token ids from {path}: {error}") from error
    rows = ids if isinstance(ids, list) and ids and isinstance(ids[0], list) else [ids]
    for row in rows:
        if not isinstance(row, list) or not row or not all(type(i) is int and 0 <= i < config.vocab_size for i in row):
            raise BadInput(
                f"{path}: expected a JSON list of token ids, or a list of such lists, each id from 0 to "
                f"{config.vocab_size - 1}"
            )
    return [padded(path.name, [np.asarray(row) for row in rows], config, side="left")]


def tokenized(checkpoint: Path, text: str) -> list[Batch]:
    """Turn text into ids with a checkpoint's own tokenizer.json.

    Raises:
        BadInput: the checkpoint has none.
    """
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            f"{path} is not there; --text needs it. Save the tokenizer beside the weights, or use --input-ids"
        )
    ids = Tokenizer.from_file(str(path)).encode(text).ids
    return [Batch("text", np.asarray([ids], np.int64))]


def words(checkpoint: Path, batches: Iterable[Batch], drift: Iterable[Drift]) -> dict[int, str]:
    """Give the text of every token id that a report may show; nothing where the checkpoint has no tokenizer.json."""
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        return {}
    tokenizer = Tokenizer.from_file(str(path))
    given = {int(id) for batch in batches for id in np.unique(batch.input_ids)}
    expected = {id for each in drift for worst in each.worst for id in (worst.torch_next, worst.flax_next)}
    return {id: tokenizer.decode([id], skip_special_tokens=False) for id in sorted(given | expected)}


def padded(name: str, rows: Sequence[Array], config: MixtralConfig, *, side: Literal["left", "right"]) -> Batch:
    """Stack rows of unequal length; positions count the real tokens, as in transformers' generate."""
    length = max(map(len, rows))
    ids_BT = np.full((len(rows), length), config.pad_token_id or 0, np.int64)
    mask_BT = np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids_BT[number, place], mask_BT[number, place] = row, 1
    if mask_BT.all():
        return Batch(name, ids_BT)
    position_BT = np.maximum(mask_BT.cumsum(axis=1) - 1, 0)
    return Batch(name, ids_BT, mask_BT, position_BT)


def _draw(rng: np.random.Generator, config: MixtralConfig, length: int) -> Array:
    """Draw ids of which few are frequent and many rare, as in text, and none is padding."""
    ranks = rng.zipf(1.3, length) % config.vocab_size
    ids = rng.permutation(config.vocab_size)[ranks]
    if config.pad_token_id is not None:
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    return ids.astype(np.int64)
