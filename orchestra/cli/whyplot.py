"""A picture of how a VM fared, and of what was done to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import FileError
from ..figures import Figure, rc_context
from ..journal.explain import Explanation
from ..journal.series import Bin
from .numbers import shown
from .times import day_and_time, time_of_day

__all__ = ["STYLE", "clock", "draw", "save", "time_axis"]

STYLE: Final[Any] = {
    "svg.hashsalt": "orchestra",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "savefig.facecolor": "white",  # readable on a dark page as well
}
LEGEND: Final[Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False, "ncols": 4, "borderpad": 0}
MOST_MARKS: Final = 12
NAN: Final = float("nan")


def clock(times: Sequence[int]) -> list[float]:
    """For an axis of time: seconds since the epoch, which `time_axis` labels."""
    return [time / 1e9 for time in times]


def time_axis(axes: Any) -> None:
    """Label an axis of `clock` with the time of day."""
    axes.xaxis.set_major_formatter(lambda value, _: time_of_day(round(value) * 1_000_000_000))


def save(figure: Any, path: Path) -> None:
    """Write an SVG.

    Raises:
        FileError: it can't be written.
    """
    try:
        figure.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise FileError(f"{path}: {error.strerror or error}") from None


def draw(told: Explanation, bins: Sequence[Bin], path: Path) -> None:
    """Write an SVG: its bus locks and its limit; what it waited for; and how the host's bus was.

    Raises:
        OrchestraError: the file can't be written.
    """
    times = clock([one.time for one in bins])
    host = any(one.lock_ns is not None for one in bins)
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5.6 if host else 4.2), layout="constrained")
        figure.suptitle(f"{told.vm} at {day_and_time(told.at)}", x=0.01, ha="left", fontsize=9, color="#555555")
        axes = figure.subplots(3 if host else 2, 1, sharex=True)
        _line(axes[0], times, [one.bus_locks for one in bins], "#b3261e", "bus locks")
        if any(one.limit is not None for one in bins):
            limits = [NAN if one.limit is None else one.limit for one in bins]
            axes[0].plot(
                times, limits, color="black", linestyle=":", linewidth=1, label="its limit", drawstyle="steps-mid"
            )
        axes[0].set_title("bus locks a second")
        _line(axes[1], times, [one.throttled for one in bins], "#e0701a", "for its turn")
        _line(axes[1], times, [one.delayed for one in bins], "#1f6f8b", "for a CPU")
        axes[1].set_title("part of the time that it waited")
        axes[1].set_ylim(0, 1)
        if host:
            _line(axes[2], times, [one.lock_ns for one in bins], "#555555", "a lock")
            axes[2].set_title("ns that a locked operation took the host")
        for one in axes:
            one.set_ylim(bottom=0)
            if one is not axes[1]:
                one.yaxis.set_major_formatter(lambda value, _: shown(value) if value >= 0 else "")
            handles, _ = one.get_legend_handles_labels()
            if handles:
                one.legend(**LEGEND)
        _marks(told, axes)
        time_axis(axes[-1])
        save(figure, path)


def _line(axes: Any, times: Sequence[float], values: Sequence[float | None], colour: str, label: str) -> None:
    if any(value is not None for value in values):
        axes.plot(times, [NAN if v is None else v for v in values], color=colour, linewidth=1.4, label=label)


def _marks(told: Explanation, axes: Any) -> None:
    """A line where something was done; the first ones have their names."""
    for i, row in enumerate(told.done):
        (at,) = clock([row.time])
        for one in axes:
            one.axvline(at, color="#bbbbbb", linewidth=0.8, linestyle="-" if row.outcome == "done" else "--")
        if i < MOST_MARKS:
            text = row.kind + ("" if row.outcome == "done" else f" ({row.outcome})")
            axes[0].annotate(
                text,
                (at, 0.97 - 0.1 * (i % 4)),
                (3, 0),
                ("data", "axes fraction"),
                "offset points",
                va="top",
                fontsize=7,
            )
