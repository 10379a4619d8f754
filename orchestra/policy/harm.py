"""Who suffers, and how much: what adaptive policies and ladders read out of the facts.

A signal is a number that grows with the harm, or None where this host or these guests do not tell it.

Some compare with what is usual, and what is usual must be what is good: an average takes harm for usual in the end.
`_Usual` says what counts. It follows those who estimate the delay of a network that they fill themselves: LEDBAT (RFC
6817) and BBR (Cardwell et al., ACM Queue 2016) keep the best of a long time, as no queue makes a path faster than it
is; and since a path may have changed for good, BBR (ProbeRTT) and LEDBAT++ (periodic slowdowns) stop sending for a
moment and measure the path alone. Here the moments in which nobody is noisy are that measurement.

Sources of the signals: comparing a task with what it does elsewhere and at other times instead of an absolute figure is
CPI² (Zhang et al., EuroSys 2013), which learns that over a day from many machines; taking the run-queue delay of the
victims for the cost of interference is Alita (Chen et al., SC 2020).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from typing import Final

import attrs

from ..model.errors import SpecError
from ..model.spec import Meter
from .facts import Facts, VmFacts, count_of

__all__ = ["HARM", "OWN", "Signals", "calm", "check_signal"]

HOST: Final = ("lock_ns", "memory_ns", "cpu_pressure", "memory_pressure", "io_pressure")
SLOWDOWN: Final = {"lock_slowdown": "lock_ns", "memory_slowdown": "memory_ns"}
VICTIMS: Final = ("run_delay", "work_drop")

HARM: Final = (*HOST, *SLOWDOWN, *VICTIMS)
"""What somebody suffers: the host's own signals, then those relative to what is usual, then those of the other VMs."""

OWN: Final = (*(meter.value for meter in Meter), "cpu", "share", "dirty_pages")
"""What one VM does: events a second of each meter, CPU seconds a second and vCPU, its part of the meter's events,
pages written a second."""

LEAST: Final = 0.01
"""A VM that wanted the CPU for less than this part of a tick says nothing about how it fares."""

HELD: Final = 0.05
"""One that was held back for more than this part of a tick does less work for that reason."""

FLOOR: Final = 10.0
"""Events per second up to which a VM is not noisy, where a policy has no floor of its own."""

AHEAD: Final = 2
"""Events in a tick, for each vCPU, that say nothing about a rate: who keeps to a limit may be ahead of it."""

ENOUGH: Final = 5
"""Looks before anything counts as usual."""

GOOD: Final = 5.0
"""Seconds. If the median of them is better than what is usual, it is usual from then on."""

QUIET: Final = 60.0
"""Seconds in which nobody was noisy. Their median is what is usual, for better or worse."""

PICKS: Final = 60
"""Looks that stand for such a time."""

WORKED: Final = 1.0
"""Seconds of a guest's work that make a look: in less there may be too few requests to tell slow from few."""

GOOD_WORK: Final = 60.0
"""As `GOOD`, for a guest's work: that varies more than the host's times do."""

FORGOTTEN: Final = 3600.0
"""Seconds after which what is usual with a VM is forgotten, if it reported nothing meanwhile."""


