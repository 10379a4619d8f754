"""The only module that imports matplotlib: figures, and their SVG for a file of its own or within a page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from typing import Any, Final

from ..model.errors import OrchestraError
from ..model.extras import install

try:
    # mypy may well be run where this extra is not installed.
    from matplotlib import rc_context  # type: ignore[import-not-found,unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
except ImportError as error:
    raise OrchestraError(f"plots need matplotlib ({error}): {install('plot')}") from None

__all__ = ["Figure", "fit_scale", "inline_svg", "rc_context"]

WIDE: Final = 100.0
"""If the largest value is this many times the smallest, the smallest looks like zero on a linear axis: its height is
less than the thickness of a line."""


def fit_scale(axes: Any, *series: Iterable[float | None], least: float = 0.0) -> None:
    """Make the y axis logarithmic, down to zero, if what is drawn on it has a wide range. Call it when all is drawn.

    Parameters:
        least: what is less than that makes no difference to anybody: there the axis is linear.
    """
    known = sorted(value for one in series for value in one if value is not None and 0 < value < math.inf)
    if not known:
        return
    low, high = max(known[len(known) // 20], least), known[-1]  # without the 5 % smallest: outliers
    if high / low < WIDE:
        return
    bottom, top = axes.get_ylim()
    axes.set_yscale("symlog", linthresh=10.0 ** math.floor(math.log10(low)))
    axes.set_ylim(bottom, max(top, high * 1.5))


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
