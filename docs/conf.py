"""The documentation's configuration: `nox -s docs` builds it, with every warning an error. Needs no network."""

from importlib.metadata import version as installed_version

from orchestra.model.extras import DISTRIBUTION

project = "orchestra"
author = "The orchestra developers"
copyright = "The orchestra developers"
release = version = installed_version(DISTRIBUTION)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib_trio"]
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"orchestra {release}"
