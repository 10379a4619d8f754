"""Who suffers, and how much: what adaptive policies and ladders read out of the facts.

A signal is a number that grows with the harm, or None where this host or these guests do not tell it.

Sources: comparing a task with its own past instead of an absolute figure is CPI² (Zhang et al., EuroSys 2013); taking
the run-queue delay of the victims for the cost of interference is Alita (Chen et al., SC 2020).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from ..errors import SpecError
from .facts import Facts, VmFacts

__all__ = ["HARM", "OWN", "Signals", "calm", "check_signal"]

HOST: Final = ("lock_ns", "memory_ns", "cpu_pressure", "memory_pressure", "io_pressure")
SLOWDOWN: Final = {"lock_slowdown": "lock_ns", "memory_slowdown": "memory_ns"}
VICTIMS: Final = ("run_delay", "work_drop")

HARM: Final = (*HOST, *SLOWDOWN, *VICTIMS)
"""What somebody suffers: the host's own signals, then those relative to what is usual, then those of the other VMs."""

OWN: Final = ("bus_locks", "exits", "cpu", "share", "dirty_pages")
"""What one VM does: events a second of either meter, CPU seconds a second and vCPU, its part of the meter's events,
pages written a second."""

LEAST: Final = 0.01
"""A VM that wanted the CPU for less than this part of a tick says nothing about how it fares."""

HELD: Final = 0.05
"""One that was held back for more than this part of a tick does less work for that reason."""

ENOUGH: Final = 5
"""Looks before anything counts as usual."""

SLOWLY: Final = 8
"""While it is bad, only every so manieth look counts as usual: harm must not become the custom, but a change for good
must, or a guest that does other work from now on would count as a victim for ever."""


def check_signal(name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    if name not in known:
        raise SpecError(f"signal={name!r}: must be one of {', '.join(known)}")
    return name


def calm(name: str) -> float:
    """What a signal is while nobody suffers."""
    return 1.0 if name in SLOWDOWN else 0.0


class _Usual:
    """The median of the recent past."""

    def __init__(self, memory: int) -> None:
        self._past: deque[float] = deque(maxlen=memory)
        self._bad = 0

    @property
    def value(self) -> float | None:
        return sorted(self._past)[len(self._past) // 2] if len(self._past) >= ENOUGH else None

    def add(self, value: float, bad: bool) -> None:
        self._bad = self._bad + 1 if bad else 0
        if self._bad % SLOWLY == 0:
            self._past.append(value)


class Signals:
    """Reads some of the harm signals, tick by tick. Costs O(active VMs).

    Parameters:
        over: the thresholds, by signal: what is over one does not count as usual.
        memory: ticks that make what is usual.
    """

    def __init__(self, over: dict[str, float], memory: int = 60) -> None:
        self._over = {check_signal(name, HARM): limit for name, limit in over.items()}
        self._memory = memory
        self._host: dict[str, float | None] = {}
        self._usual: dict[str, _Usual] = {name: _Usual(memory) for name in over if name in SLOWDOWN}
        self._work: dict[tuple[str, int], tuple[int, _Usual]] = {}
        self._victims: dict[str, dict[str, float]] = {}
        self._tick = 0

    def look(self, facts: Facts) -> None:
        """Once a tick, before asking."""
        self._tick += 1
        for name in self._over:
            if name in HOST:
                self._host[name] = getattr(facts.host, name)
            elif name in SLOWDOWN:
                self._host[name] = self._slowdown(name, getattr(facts.host, SLOWDOWN[name]))
        if "run_delay" in self._over:
            self._victims["run_delay"] = {
                vm.name: vm.run_delay / wanted
                for vm in facts.vms.values()
                if vm.run_delay is not None and (wanted := _wanted(vm)) is not None and wanted > LEAST * facts.interval
            }
        if "work_drop" in self._over:
            drops = ((vm.name, self._drop(vm, facts.interval)) for vm in facts.vms.values())
            self._victims["work_drop"] = {name: drop for name, drop in drops if drop is not None}
            if self._tick % self._memory == 0:
                old = self._tick - 10 * self._memory
                self._work = {key: seen for key, seen in self._work.items() if seen[0] > old}

    def _slowdown(self, name: str, now: float | None) -> float | None:
        if now is None:
            return None
        usual = self._usual[name].value
        ratio = None if not usual else now / usual
        self._usual[name].add(now, ratio is not None and ratio > self._over[name])
        return ratio

    def _drop(self, vm: VmFacts, interval: float) -> float | None:
        wanted = _wanted(vm)
        if vm.work is None or vm.throttled + (vm.capped or 0.0) > HELD * interval:
            return None
        if wanted is not None and wanted <= LEAST * interval:
            return None
        # Per second that it could have run, where that is known: one that has less to do is not a victim.
        speed = vm.work / (interval if wanted is None else wanted)
        key = (vm.name, vm.launch)
        _, usual = self._work.get(key) or (0, _Usual(self._memory))
        self._work[key] = (self._tick, usual)
        before = usual.value
        drop = None if not before else max(0.0, 1 - speed / before)
        usual.add(speed, drop is not None and drop > self._over["work_drop"])
        return drop

    def host(self, name: str) -> float | None:
        return self._host.get(name)

    def victims(self, name: str) -> dict[str, float]:
        """Of those VMs that tell: ``run_delay`` is the part of the time that they could have run and had no CPU,
        ``work_drop`` the part by which they work slower than is usual with them."""
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
