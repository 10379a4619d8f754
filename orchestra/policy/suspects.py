"""Which VM slows a victim: whose bus locks or CPU use goes up and down with what the victim suffers, and how surely.

The method is that of CPI² (Zhang et al., EuroSys 2013, section 4.2): it correlates a victim's signal with each
suspect's use over the last ten minutes, window by window, and names no VM below a correlation of 0.35. CPI² has a score
of its own; here it is Pearson's correlation.

CPI² leaves chance out. Two series that go on as they began (a storm that lasts, a load that rises) agree often, even if
neither causes the other. So the two series of each pair are also compared with a shift in time between them, where only
chance can make them agree. At each shift the best of all pairs counts, so that many suspects make no VM more suspect
(Westfall and Young, Resampling-Based Multiple Testing, 1993).

Before that, trends are taken out, and both series are prewhitened by the suspect's own autocorrelation (Box and
Jenkins, Time Series Analysis, 1976; Dean and Dunsmuir, Behavior Research Methods 48, 2016, on what goes wrong without).
A single storm fits nearly as well when it is shifted by a little; prewhitened, its beginning and end decide.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final, Protocol

import attrs

from .facts import Facts

__all__ = ["CHANCE", "FEWEST", "LEAST", "Past", "Suspect", "Suspicion", "suspects"]

WINDOWS: Final = 120
"""Windows that are remembered: ten minutes in windows of 5 s, as CPI² looks at the last ten minutes."""

FEWEST: Final = 20
"""Windows. With fewer no VM can be named: there is about one shift in time for each window, so the smallest chance that
can be found is about 1 / windows, and it must be at most `CHANCE`."""

LEAST: Final = 0.35
"""The correlation from which on a VM is named. Source: CPI², section 4.2 and table 2."""

CHANCE: Final = 0.05
"""The highest probability with which a VM is named although no VM is to blame."""

SURE: Final = 0.01
"""The same probability, for a suspect that is called "very likely"."""

HELD: Final = 0.05
"""Part of a window. A VM that limits or caps held for longer got less done for that reason."""

BOTH: Final = ("bus_locks", "cpu")
ASKED: Final[Mapping[str, tuple[str, ...]]] = {
    "run_delay": BOTH,
    "work": BOTH,
    "lock_ns": ("bus_locks",),
    "memory_ns": BOTH,
    "cpu_pressure": ("cpu",),
    "memory_pressure": ("cpu",),
}
"""For each signal the activities that may cause it."""

OWN: Final = ("run_delay", "work")
"""Signals of the victim itself, which is no suspect for them. The others are the host's: the victim may cause them."""


class Seen(Protocol):
    """What a VM did in a window: `VmFacts`, or a journal's `Aggregate`."""

    @property
    def vcpus(self) -> int: ...
    @property
    def bus_locks(self) -> int | None: ...
    @property
    def throttled(self) -> float: ...
    @property
    def cpu(self) -> float | None: ...
    @property
    def run_delay(self) -> float | None: ...
    @property
    def capped(self) -> float | None: ...
    @property
    def work(self) -> float | None: ...


class Host(Protocol):
    """How the host was: `HostFacts`, or a journal's `HostRow`."""

    @property
    def cpu_pressure(self) -> float | None: ...
    @property
    def memory_pressure(self) -> float | None: ...
    @property
    def lock_ns(self) -> float | None: ...
    @property
    def memory_ns(self) -> float | None: ...


@attrs.frozen
class Suspect:
    """A VM whose activity goes along with what a victim suffers.

    Attributes:
        vm: the name of the suspect. It may be the victim itself, if the signal is one of the host.
        activity: "bus_locks" or "cpu", as a rate per second.
        signal: "run_delay" (part of the time in which the victim could have run and had no CPU), "work" (a second),
            "lock_ns", "memory_ns", "cpu_pressure" or "memory_pressure".
        correlation: Pearson's correlation, -1 to 1. For work its sign is turned, so that more is always worse.
        chance: the probability that some suspect shows so strong a correlation although no suspect is to blame.
        windows: how many windows were compared.
    """

    vm: str
    activity: str
    signal: str
    correlation: float
    chance: float
    windows: int

    @property
    def share(self) -> float:
        """The part of the signal's ups and downs (its variance) that goes along with the activity: r²."""
        return self.correlation**2

    @property
    def named(self) -> bool:
        """Whether the suspect is likely enough to be named."""
        return self.correlation >= LEAST and self.chance <= CHANCE

    @property
    def sure(self) -> bool:
        """Whether the suspect is very likely."""
        return self.named and self.chance <= SURE


