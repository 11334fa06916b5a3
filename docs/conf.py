"""How Sphinx builds the documentation."""

from __future__ import annotations

from chestxray_covid import __version__

project = "chestxray-covid"
author = "The chestxray-covid developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"chestxray-covid {version}"
html_show_sphinx = False

# Headings get anchors, so that pages can link into each other.
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
