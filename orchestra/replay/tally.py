"""Adds up both worlds side by side: as it was, and as it would have been."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from ..policy import HostFacts, VmFacts
from ..spec import Meter
from .demand import Tick, Want
from .limits import Passed
from .response import Response

__all__ = ["Bin", "Tally", "Told", "VmSums", "World", "jain"]

BINS: Final = 240
"""Points of a plot over time."""


@attrs.frozen
class VmSums:
    """One VM in one world: bus locks made, seconds of its vCPUs that it was held for, seconds that it had no CPU.

    `delay` is None where nobody knows. `fair` is what would have been its share, `wanted` what it asked for.
    """

    vm: str
    tenant: str
    bus_locks: float
    wanted: float
    fair: float
    throttled: float
    capped: float
    paused: float
    delay: float | None


@attrs.frozen
class Bin:
    """A part of the time: bus locks a second, and seconds a second that vCPUs waited for limits and for a CPU."""

    time: int
    wanted: float
    bus_locks: float
    throttled: float
    delay: float


@attrs.frozen
class World:
    """One of the two.

    Attributes:
        actions: what was done, by kind.
        not_done: dry runs, refusals and failures, by outcome.
        bus_locks, wanted: let through, and asked for.
        throttled, capped, paused: seconds of vCPUs. None: the journal does not tell (pauses, as it was).
        touched: VMs that something was done to.
        victims_delay: seconds for which the VMs that neither world touched had no CPU; None: not known.
        jain: Jain's index over what each VM got of its fair share; None: no VM asked for anything.
        vms: each of them, the one that was held longest first.
    """

    actions: Mapping[str, int]
    not_done: Mapping[str, int]
    bus_locks: float
    wanted: float
    throttled: float
    capped: float
    paused: float | None
    touched: frozenset[str]
    victims_delay: float | None
    jain: float | None
    vms: tuple[VmSums, ...]
    series: tuple[Bin, ...]


@attrs.frozen
class Told:
    """What policies are told of an interval."""

    vms: Mapping[str, VmFacts]
    host: HostFacts


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has it all. Source: Jain, Chiu, Hawe, DEC-TR-301 (1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


@attrs.define
class _Vm:
    tenant: str
    locks: list[float] = attrs.field(factory=lambda: [0.0, 0.0])
    throttled: list[float] = attrs.field(factory=lambda: [0.0, 0.0])
    capped: list[float] = attrs.field(factory=lambda: [0.0, 0.0])
    delay: list[float] = attrs.field(factory=lambda: [0.0, 0.0])
    paused: float = 0.0
    knows_delay: bool = False
    wanted: float = 0.0
    fair: float = 0.0


@attrs.define
class _Bin:
    seconds: float = 0.0
    wanted: float = 0.0
    locks: list[float] = attrs.field(factory=lambda: [0.0, 0.0])
    throttled: list[float] = attrs.field(factory=lambda: [0.0, 0.0])
    delay: list[float] = attrs.field(factory=lambda: [0.0, 0.0])


class Tally:
    """Index 0 is the world as it was, 1 as it would have been."""

    def __init__(self, since: int, until: int, response: Response) -> None:
        self.seconds = 0.0
        self._since = since
        self._width = max(1, -(-(until - since) // BINS))
        self._response = response
        self._vms: dict[str, _Vm] = {}
        self._bins: dict[int, _Bin] = {}
        self._actions: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._not_done: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._touched: tuple[set[str], set[str]] = (set(), set())

    def did(self, kind: str, outcome: str, vm: str | None) -> None:
        """An action of the journal."""
        self._count(0, kind, outcome, vm)

    def would(self, kind: str, outcome: str, vm: str | None) -> None:
        """An action of the replay."""
        self._count(1, kind, outcome, vm)

    def _count(self, world: int, kind: str, outcome: str, vm: str | None) -> None:
        if kind == "Reload":
            return
        if outcome != "done":
            self._not_done[world][outcome] += 1
            return
        self._actions[world][kind] += 1
        if vm is not None and kind != "Warn":
            self._touched[world].add(vm)

    # ---- an interval ------------------------------------------------------------------------------------------------

    def add(
        self, tick: Tick, wants: Mapping[str, Want], passed: Mapping[str, Passed], fair: Mapping[str, float]
    ) -> Told:
        """Add it to both worlds; what policies would have been told of it."""
        seen_rate = sum(row.bus_locks or 0 for row in tick.vms.values()) / tick.interval
        now = {name: want.events.get(Meter.BUS_LOCKS, 0.0) * passed[name].part for name, want in wants.items()}
        rate = sum(now.values()) / tick.interval
        at = self._bins.setdefault((tick.time - 1 - self._since) // self._width, _Bin())
        at.seconds += tick.interval
        self.seconds += tick.interval
        facts = {}
        for name, want in wants.items():
            seen, came = want.seen, passed[name]
            others = (rate - now[name] / tick.interval) - (seen_rate - (seen.bus_locks or 0) / tick.interval)
            fact = self._fact(want, came, others)
            sums = self._vms.setdefault(name, _Vm(seen.tenant))
            wanted = want.events.get(Meter.BUS_LOCKS, 0.0)
            sums.wanted += wanted
            sums.fair += fair.get(name, 0.0)
            sums.paused += came.paused
            at.wanted += wanted
            for world, (locks, throttled, capped, delay) in enumerate(
                (
                    (float(seen.bus_locks or 0), seen.throttled, seen.capped or 0.0, seen.run_delay),
                    (now[name], came.throttled, came.capped, fact.run_delay),
                )
            ):
                sums.locks[world] += locks
                sums.throttled[world] += throttled
                sums.capped[world] += capped
                at.locks[world] += locks
                at.throttled[world] += throttled
                if delay is not None:
                    sums.knows_delay = True
                    sums.delay[world] += delay
                    at.delay[world] += delay
            if came.part > 0:
                facts[name] = fact
        return Told(facts, self._host(tick, rate - seen_rate))

    def _fact(self, want: Want, came: Passed, others: float) -> VmFacts:
        """What the VM would have been seen to do."""
        seen, part = want.seen, came.part
        # What it did in the time that it ran, for as long as it would have run now.
        scale = part / want.ran
        delay = seen.run_delay
        if delay is not None:
            per_second = delay / want.ran / want.vcpu_seconds + self._response.change("run_delay", others)
            delay = min(1.0, max(0.0, per_second)) * want.vcpu_seconds * part
        locks = want.events.get(Meter.BUS_LOCKS)
        pages = None if seen.dirty_pages is None else seen.dirty_pages * scale
        return VmFacts(
            name=seen.vm,
            tenant=seen.tenant,
            weight=seen.weight,
            vcpus=seen.vcpus,
            bus_locks=None if locks is None else round(locks * part),
            exits=round(want.events[Meter.EXITS] * part),
            throttled=came.throttled,
            launch=seen.launch,
            cpu=None if seen.cpu is None else seen.cpu * scale,
            run_delay=delay,
            capped=None if seen.capped is None and not came.capped else came.capped,
            work=None if seen.work is None else seen.work * scale * max(0.0, 1 + self._response.change("work", others)),
            dirty_pages=None if pages is None else round(pages),
            dirty_rate=None if pages is None else pages / seen.interval,
        )

    def _host(self, tick: Tick, more: float) -> HostFacts:
        host = tick.host
        if host is None:
            return HostFacts()

        def shifted(signal: str, value: float | None) -> float | None:
            return None if value is None else max(0.0, value + self._response.change(signal, more))

        return HostFacts(
            cpus=host.cpus,
            cpu_pressure=host.cpu_pressure,
            memory_pressure=host.memory_pressure,
            io_pressure=host.io_pressure,
            lock_ns=shifted("lock_ns", host.lock_ns),
            memory_ns=shifted("memory_ns", host.memory_ns),
        )

    # ---- the end ----------------------------------------------------------------------------------------------------

    def worlds(self) -> tuple[World, World]:
        """Both, when all is added."""
        touched = self._touched[0] | self._touched[1]
        before, after = (self._world(world, touched) for world in (0, 1))
        return before, after

    def _world(self, world: int, touched: set[str]) -> World:
        vms = sorted(self._vms.items(), key=lambda item: (-max(item[1].throttled), -item[1].wanted, item[0]))
        victims = [sums.delay[world] for name, sums in vms if sums.knows_delay and name not in touched]
        # One that asks for next to nothing says nothing about fairness.
        asked = [sums for _, sums in vms if sums.fair >= 1.0]
        return World(
            actions=dict(self._actions[world]),
            not_done=dict(self._not_done[world]),
            bus_locks=sum(sums.locks[world] for _, sums in vms),
            wanted=sum(sums.wanted for _, sums in vms),
            throttled=sum(sums.throttled[world] for _, sums in vms),
            capped=sum(sums.capped[world] for _, sums in vms),
            paused=None if world == 0 else sum(sums.paused for _, sums in vms),
            touched=frozenset(self._touched[world]),
            victims_delay=sum(victims) if victims else None,
            jain=jain([sums.locks[world] / sums.fair for sums in asked]) if asked else None,
            vms=tuple(
                VmSums(
                    vm=name,
                    tenant=sums.tenant,
                    bus_locks=sums.locks[world],
                    wanted=sums.wanted,
                    fair=sums.fair,
                    throttled=sums.throttled[world],
                    capped=sums.capped[world],
                    paused=0.0 if world == 0 else sums.paused,
                    delay=sums.delay[world] if sums.knows_delay else None,
                )
                for name, sums in vms
            ),
            series=tuple(
                Bin(
                    time=self._since + i * self._width + self._width // 2,
                    wanted=one.wanted / one.seconds,
                    bus_locks=one.locks[world] / one.seconds,
                    throttled=one.throttled[world] / one.seconds,
                    delay=one.delay[world] / one.seconds,
                )
                for i, one in sorted(self._bins.items())
            ),
        )
