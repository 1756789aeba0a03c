"""Options that several subcommands have, and what they turn into."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from parity.inputs import Suite
    from parity.trace import Batch

__all__ = ["FLAX_SIDE", "LAYERS", "inputs_of"]

FIXED = ("dtype", "suite", "input_ids", "text", "seed")
"""What a reference was recorded with."""


class _Layers(click.ParamType[range]):
    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        """Read A:B as Python slices do, without negative numbers."""
        first, colon, last = str(value).partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            self.fail(f"{value!r} is not A:B with A below B, as 0:16", param, ctx)
        return range(int(first), int(last))


class _Factory(click.ParamType[Any]):
    name = "MODULE:FACTORY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Import what builds a side from a configuration and weights; a module beside the user is found, too."""
        module, colon, name = str(value).partition(":")
        if not colon:
            self.fail(f"{value!r} is not MODULE:FACTORY", param, ctx)
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            self.fail(f"{value}: {error}", param, ctx)


LAYERS, FLAX_SIDE = _Layers(), _Factory()


def inputs_of(
    context: click.Context,
    src: Path,
    reference: Path | None,
    suite: "Suite",
    input_ids: Path | None,
    text: str | None,
) -> "Suite | list[Batch]":
    """Give what the model is fed; a reference has its own inputs, and takes no others.

    Raises:
        UsageError: options exclude each other.
    """
    if input_ids is not None and text is not None:
        raise click.UsageError("--input-ids and --text exclude each other")
    given = [name for name in FIXED if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if reference is not None and given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{options}: the reference was recorded with its own")
    from convert import Checkpoint
    from parity.inputs import read_ids, tokenized

    if input_ids is not None:
        return read_ids(input_ids, Checkpoint.open(src).config)
    return suite if text is None else tokenized(src, text)
