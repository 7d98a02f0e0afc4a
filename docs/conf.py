"""The site: `make docs` builds it into build/docs, with warnings as errors. It loads nothing from other servers."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parents[1]))

import dino_head

project = "dino-head"
author = "The dino-head maintainers"
release = dino_head.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"dino-head {release}"
html_extra_path = ["collapse/healthy.json"]
html_copy_source = False
html_show_copyright = False
html_static_path = ["style"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"


SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:")


def formula(translator: Any, node: nodes.Element) -> None:
    """Render a formula as MathML, which browsers support directly."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def from_markdown(app: Any, what: str, name: str, target: Any, options: Any, lines: list[str]) -> None:
    """Convert code in docstrings, in single backticks or indented by four spaces, to reStructuredText."""
    text: list[str] = []
    for number, line in enumerate(lines):
        before = next((other for other in reversed(lines[:number]) if other.strip()), "")
        begins = line.startswith("    ") and number > 0 and not lines[number - 1].strip()
        if begins and not before.startswith(("    ", *SECTIONS)):
            text += ["::", ""]
        text.append(re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line))
    lines[:] = text


def setup(app: Any) -> None:
    """Register the extensions; Sphinx calls it."""
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
