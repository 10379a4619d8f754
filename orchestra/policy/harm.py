"""Which VMs suffer, and how much: the signals that adaptive policies and ladders read out of the facts.

A signal is a number that grows with the harm. It is None where this host or these guests do not report it.

Some signals compare with what is usual, and what is usual must be what is good: an average would take harm for usual in
the end. `_Usual` says what counts as usual. Its rules are those of protocols that estimate the delay of a network which
they fill themselves. LEDBAT (RFC 6817) and BBR (Cardwell et al., ACM Queue 2016) keep the best value of a long time, as
no queue makes a path faster than it is. A path may also have changed for good. So BBR (ProbeRTT) and LEDBAT++ (periodic
slowdowns) stop sending for a moment and measure the path alone. Here the times in which no VM is noisy are that
measurement.

Sources of the signals: CPI² (Zhang et al., EuroSys 2013) compares a task with what it does elsewhere and at other times
and not with an absolute figure; it learns over a day from many machines. Alita (Chen et al., SC 2020) takes the
run-queue delay of the victims for the cost of interference.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from operator import attrgetter
from typing import Final

import attrs

from ..model.errors import SpecError
from ..model.spec import Meter
from .facts import Facts, VmFacts

__all__ = ["HARM", "OWN", "VICTIMS", "Signals", "calm", "check_signal"]

HOST: Final = ("lock_ns", "memory_ns", "cpu_pressure", "memory_pressure", "io_pressure")
SLOWDOWN: Final = {"lock_slowdown": "lock_ns", "memory_slowdown": "memory_ns"}
VICTIMS: Final = ("run_delay", "work_drop")

HARM: Final = (*HOST, *SLOWDOWN, *VICTIMS)
"""The signals of harm: those of the host, then those relative to what is usual, then those of the other VMs."""

OWN: Final = (*(meter.value for meter in Meter), "cpu", "share", "dirty_pages")
"""The signals of one VM: events a second of each meter, CPU seconds a second and vCPU, its part of the meter's events,
pages written a second."""

LEAST: Final = 0.01
"""Part of a tick. A VM that wanted the CPU for less shows nothing about how it fares: its few moments may be chance."""

HELD: Final = 0.05
"""Part of a tick. A VM that was held back for longer did less work for that reason. As `metered.WAITED`."""

FLOOR: Final = 10.0
"""Events per second up to which a VM is not noisy, where a policy has no floor of its own. As that of `Adaptive`."""

AHEAD: Final = 2
"""Events in a tick, for each vCPU, that say nothing about a rate: a VM that keeps to a limit may be ahead of it, by its
burst."""

ENOUGH: Final = 5
"""Looks before anything counts as usual: the median of five is right even if two of them were disturbed."""

GOOD: Final = 5.0
"""Seconds. If their median is better than what is usual, the median is usual from then on. That can be short, as noisy
VMs make nothing faster."""

QUIET: Final = 60.0
"""Seconds in which no VM was noisy. Their median is what is usual, for better or worse. That must be longer than
`GOOD`: it is the only way in which a worse value becomes usual."""

PICKS: Final = 60
"""Looks that stand for such a time, so that memory and cost do not grow with shorter ticks."""

WORKED: Final = 1.0
"""Seconds of a guest's work that make a look. In less time there may be too few requests to tell slow from few."""

GOOD_WORK: Final = 60.0
"""As `GOOD`, for a guest's work, which varies more than the host's times do."""

FORGOTTEN: Final = 3600.0
"""Seconds. What is usual for a VM is forgotten if the VM was in no facts for so long. It bounds the memory for VMs
whose end nobody reports."""


