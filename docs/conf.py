"""The settings of Sphinx. Pages are Markdown; what is not written by hand is made before they are read."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cascade import __version__  # noqa: E402
from docs.generate import write_all  # noqa: E402
from docs.highlighting import CascadeLexer  # noqa: E402

project = "cascade"
author = "the authors of cascade"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
default_role = "code"  # docstrings are written with single backticks
autodoc_typehints = "none"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"cascade {version}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]


def setup(app: Sphinx) -> None:
    """Colours for cascades, and the generated pages before pages are looked for."""
    app.add_lexer("cascade", CascadeLexer)
    app.connect("builder-inited", lambda app: write_all(Path(app.srcdir) / "generated"))
