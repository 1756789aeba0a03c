"""A checkpoint's directory: one that is there, or a repository of the Hugging Face Hub, fetched where possible.

Imports the standard library; huggingface_hub only where a repository is asked for.
"""

import re
from pathlib import Path

from convert.errors import UnreadableCheckpoint

__all__ = ["resolve"]

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

WEIGHTS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*",),
    ("consolidated*.pt", "consolidated*.pth"),
)
"""The first that a repository has is fetched, and not its copies in other formats."""

OTHERS = ("*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt")


def resolve(source: str | Path) -> Path:
    """Give the directory of a checkpoint.

    Args:
        source: a directory, or the id of a repository ("mistralai/Mixtral-8x7B-v0.1") where there is no such path.

    Raises:
        UnreadableCheckpoint: the repository cannot be had.
    """
    path = Path(source)
    if path.exists() or not REPOSITORY.fullmatch(str(source)):
        return path
    where = f"{source}: no such directory. As a repository of the Hugging Face Hub it "
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise UnreadableCheckpoint(
            f"{where}could be fetched if huggingface_hub were installed (pip install huggingface_hub)"
        ) from error
    try:
        names = HfApi().list_repo_files(str(source))
        return Path(snapshot_download(str(source), allow_patterns=[*_weights(names), *OTHERS]))
    except Exception as error:  # offline, unknown, gated: the library has a class for each, and its client more
        try:  # what an earlier run has fetched is there without a network
            return Path(snapshot_download(str(source), local_files_only=True))
        except Exception:
            why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise UnreadableCheckpoint(
                f"{where}cannot be fetched: {why}\n"
                "  offline, fetch it elsewhere (hf download) and name the directory; a gated one needs `hf auth login`"
            ) from error


def _weights(names: list[str]) -> tuple[str, ...]:
    """Choose the patterns of one copy of the weights; Mistral's consolidated files are one where nothing else is."""
    plain = [name for name in names if "/" not in name]
    if any(name.endswith(".safetensors") and not name.startswith("consolidated") for name in plain):
        return ("model*.safetensors", "flax_model*.safetensors")
    for patterns in WEIGHTS:
        if any(Path(name).match(pattern) for name in plain for pattern in patterns):
            return patterns
    return ()
