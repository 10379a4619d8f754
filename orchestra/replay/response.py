"""How the victims respond to bus locks: straight lines, fitted to what the journal has.

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
"""Points. A line through fewer is not used: a good fit of few points may be chance."""

SURE: Final = 0.3
"""The part of the variance that a line explains (r²). A line that explains less is not used."""

SIGNALS: Final = ("run_delay", "work", "lock_ns", "memory_ns")


@attrs.frozen
class Line:
    """How a signal changes with one bus lock a second more by the others.

    Attributes:
        slope: the change of the signal. For `work`: as a part of what the VM gets done in the mean.
        certainty: r², 0 to 1.
        points: how many points were fitted.
    """

    slope: float
    certainty: float
    points: int


@attrs.frozen
class Response:
    """The lines that are sure enough, by signal. A signal without a line is taken as it was."""

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


def _line(groups: Iterable[_Sums], relative: bool) -> Line | None:
    """One slope for all groups. Each VM is compared only with itself: the mean of its group is taken off."""
    xx = xy = yy = all_xx = all_yy = 0.0
    points = 0
    for sums in groups:
        mean = 0.0 if not sums.n else sums.y / sums.n if relative else 1.0
        if not mean:
            continue
        points += sums.n
        all_xx += sums.xx
        all_yy += sums.yy / mean**2
        xx += max(0.0, sums.xx - sums.x**2 / sums.n)
        xy += (sums.xy - sums.x * sums.y / sums.n) / mean
        yy += max(0.0, sums.yy - sums.y**2 / sums.n) / mean**2
    # What is left of sums that cancel out is rounding, and no variance.
    if points < FEWEST or xx <= 1e-9 * all_xx or yy <= 1e-12 * all_yy:
        return None
    return Line(xy / xx, min(1.0, xy * xy / (xx * yy)), points)


def fit(seen: Iterable[Tick]) -> Response:
    """Fit the lines to intervals. VMs that were held themselves are left out: their limits slowed them too."""
    groups: dict[str, list[_Sums]] = {signal: [] for signal in SIGNALS}
    of: dict[str, tuple[_Sums, _Sums]] = {}  # each VM's: by name, of the generation seen last
    session: int | None = None
    host: dict[str, _Sums] = {}
    for tick in seen:
        seconds = tick.interval
        for vm in tick.new:
            of[vm.name] = _Sums(), _Sums()
            for signal, one in zip(("run_delay", "work"), of[vm.name], strict=True):
                groups[signal].append(one)
        total = sum([vm.bus_locks or 0 for vm in tick.vms.values()]) / seconds
        for name, vm in tick.vms.items():
            delay, work = vm.run_delay, vm.work
            if delay is None and work is None:
                continue
            vcpu_seconds = seconds * vm.vcpus
            if vm.throttled + (vm.capped or 0.0) > HELD * vcpu_seconds:
                continue
            others = total - (vm.bus_locks or 0) / seconds
            delays, works = of[name]
            if delay is not None:
                delays.add(others, delay / vcpu_seconds)
            if work is not None:
                works.add(others, work / seconds)
        if tick.host is None:
            continue
        if tick.session != session:
            session, host = tick.session, {signal: _Sums() for signal in ("lock_ns", "memory_ns")}
            for signal, one in host.items():
                groups[signal].append(one)
        for signal, one in host.items():
            value = getattr(tick.host, signal)
            if value is not None:
                one.add(total, value)
    lines = {}
    for signal, sums in groups.items():
        line = _line(sums, relative=signal == "work")
        harm = -1.0 if signal == "work" else 1.0
        # Locks of others do a VM no good, so a line that says so is chance.
        if line is not None and line.certainty >= SURE and line.slope * harm > 0:
            lines[signal] = line
    return Response(lines)
