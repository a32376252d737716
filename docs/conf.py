"""How the documentation is built: ``python -m sphinx -W docs build/docs``."""

import re
from typing import Any

import ttr_np

project = "ttr_np"
author = copyright = "The ttr_np developers"
version = release = ttr_np.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["figures", "results"]
html_theme = "pydata_sphinx_theme"
html_title = f"ttr_np {release}"
html_theme_options = {"show_toc_level": 2, "secondary_sidebar_items": ["page-toc"]}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_member_order = "groupwise"
autodoc_typehints = "none"  # the docstrings say shapes, which the hints cannot
numpydoc_show_class_members = False


def escape_mathematics(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Let |x| and S* stand for themselves: docstrings are written to be read as they are."""
    parts = re.split(r"(``.*?``|\n\.\. .*?\n|\n +>>>.*?\n)", "\n".join(lines))
    parts[::2] = [re.sub(r"(?<!\\)([|])", r"\\\1", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app: Any) -> None:
    """Register what is not an option."""
    app.connect("autodoc-process-docstring", escape_mathematics, priority=900)
