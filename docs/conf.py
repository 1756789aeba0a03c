"""Sphinx: the pages are Markdown, read by MyST; the references come from docstrings and from the commands."""

import inspect

from flax_mixtral import MODELS

project = "flax-mixtral"
author = "the flax-mixtral authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinxcontrib.mermaid",
]

html_theme = "furo"
html_title = "flax-mixtral"

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

myst_heading_anchors = 3
smartquotes_action = "qe"  # quotes and ellipses: in the text of a command two dashes are an option

# NNX's metaclass is called with anything; a reader wants the arguments of __init__.
for model in MODELS.values():
    _, *arguments = inspect.signature(model.__init__).parameters.values()
    setattr(model, "__signature__", inspect.Signature(arguments))  # noqa: B010  # mypy knows of no such attribute
