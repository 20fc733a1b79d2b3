"""Sphinx settings of the site: ``bash tools/docs.sh`` builds it into docs/_build/html."""

import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ.update(COLUMNS="100", NO_COLOR="1", HF_HUB_OFFLINE="1")
warnings.filterwarnings("ignore")  # those of imported libraries; Sphinx logs its own

import generated  # noqa: E402

from resnet_backbone import __version__  # noqa: E402

project = "resnet_backbone"
release = version = __version__
copyright = "the authors of resnet_backbone, Apache-2.0"
language = "en"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4
mermaid_fullscreen = False

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch's methods
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # dataclasses: their attributes are not described twice
default_role = "literal"
toc_object_entries_show_parents = "hide"
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"resnet_backbone {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False


def leave_out(app, kind, name, member, skip, options):
    """Leaves out the fields of named tuples, whose text is Python's own."""
    return True if (getattr(member, "__doc__", "") or "").startswith("Alias for field") else None


def setup(app):
    """Connects the pages that are generated from the source."""
    app.connect("source-read", generated.fill_in)
    app.connect("autodoc-skip-member", leave_out)
