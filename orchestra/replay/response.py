"""How the victims answer to bus locks: straight lines through what the journal saw.

Comparing a VM with its own past, and taking its run-queue delay for the cost of interference, is CPI² (Zhang et al.,
EuroSys 2013) and Alita (Chen et al., SC 2020).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from .demand import HELD, Tick

__all__ = ["SIGNALS", "Line", "Response", "fit"]

FEWEST: Final = 20
"""Points that a line takes."""

SURE: Final = 0.3
"""The part of the variance that the line explains (r²), below which it is not used."""

SIGNALS: Final = ("run_delay", "work", "lock_ns", "memory_ns")


@attrs.frozen
class Line:
    """How a signal changes with one bus lock a second more by the others.

    Attributes:
        slope: of the signal; of `work`, as a part of what the VM gets done in the mean.
        certainty: r², 0 to 1.
        points: how many were looked at.
    """

    slope: float
    certainty: float
    points: int


@attrs.frozen
class Response:
    """The lines that are sure enough, by signal. Where there is none, the signal is taken as it was."""

    lines: Mapping[str, Line] = attrs.field(factory=dict)

    def change(self, signal: str, locks: float) -> float:
        """By how much a signal changes when the others make so many locks a second more (or less)."""
        line = self.lines.get(signal)
        return 0.0 if line is None else line.slope * locks


@attrs.define
class _Sums:
    n: int = 0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.n += 1
        self.x += x
        self.y += y
        self.xx += x * x
        self.xy += x * y
        self.yy += y * y


class _Fit:
    """One slope for all, each VM compared with itself only (its own mean is taken off)."""

    def __init__(self, relative: bool = False) -> None:
        self._relative = relative
        self._groups: dict[object, _Sums] = {}

    def add(self, group: object, x: float, y: float) -> None:
        self._groups.setdefault(group, _Sums()).add(x, y)

    def line(self) -> Line | None:
        xx = xy = yy = all_xx = all_yy = 0.0
        points = 0
        for sums in self._groups.values():
            mean = sums.y / sums.n if self._relative else 1.0
            if not mean:
                continue
            points += sums.n
            all_xx += sums.xx
            all_yy += sums.yy / mean**2
            xx += max(0.0, sums.xx - sums.x**2 / sums.n)
            xy += (sums.xy - sums.x * sums.y / sums.n) / mean
            yy += max(0.0, sums.yy - sums.y**2 / sums.n) / mean**2
        # What is left of sums that cancel is rounding, and no variance.
        if points < FEWEST or xx <= 1e-9 * all_xx or yy <= 1e-12 * all_yy:
            return None
        return Line(xy / xx, min(1.0, xy * xy / (xx * yy)), points)


def fit(seen: Iterable[Tick]) -> Response:
    """Look at all that was seen. VMs that were held themselves are no victims, and say nothing."""
    fits = {signal: _Fit(relative=signal == "work") for signal in SIGNALS}
    for tick in seen:
        total = sum(row.bus_locks or 0 for row in tick.vms.values()) / tick.interval
        for row in tick.vms.values():
            vcpu_seconds = row.interval * row.vcpus
            if row.throttled + (row.capped or 0.0) > HELD * vcpu_seconds:
                continue
            others = total - (row.bus_locks or 0) / row.interval
            who = (row.vm, row.launch)
            if row.run_delay is not None:
                fits["run_delay"].add(who, others, row.run_delay / vcpu_seconds)
            if row.work is not None:
                fits["work"].add(who, others, row.work / row.interval)
        if tick.host is not None:
            for signal in ("lock_ns", "memory_ns"):
                value = getattr(tick.host, signal)
                if value is not None:
                    fits[signal].add(tick.session, total, value)
    lines = {}
    for signal, one in fits.items():
        line = one.line()
        harm = -1.0 if signal == "work" else 1.0
        # That others' locks do good is no effect of theirs.
        if line is not None and line.certainty >= SURE and line.slope * harm > 0:
            lines[signal] = line
    return Response(lines)
