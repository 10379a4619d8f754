"""The common parts of the pictures of all commands: style, an axis of the time of day, marks of events, a file."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from ..model.errors import FileError
from .colours import EVENT, HOST

__all__ = ["LEGEND", "STYLE", "clock", "heading", "marks", "save", "time_axis"]

STYLE: Final[Any] = {
    "svg.hashsalt": "orchestra",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "savefig.facecolor": "white",  # readable on a dark page as well
}
LEGEND: Final[Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False, "ncols": 5, "borderpad": 0}
LINE: Final = 120
"""Characters of the heading that fit into one line."""
STEPS: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
"""Seconds between two labels of the time of day: the steps that clocks show."""
MOST_LABELS: Final = 9
DAY: Final = 86400
ROWS: Final = 3
LETTER: Final = 0.0085
"""The width of a mark's letters, as a part of the axes' width; generous."""


def heading(figure: Any, text: str) -> None:
    """What the picture shows, above all of it."""
    figure.suptitle(textwrap.fill(text, LINE), x=0.01, ha="left", fontsize=8, color=HOST)


def clock(times: Sequence[int]) -> list[float]:
    """For an axis of time: seconds since the epoch, which `time_axis` labels."""
    return [time / 1e9 for time in times]


def time_axis(axes: Any) -> None:
    """Label an axis of `clock` with the time of day, at round times. Call it when all is drawn."""
    low, high = axes.get_xlim()
    step = next((step for step in STEPS if (high - low) / step < MOST_LABELS), None)
    if step is None:
        step = DAY * math.ceil((high - low) / DAY / MOST_LABELS)
    east = (datetime.fromtimestamp(low).astimezone().utcoffset() or datetime.min - datetime.min).total_seconds()
    first = -((-low - east) // step) * step - east
    ticks = [first + i * step for i in range(MOST_LABELS + 2) if first + i * step <= high]
    shape = "%H:%M:%S" if step < 60 else "%H:%M" if high - low < DAY else "%m-%d %H:%M" if step < DAY else "%m-%d"
    axes.set_xticks(ticks, [f"{datetime.fromtimestamp(tick):{shape}}" for tick in ticks])


def marks(strip: Any, others: Iterable[Any], happened: Sequence[tuple[float, str, bool]]) -> None:
    """Lines through all axes where something happened, and its name in a strip of its own, where it covers no curve.

    Parameters:
        strip: axes above the others, with the same x axis, for the names.
        happened: when, what, and whether it was done; in the order of time. A name for which there is no room is left
            out; its line stays.
    """
    for at, _, done in happened:
        for one in (strip, *others):
            one.axvline(at, color=EVENT, linewidth=0.8, linestyle="-" if done else "--")
    strip.axis("off")
    strip.set_ylim(0, ROWS)
    for at, row, text, left in _placed(strip.get_xlim(), happened):
        offset, side = ((3, 0), "left") if left else ((-3, 0), "right")
        strip.annotate(
            text, (at, ROWS - row - 0.5), offset, textcoords="offset points", ha=side, va="center", fontsize=7
        )


def _placed(
    span: tuple[float, float], happened: Sequence[tuple[float, str, bool]]
) -> Iterator[tuple[float, int, str, bool]]:
    """When, in which row, what, and whether right of its line."""
    ends = [-1.0] * ROWS
    for at, text, _ in happened:
        begin = (at - span[0]) / ((span[1] - span[0]) or 1)
        wide = (len(text) + 1) * LETTER
        left = begin + wide <= 1
        place = begin if left else begin - wide
        row = next((row for row, end in enumerate(ends) if end <= place), None)
        if row is not None:
            ends[row] = place + wide
            yield at, row, text, left


def save(figure: Any, path: Path) -> None:
    """Write an SVG.

    Raises:
        FileError: it can't be written.
    """
    try:
        figure.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None