@attrs.frozen
class Suspicion:
    """What is known about the VMs that may slow a victim.

    Attributes:
        vm: the name of the victim.
        windows: how many windows were looked at.
        seconds: the mean length of a window.
        asked: how many other VMs were active in these windows.
        suspects: for each VM and signal the activity that fits best, the strongest suspect first. Unlikely suspects are
            among them (see `Suspect.named`). Empty if nothing can be said: there are fewer than 20 windows, or nothing
            goes up and down.
    """

    vm: str
    windows: int
    seconds: float
    asked: int
    suspects: tuple[Suspect, ...]

    def named(self, signal: str) -> tuple[Suspect, ...]:
        """The suspects that are likely to cause a signal, the highest correlation first."""
        found = [one for one in self.suspects if one.signal == signal and one.named]
        return tuple(sorted(found, key=lambda one: -one.correlation))


@attrs.frozen
class _Window:
    interval: float
    signals: Mapping[str, float]
    activity: Mapping[tuple[str, str], float]


class Past:
    """What a victim and the other VMs did, window by window.

    Parameters:
        vm: the name of the victim.
        windows: how many windows are remembered.
    """

    def __init__(self, vm: str, windows: int = WINDOWS) -> None:
        self.vm = vm
        self._windows: deque[_Window] = deque(maxlen=windows)

    def add(self, interval: float, vms: Mapping[str, Seen], host: Host | None) -> None:
        """Add a window.

        Parameters:
            interval: its length in seconds.
            vms: what each VM did, by name. A VM that is not in it was idle.
            host: the host's signals. None: not known.
        """
        signals = {} if host is None else _signals_of(host)
        if self.vm in vms:
            signals |= _signals_of_vm(vms[self.vm], interval)
        activity = {}
        for name, seen in vms.items():
            if seen.bus_locks is not None:
                activity[name, "bus_locks"] = seen.bus_locks / interval
            if seen.cpu is not None:
                activity[name, "cpu"] = seen.cpu / interval
        self._windows.append(_Window(interval, signals, activity))

    def suspicion(self) -> Suspicion:
        """Compare the series of all VMs. Takes some milliseconds for each suspect."""
        windows = list(self._windows)
        signals = {
            name: [window.signals.get(name) for window in windows]
            for name in ASKED
            if any(name in window.signals for window in windows)
        }
        if "run_delay" in signals:
            signals.pop("cpu_pressure", None)  # the victim's own delay says more about it than that of all tasks
        who = {key for window in windows for key, value in window.activity.items() if value}
        activities = {key: [window.activity.get(key, 0.0) for window in windows] for key in sorted(who)}
        return Suspicion(
            vm=self.vm,
            windows=len(windows),
            seconds=sum(window.interval for window in windows) / len(windows) if windows else 0.0,
            asked=len({name for name, _ in who} - {self.vm}),
            suspects=_compare(self.vm, signals, activities),
        )


def suspects(vm: str, facts: Iterable[Facts]) -> Suspicion:
    """Which VMs slow a VM, by kept facts of a fleet: for example those of the last ten minutes, in windows of 5 s."""
    past = Past(vm)
    for one in facts:
        past.add(one.interval, one.vms, one.host)
    return past.suspicion()


def _signals_of(host: Host) -> dict[str, float]:
    values = {
        "lock_ns": host.lock_ns,
        "memory_ns": host.memory_ns,
        "cpu_pressure": host.cpu_pressure,
        "memory_pressure": host.memory_pressure,
    }
    return {name: value for name, value in values.items() if value is not None}


def _signals_of_vm(seen: Seen, interval: float) -> dict[str, float]:
    signals = {}
    if seen.run_delay is not None and seen.cpu is not None and seen.run_delay + seen.cpu > 0:
        signals["run_delay"] = seen.run_delay / (seen.run_delay + seen.cpu)
    held = seen.throttled + (seen.capped or 0.0) > HELD * interval * seen.vcpus
    if seen.work is not None and not held:
        signals["work"] = seen.work / interval
    return signals


