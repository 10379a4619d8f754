"""The documentation's configuration: `nox -s docs` builds it, with every warning an error. Needs no network."""

import re
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


def _without_parts(app, what, name, obj, options, signature, returned):  # type: ignore[no-untyped-def]  # Sphinx's own
    """What users do not make themselves is shown without what it is made of."""
    hidden = what == "class" and re.match(r"(Made|Opened) by", obj.__doc__ or "")
    return ("", returned) if hidden else (signature, returned)


def _for_the_codec(app, what, name, obj, skip, options):  # type: ignore[no-untyped-def]  # Sphinx's own
    """A class's own form is the codec's affair."""
    return True if name in ("from_data", "to_data") else None


def setup(app):  # type: ignore[no-untyped-def]  # Sphinx's own
    app.connect("autodoc-process-signature", _without_parts)
    app.connect("autodoc-skip-member", _for_the_codec)