def check_signal(name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    if name not in known:
        raise SpecError(f"signal={name!r}: must be one of {', '.join(known)}")
    return name


def calm(name: str) -> float:
    """What a signal is while nobody suffers."""
    return 1.0 if name in SLOWDOWN else 0.0


def _median(values: Collection[float]) -> float:
    """Of two the lower one."""
    return sorted(values)[(len(values) - 1) // 2]


class _Recent:
    """The median of the last so many seconds that were added, once there is half of them; of two the better one.

    It keeps `PICKS` looks, however short the ticks are.
    """

    def __init__(self, seconds: float) -> None:
        self._part = seconds / PICKS
        self._passed = 0.0
        self._picks: deque[float] = deque(maxlen=PICKS)

    def add(self, value: float, seconds: float) -> float | None:
        """The median, if there is a new one."""
        self._passed += seconds
        if self._passed < self._part * (1 - 1e-9):
            return None
        times = math.floor(self._passed / self._part + 1e-9)
        self._passed -= times * self._part
        self._picks.extend([value] * min(times, PICKS))
        return _median(self._picks) if len(self._picks) > PICKS // 2 else None


class _Usual:
    """How long something takes while all is well.

    At first the median of `ENOUGH` looks. After that

    - it falls to the median of any `good` seconds in which it was less. Noisy neighbours make nothing faster.
    - it rises in one way only: to the median of the last `QUIET` seconds in which nobody was noisy. If it is slow even
      then, the noisy are not the reason.

    So harm never becomes usual, neither by lasting nor by growing slowly. What changed for good becomes usual after
    half a minute in which nobody was noisy, in one piece or in many. A policy that holds the noisy because of the
    change makes that half-minute itself.

    What it does not see: a start in the midst of harm is taken for usual, until it is better for half of `good`
    seconds, or nobody is noisy for half a minute. So is harm that begins while the host is slow for another reason that
    has become usual, if it goes on without a pause when that reason is gone. And where one calm is better than another
    by more than a threshold (memory that hardly anybody uses at night), the worse one is taken for harm until those
    half-minutes have shown that it is not.
    """

    def __init__(self, good: float = GOOD) -> None:
        self.value: float | None = None
        self._first: list[float] = []
        self._any = _Recent(good)
        self._quiet = _Recent(QUIET)

    def add(self, value: float, seconds: float, quiet: bool) -> None:
        if self.value is None:
            self._first.append(value)
            if len(self._first) < ENOUGH:
                return
            self.value = _median(self._first)
        if quiet and (calm := self._quiet.add(value, seconds)) is not None:
            self.value = calm
        if (recent := self._any.add(value, seconds)) is not None:
            self.value = min(self.value, recent)


@attrs.define(eq=False)
class _Worker:
    """A VM that reports its work, and the look at it that is under way."""

    usual: _Usual = attrs.field(factory=lambda: _Usual(GOOD_WORK))
    seen: int = 0
    passed: float = 0.0
    wanted: float = 0.0
    work: float = 0.0
    quiet: bool = True
    drop: float | None = None

    def begin(self, drop: float | None = None) -> None:
        """A new look. `drop`: what the last one found."""
        self.passed = self.wanted = self.work = 0.0
        self.quiet = True
        self.drop = drop


class Signals:
    """Reads some of the harm signals, tick by tick. Costs O(active VMs).

    Parameters:
        names: of the signals.
        meter, floor: a VM that does more than `floor` events of the meter a second is noisy: what was measured then
            may be its doing, and does not excuse anybody.
    """

    def __init__(self, names: Iterable[str], *, meter: Meter = Meter.BUS_LOCKS, floor: float = FLOOR) -> None:
        self._names = tuple(check_signal(name, HARM) for name in names)
        self._meter = meter
        self._floor = floor
        self._host: dict[str, float | None] = {}
        self._usual: dict[str, _Usual] = {name: _Usual() for name in self._names if name in SLOWDOWN}
        self._workers: dict[tuple[str, int], _Worker] = {}
        self._victims: dict[str, dict[str, float]] = {}
        self._was_quiet = True
        self._cleaned: int | None = None

    def look(self, facts: Facts) -> None:
        """Once a tick, before asking."""
        quiet = self._quiet(facts)
        for name in self._names:
            if name in HOST:
                self._host[name] = getattr(facts.host, name)
            elif name in SLOWDOWN:
                self._host[name] = self._slowdown(name, facts, quiet)
        if "run_delay" in self._names:
            self._victims["run_delay"] = {
                vm.name: vm.run_delay / wanted
                for vm in facts.heard.values()
                if vm.run_delay is not None and (wanted := _wanted(vm)) is not None and wanted > LEAST * facts.interval
            }
        if "work_drop" in self._names:
            drops = ((vm.name, self._drop(vm, facts, quiet)) for vm in facts.heard.values())
            self._victims["work_drop"] = {name: drop for name, drop in drops if drop is not None}
            for one in facts.gone:
                self._workers.pop(one, None)
            self._forget(facts.time)

    def _quiet(self, facts: Facts) -> bool:
        """Nobody was noisy, nor in the tick before: what is measured may be as late as that."""
        counts = ((count_of(vm, self._meter), vm) for vm in facts.heard.values())
        most = self._floor * facts.interval
        now = all(count is None or count <= most + AHEAD * vm.vcpus for count, vm in counts)
        quiet = now and self._was_quiet
        self._was_quiet = now
        return quiet

    def _slowdown(self, name: str, facts: Facts, quiet: bool) -> float | None:
        now: float | None = getattr(facts.host, SLOWDOWN[name])
        if now is None:
            return None
        usual = self._usual[name]
        ratio = None if not usual.value else now / usual.value
        usual.add(now, facts.interval, quiet)
        return ratio

    def _drop(self, vm: VmFacts, facts: Facts, quiet: bool) -> float | None:
        interval = facts.interval
        wanted = interval if vm.cpu is None else vm.cpu + (vm.run_delay or 0.0)
        key = (vm.name, vm.launch)
        worker = self._workers.get(key)
        if worker is None:
            if vm.work is None:
                return None
            worker = self._workers[key] = _Worker()
        worker.seen = facts.time
        if vm.throttled + (vm.capped or 0.0) > HELD * interval:
            worker.begin()
            return None
        if wanted <= LEAST * interval:
            return None
        worker.passed += interval
        worker.wanted += wanted
        worker.work += vm.work or 0.0
        worker.quiet = worker.quiet and quiet
        if vm.work is None or worker.passed < WORKED * (1 - 1e-9):
            return worker.drop
        # Of the time that it could have run, where that is known: one that has less to do is not a victim.
        slow = worker.wanted / worker.work if worker.work else math.inf
        usual = worker.usual.value
        drop = None if usual is None else 1 - usual / slow if slow > usual else 0.0
        worker.usual.add(slow, worker.passed, worker.quiet)
        worker.begin(drop)
        return drop

    def begin(self) -> None:
        """Something was done about it: looks that are under way begin anew, so that they tell what came of that."""
        for worker in self._workers.values():
            worker.begin()

    def _forget(self, now: int) -> None:
        if self._cleaned is None:
            self._cleaned = now
        if now - self._cleaned >= FORGOTTEN / 10 * 1e9:
            self._cleaned = now
            old = now - FORGOTTEN * 1e9
            self._workers = {key: worker for key, worker in self._workers.items() if worker.seen > old}

    def host(self, name: str) -> float | None:
        return self._host.get(name)

    def victims(self, name: str) -> dict[str, float]:
        """Of those VMs that tell: ``run_delay`` is the part of the time that they could have run and had no CPU,
        ``work_drop`` the part by which they worked slower than is usual with them in the last second."""
        return self._victims.get(name, {})

    def worst(self, name: str, among: Iterable[str]) -> tuple[float | None, str | None]:
        """The signal, and the VM that suffers it most (None if it is the host's)."""
        if name not in VICTIMS:
            return self.host(name), None
        told = self.victims(name)
        return max(((told[vm], vm) for vm in among if vm in told), default=(None, None))


def _wanted(vm: VmFacts) -> float | None:
    """Seconds that its vCPUs ran or could have run."""
    return None if vm.cpu is None else vm.cpu + (vm.run_delay or 0.0)