# ---- the comparison -------------------------------------------------------------------------------------------------


@attrs.frozen
class _Pair:
    vm: str
    activity: str
    signal: str
    correlation: float
    windows: int
    xs: Sequence[float]
    ys: Sequence[float]

    def at(self, shift: float) -> float:
        """The correlation of the prewhitened series where they overlap. `shift`: part of their length, -0.5 to 0.5."""
        n = len(self.xs)
        by = round(shift * n)
        xs, ys = (self.xs[by:], self.ys) if by >= 0 else (self.xs, self.ys[-by:])
        return sum([x * y for x, y in zip(xs, ys, strict=False)]) * n / (n - abs(by))


def _compare(
    vm: str, signals: Mapping[str, Sequence[float | None]], activities: Mapping[tuple[str, str], Sequence[float]]
) -> tuple[Suspect, ...]:
    pairs = []
    for signal, values in signals.items():
        known = [i for i, value in enumerate(values) if value is not None]
        worse = -1.0 if signal == "work" else 1.0
        ys = [worse * value for value in values if value is not None]
        for (name, activity), series in activities.items():
            if activity in ASKED[signal] and not (name == vm and signal in OWN):
                pair = _pair(name, activity, signal, [series[i] for i in known], ys)
                if pair is not None:
                    pairs.append(pair)
    if not pairs:
        return ()
    half = min(len(pair.ys) for pair in pairs) // 2
    shifts = [k / (2 * half) for k in range(-half, half + 1) if k]
    best = [max(pair.at(shift) for pair in pairs) for shift in shifts]
    found: dict[tuple[str, str], Suspect] = {}
    for pair in pairs:
        told = pair.at(0.0)
        chance = (1 + sum(value >= told - 1e-9 for value in best)) / (1 + len(shifts))
        suspect = Suspect(pair.vm, pair.activity, pair.signal, pair.correlation, chance, pair.windows)
        before = found.get((pair.vm, pair.signal))
        if before is None or _by_strength(suspect) < _by_strength(before):
            found[pair.vm, pair.signal] = suspect
    return tuple(sorted(found.values(), key=_by_strength))


def _by_strength(suspect: Suspect) -> tuple[bool, float, float]:
    return not suspect.named, -suspect.correlation, suspect.chance


def _pair(vm: str, activity: str, signal: str, xs: list[float], ys: list[float]) -> _Pair | None:
    if len(xs) < FEWEST:
        return None
    us, vs = _unit(xs, max(map(abs, xs))), _unit(ys, max(map(abs, ys)))
    if us is None or vs is None:
        return None
    correlation = sum([u * v for u, v in zip(us, vs, strict=True)])
    flat = _unit(_level(us))
    if flat is None:
        return None
    follows = sum([u * v for u, v in pairwise(flat)])  # its autocorrelation
    white, filtered = _unit(_filtered(flat, follows)), _unit(_filtered(_level(vs), follows))
    if white is None or filtered is None:
        return None
    return _Pair(vm, activity, signal, correlation, len(xs), white, filtered)


def _level(values: Sequence[float]) -> list[float]:
    """The values without their trend: two series that rise agree, whatever makes them rise."""
    middle = (len(values) - 1) / 2
    slope = sum([(i - middle) * value for i, value in enumerate(values)])
    slope /= sum([(i - middle) ** 2 for i in range(len(values))])
    return [value - slope * (i - middle) for i, value in enumerate(values)]


def _filtered(values: Sequence[float], follows: float) -> list[float]:
    return [value - follows * before for before, value in pairwise(values)]


def _unit(values: Sequence[float], scale: float = 1.0) -> list[float] | None:
    """The values with mean 0 and length 1. None: all values are equal, up to rounding errors of values of `scale`."""
    mean = math.fsum(values) / len(values)
    rest = [value - mean for value in values]
    length = math.sqrt(math.fsum([value * value for value in rest]))
    return [value / length for value in rest] if length > 1e-9 * scale else None