def check_signal(name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    if name not in known:
        raise SpecError(f"signal={name!r}: must be one of {', '.join(known)}")
    return name


def calm(name: str) -> float:
    """The value of a signal while no VM suffers."""
    return 1.0 if name in SLOWDOWN else 0.0


def _median(values: Collection[float]) -> float:
    """The median; of two middle values the lower one, which is the better one."""
    return sorted(values)[(len(values) - 1) // 2]


class _Recent:
    """The median of the values of the last `seconds`, once half of that time was added.

    The class keeps `PICKS` values, however short the ticks are.
    """

    def __init__(self, seconds: float) -> None:
        self._part = seconds / PICKS
        self._passed = 0.0
        self._picks: deque[float] = deque(maxlen=PICKS)

    def add(self, value: float, seconds: float) -> float | None:
        """Add a value that stands for so many seconds. Returns the median, or None if there is no new one."""
        self._passed += seconds
        if self._passed < self._part * (1 - 1e-9):
            return None
        times = math.floor(self._passed / self._part + 1e-9)
        self._passed -= times * self._part
        self._picks.extend([value] * min(times, PICKS))
        return _median(self._picks) if len(self._picks) > PICKS // 2 else None


class _Usual:
    """How long something takes while all is well.

    At first the usual value is the median of `ENOUGH` looks. After that

    - it falls to the median of any `good` seconds whose median is less. Noisy neighbours make nothing faster.
    - it rises in one way only: to the median of the last `QUIET` seconds in which no VM was noisy. If the value is slow
      even then, the noisy VMs are not the reason.

    So harm never becomes usual, neither by lasting nor by growing slowly. A value that changed for good becomes usual
    after half a minute in which no VM was noisy, in one piece or in many. A policy that holds the noisy VMs because of
    the change makes that half-minute itself.

    Three cases that this does not see. If the first looks fall into harm, the harm is taken for usual, until the value
    is better for half of `good` seconds, or no VM is noisy for half a minute. If harm begins while the host is slow for
    another reason that has become usual, and goes on without a pause when that reason is gone, the harm is taken for
    usual as well. And if one calm is better than another by more than a threshold (memory that hardly any VM uses at
    night), the worse calm is taken for harm until the half-minutes have shown that it is none.
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
    """A VM that reports its work, and the look at the VM that is under way.

    Attributes:
        usual: seconds for a unit of work, as is usual for this VM.
        seen: when the VM was in the facts last, in nanoseconds.
        passed, wanted: seconds of this look, and those of them in which the VM could run.
        work: what the VM reported in this look.
        quiet: no VM was noisy in this look.
        drop: what the last look found.
    """

    usual: _Usual = attrs.field(factory=lambda: _Usual(GOOD_WORK))
    seen: int = 0
    passed: float = 0.0
    wanted: float = 0.0
    work: float = 0.0
    quiet: bool = True
    drop: float | None = None

    def begin(self, drop: float | None = None) -> None:
        """Begin a new look. `drop`: what the last look found."""
        self.passed = self.wanted = self.work = 0.0
        self.quiet = True
        self.drop = drop


class Signals:
    """Reads some of the signals of harm, tick by tick. A tick costs O(active VMs).

    Parameters:
        names: the names of the signals.
        meter, floor: a VM that does more than `floor` events of the meter a second is noisy. A value measured then may
            be that VM's doing, so the value does not count as a calm.

    Raises:
        SpecError: a name is not that of a signal of harm.
    """

    def __init__(self, names: Iterable[str], *, meter: Meter = Meter.BUS_LOCKS, floor: float = FLOOR) -> None:
        self._names = tuple(check_signal(name, HARM) for name in names)
        self._count = attrgetter(meter.value)
        self._floor = floor
        self._host: dict[str, float | None] = {}
        self._usual: dict[str, _Usual] = {name: _Usual() for name in self._names if name in SLOWDOWN}
        self._workers: dict[tuple[str, int], _Worker] = {}
        self._victims: dict[str, dict[str, float]] = {}
        self._was_quiet = True
        self._cleaned: int | None = None

    def look(self, facts: Facts) -> None:
        """Take in the facts of a tick. Call this once a tick, before asking for a signal."""
        quiet = self._quiet(facts)
        for name in self._names:
            if name in HOST:
                self._host[name] = getattr(facts.host, name)
            elif name in SLOWDOWN:
                self._host[name] = self._slowdown(name, facts, quiet)
        if "run_delay" in self._names:
            self._victims["run_delay"] = {
                vm.name: vm.run_delay / wanted
                for vm in facts.all_vms.values()
                if vm.run_delay is not None and (wanted := _wanted(vm)) is not None and wanted > LEAST * facts.interval
            }
        if "work_drop" in self._names:
            drops = ((vm.name, self._drop(vm, facts, quiet)) for vm in facts.all_vms.values())
            self._victims["work_drop"] = {name: drop for name, drop in drops if drop is not None}
            for one in facts.gone:
                self._workers.pop(one, None)
            self._forget(facts.time)

    def _quiet(self, facts: Facts) -> bool:
        """Whether no VM was noisy in this tick and the one before: a measurement may be a tick late."""
        most, count_of = self._floor * facts.interval, self._count
        now = True
        for vm in facts.all_vms.values():
            count = count_of(vm)
            if count is not None and count > most + AHEAD * vm.vcpus:
                now = False
                break
        quiet = now and self._was_quiet
        self._was_quiet = now
        return quiet

    def _slowdown(self, name: str, facts: Facts, quiet: bool) -> float | None:
        now: float | None = getattr(facts.host, SLOWDOWN[name])
        if now is None:
            return None
        usual = self._usual[name]
        # Compared first and added then: a value must not be its own measure.
        ratio = None if not usual.value else now / usual.value
        usual.add(now, facts.interval, quiet)
        return ratio

    def _drop(self, vm: VmFacts, facts: Facts, quiet: bool) -> float | None:
        interval = facts.interval
        wanted = interval if vm.cpu is None else vm.cpu + (vm.run_delay or 0.0)
        key = (vm.name, vm.generation)
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
        # By the time in which the VM could run, where that is known: a VM that has less to do is no victim.
        slow = worker.wanted / worker.work if worker.work else math.inf
        usual = worker.usual.value
        drop = None if usual is None else 1 - usual / slow if slow > usual else 0.0
        worker.usual.add(slow, worker.passed, worker.quiet)
        worker.begin(drop)
        return drop

    def begin(self) -> None:
        """Begin all looks anew. Call this when an action was taken, so that the looks show only what came of it."""
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
        """A signal of the VMs that report it, by name of the VM.

        ``run_delay``: the part of the time in which the VM could have run and had no CPU. ``work_drop``: the part by
        which the VM worked slower in the last second than is usual for it.
        """
        return self._victims.get(name, {})

    def worst(self, name: str, among: Iterable[str]) -> tuple[float | None, str | None]:
        """The signal, and the VM among these that suffers most. The VM is None for a signal of the host."""
        if name not in VICTIMS:
            return self.host(name), None
        victims = self.victims(name)
        return max(((victims[vm], vm) for vm in among if vm in victims), default=(None, None))


def _wanted(vm: VmFacts) -> float | None:
    """Seconds in which the VM's vCPUs ran or could have run."""
    return None if vm.cpu is None else vm.cpu + (vm.run_delay or 0.0)
