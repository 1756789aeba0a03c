"""The Flax tree on disk: every leaf under its own path, as it is."""

from convert.rules import Layout, Rule
from flax_mixtral.tree import BASE, HEADS

__all__ = ["FLAX"]

FLAX = Layout(
    name="flax",
    stem="flax_model",
    format="flax",
    rules=(
        *(Rule("{model}" + leaf.path, leaf.path, f"{leaf.axes} -> {leaf.axes}") for leaf in BASE),
        *(Rule(leaf.path, leaf.path, f"{leaf.axes} -> {leaf.axes}") for head in HEADS.values() for leaf in head),
    ),
)
