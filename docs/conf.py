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


def formula(translator: Any, node: nodes.Element) -> None:
    """Render a formula as MathML, which browsers support directly."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def from_markdown(app: Any, what: str, name: str, target: Any, options: Any, lines: list[str]) -> None:
    """Convert code in docstrings, in single backticks or in indented paragraphs, to reStructuredText."""
    text: list[str] = []
    before = code = 0  # indentation of the text before a line, and of the code that the line is in
    is_doctest = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        is_doctest = bool(line) and (is_doctest or line.lstrip().startswith(">>>"))
        if line and number and not lines[number - 1] and not code and indent >= before + 4:
            text += [" " * before + "::", ""]
            code = indent
        elif line and indent < code:
            code = 0
        if line and not code and not is_doctest:
            before = indent
            parts = re.split(r"`+", line)  # text and code in turn
            parts[::2] = [re.sub(r"\*(?=\w)|\|", r"\\\g<0>", part) for part in parts[::2]]
            line = "``".join(parts)
        if number and lines[number - 1] == "Returns:":  # napoleon takes the text before the first colon as the type
            line = f"{' ' * indent}: {line[indent:]}"
        text.append(line)
    lines[:] = text


def setup(app: Any) -> None:
    """Register the extensions; Sphinx calls it."""
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
