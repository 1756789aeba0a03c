"""The trained model that the package ships. Imports the standard library only.

`python -m parity.embedded` prints where it is.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["held_out_text", "path"]


def path() -> Path:
    """Give the directory of a small trained Mixtral in Hugging Face's format, with its tokenizer.

    The package is installed as plain files, so this is a real directory; see docs/embedded-model.md for the model.
    """
    return Path(str(files("parity"))) / "data" / "embedded"


def held_out_text() -> str:
    """Give a play that the model was not trained on."""
    return (path() / "held_out.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    print(path())
