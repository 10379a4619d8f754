"""The only module that imports matplotlib: figures, and their SVG for a file of its own or within a page."""

from __future__ import annotations

import io
import re

from .errors import OrchestraError
from .extras import install

try:
    # mypy may well be run where this extra is not installed.
    from matplotlib import rc_context  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
except ImportError as error:
    raise OrchestraError(f"plots need matplotlib ({error}): {install('plot')}") from None

__all__ = ["Figure", "inline_svg", "rc_context"]


def inline_svg(figure: Figure, salt: str, colours: dict[str, str]) -> str:
    """A figure as an SVG element for an HTML page: text stays text, and colours may follow the page's.

    Parameters:
        salt: a word of its own for each figure of a page, as its ids must differ from the others'.
        colours: hex colours (lower case) that become something else, such as ``var(--ink)``.
    """
    out = io.StringIO()
    with rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id=")', rf"\1{salt}-", text)
    text = re.sub(r'(url\(#|xlink:href="#)', rf"\1{salt}-", text)
    for colour, value in colours.items():
        text = text.replace(colour, value)
    # As wide as the page lets it be.
    return re.sub(
        r'<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text), count=1
    )
