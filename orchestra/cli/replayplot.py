"""A picture of a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..output.colours import BUS_LOCKS, WITH, WITHOUT
from ..output.figures import Figure, fit_scale, rc_context
from ..output.numbers import shown
from ..output.svg import LEGEND, STYLE, clock, heading, save, time_axis
from ..output.times import day_and_time
from ..replay import Replay

__all__ = ["draw"]

WAS: Final = WITHOUT.light
WOULD: Final = WITH.light


def draw(result: Replay, path: Path) -> None:
    """Write an SVG: bus locks asked for, made and replayed; vCPUs that waited for limits; and for a CPU.

    Raises:
        FileError: the file can't be written.
    """
    before, after = result.before, result.after
    times = clock([one.time for one in before.series])
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 6), layout="constrained")
        span = f"{day_and_time(result.since)} to {day_and_time(result.until)}"
        heading(figure, f"a replay of {span}")
        above, middle, below = figure.subplots(3, 1, sharex=True)
        above.set_title("bus locks a second")
        above.plot(times, [one.wanted for one in before.series], color=BUS_LOCKS, linestyle=":", label="asked for")
        above.plot(times, [one.bus_locks for one in before.series], color=WAS, label="as it was")
        above.plot(times, [one.bus_locks for one in after.series], color=WOULD, label="replayed")
        middle.set_title("vCPUs that a limit held")
        middle.plot(times, [one.throttled for one in before.series], color=WAS, label="as it was")
        middle.plot(times, [one.throttled for one in after.series], color=WOULD, label="replayed")
        below.set_title("vCPUs that could have run and had no CPU")
        below.plot(times, [one.delay for one in before.series], color=WAS, label="as it was")
        below.plot(times, [one.delay for one in after.series], color=WOULD, label="replayed")
        for axes in (above, middle, below):
            axes.set_ylim(bottom=0)
            axes.legend(**LEGEND)
        wanted = [one.wanted for one in before.series]
        fit_scale(above, wanted, *([one.bus_locks for one in world.series] for world in (before, after)), least=1.0)
        above.yaxis.set_major_formatter(lambda value, _: shown(value) if value >= 0 else "")
        time_axis(below)
        save(figure, path)
