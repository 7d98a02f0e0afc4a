"""The site: `make docs` builds it into build/docs, with warnings as errors."""

import sys
from pathlib import Path

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
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them
autodoc_default_options = {"members": True}
nitpicky = False
