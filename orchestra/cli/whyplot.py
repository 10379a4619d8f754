"""A picture of how a VM fared, and of what was done to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..journal.explain import Explanation
from ..journal.series import Bin
from ..output.colours import BUS_LOCKS, CPU, HOST, LIMIT, TURN
from ..output.figures import Figure, fit_scale, rc_context
from ..output.numbers import shown
from ..output.svg import LEGEND, STYLE, clock, heading, marks, save, time_axis
from ..output.times import day_and_time

__all__ = ["draw"]

NAN: Final = float("nan")


def draw(explained: Explanation, bins: Sequence[Bin], path: Path) -> None:
    """Write an SVG: its bus locks and its limit; what it waited for; and how the host's bus was.

    Raises:
        FileError: the file can't be written.
    """
    times = clock([one.time for one in bins])
    host = any(one.lock_ns is not None for one in bins)
    panels = 3 if host else 2
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 6.0 if host else 4.6), layout="constrained")
        heading(figure, f"{explained.vm} at {day_and_time(explained.at)}")
        strip, *axes = figure.subplots(panels + 1, 1, sharex=True, height_ratios=[0.3, *[1] * panels])
        locks, limits = [one.bus_locks for one in bins], [one.limit for one in bins]
        _line(axes[0], times, locks, BUS_LOCKS, "bus locks")
        if any(limit is not None for limit in limits):
            drawn = [NAN if limit is None else limit for limit in limits]
            axes[0].plot(
                times, drawn, color=LIMIT, linestyle=":", linewidth=1, label="its limit", drawstyle="steps-mid"
            )
        axes[0].set_title("bus locks a second")
        _line(axes[1], times, [one.throttled for one in bins], TURN, "for its turn")
        _line(axes[1], times, [one.queued for one in bins], CPU, "for a CPU")
        axes[1].set_title("part of the time that it waited")
        if host:
            _line(axes[2], times, [one.lock_ns for one in bins], HOST, "a lock")
            axes[2].set_title("ns that a locked operation took the host")
        for one in axes:
            one.set_ylim(bottom=0)
            handles, _ = one.get_legend_handles_labels()
            if handles:
                one.legend(**LEGEND)
        axes[1].set_ylim(0, 1.03)
        fit_scale(axes[0], locks, limits, least=1.0)
        if host:
            fit_scale(axes[2], [one.lock_ns for one in bins])
        for one in (axes[0], *axes[2:]):
            one.yaxis.set_major_formatter(lambda value, _: shown(value) if value >= 0 else "")
        names = [row.kind + ("" if row.outcome == "done" else f" ({row.outcome})") for row in explained.done]
        at = clock([row.time for row in explained.done])
        marks(strip, axes, list(zip(at, names, [row.outcome == "done" for row in explained.done], strict=True)))
        time_axis(axes[-1])
        save(figure, path)


def _line(axes: Any, times: Sequence[float], values: Sequence[float | None], colour: str, label: str) -> None:
    if any(value is not None for value in values):
        axes.plot(times, [NAN if v is None else v for v in values], color=colour, linewidth=1.4, label=label)
