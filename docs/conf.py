"""Sphinx: the pages are Markdown, read by MyST; the references come from docstrings and from the commands."""

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
