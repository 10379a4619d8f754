"""Adds up two worlds side by side: the world as it was, and as it would have been."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from ..policy import HostFacts, VmFacts
from ..policy.enforcement import FREE, Passed
from .demand import Tick, Want
from .response import Response

__all__ = ["Bin", "Metrics", "Told", "VmSums", "World", "jain"]

BINS: Final = 240
"""Points of a plot over time."""


@attrs.frozen
class VmSums:
    """One VM in one world.

    Attributes:
        bus_locks: bus locks that the VM made.
        wanted: bus locks that it asked for.
        fair: bus locks that would have been its fair share.
        throttled, capped, paused: vCPU seconds in which it was held.
        delay: seconds in which it could have run and had no CPU. None: not known.
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
    """A part of the time. Bus locks are per second; waits for limits and for a CPU are vCPU seconds per second."""

    time: int
    wanted: float
    bus_locks: float
    throttled: float
    delay: float


@attrs.frozen
class World:
    """The sums of one world.

    Attributes:
        actions: how many actions were done, by kind.
        not_done: how many dry runs, refusals and failures there were, by outcome.
        bus_locks, wanted: bus locks that were made, and asked for.
        throttled, capped, paused: vCPU seconds. `paused` is None for the world as it was: the journal does not have it.
        touched: the VMs on which an action was done.
        victims_delay: seconds in which the VMs that neither world touched had no CPU. None: not known.
        jain: Jain's index over the part of its fair share that each VM got. None: no VM asked for anything.
        vms: all VMs, the one that was held longest first.
        series: the same over time.
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
    """The facts of an interval for policies."""

    vms: Mapping[str, VmFacts]
    host: HostFacts


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one of n has everything.

    Source: Jain, Chiu, Hawe, DEC-TR-301 (1984).
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


@attrs.define
class _Vm:
    """The sums of one VM. `locks`, `throttled`, `capped` and `delay` are of the world as it was.

    The fields `more_...` say how much more it would have been in the other world. For most VMs in most intervals both
    worlds are the same, so adding up one world and the differences costs least. `more_wanted` and `more_fair` are
    differences to `locks`.
    """

    tenant: str
    locks: float = 0.0
    throttled: float = 0.0
    capped: float = 0.0
    delay: float = 0.0
    knows_delay: bool = False
    more_locks: float = 0.0
    more_throttled: float = 0.0
    more_capped: float = 0.0
    more_delay: float = 0.0
    more_wanted: float = 0.0
    more_fair: float = 0.0
    paused: float = 0.0


@attrs.define
class _Bin:
    """The sums of a part of the time, as `_Vm` has them for a VM."""

    seconds: float = 0.0
    wanted: float = 0.0
    locks: float = 0.0
    throttled: float = 0.0
    delay: float = 0.0
    more_locks: float = 0.0
    more_throttled: float = 0.0
    more_delay: float = 0.0


class Metrics:
    """Adds up both worlds. Index 0 is the world as it was, 1 the world as it would have been."""

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
        """Count an action of the journal."""
        self._count(0, kind, outcome, vm)

    def would(self, kind: str, outcome: str, vm: str | None) -> None:
        """Count an action of the replay."""
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
        self, tick: Tick, held: Mapping[str, Want], passed: Mapping[str, Passed], fair: Mapping[str, float] | None
    ) -> Told:
        """Add an interval to both worlds. Returns the facts that policies would have got.

        Parameters:
            held: the demand of the VMs that something held.
            passed: what would have become of the VMs that something would have held.
            fair: each VM's fair share, in bus locks. None: it is what the VM wanted.
        """
        seconds = tick.interval
        at = self._bins.setdefault((tick.time - 1 - self._since) // self._width, _Bin())
        at.seconds += seconds
        self.seconds += seconds
        self._add_seen(tick, at)
        more = 0.0  # bus locks that would have been made beyond those that were
        others: dict[str, Want | VmFacts] = {name: held.get(name) or tick.vms[name] for name in {**held, **passed}}
        for name, want in others.items():
            more += (want.bus_locks or 0.0) * passed.get(name, FREE).part - (tick.vms[name].bus_locks or 0)
        facts = tick.vms
        if others or fair is not None or more:
            facts = dict(tick.vms)
            for name, want in others.items():
                self._add_other(facts, name, want, passed.get(name, FREE), more, seconds, at)
            if more:
                self._shift(facts, others, more, seconds, at)
            for name, share in (fair or {}).items():
                locks = others[name].bus_locks if name in others else tick.vms[name].bus_locks
                self._vms[name].more_fair += share - (locks or 0.0)
        return Told(facts, self._host(tick, more / seconds))

    def _add_seen(self, tick: Tick, at: _Bin) -> None:
        """Add the world as it was. This runs for each row, so it does no more than it has to."""
        vms = self._vms
        for seen in tick.new:
            if seen.name not in vms:
                vms[seen.name] = _Vm(seen.tenant)
        locks = delay = throttled = 0.0
        for name, seen in tick.vms.items():
            sums = vms[name]
            if count := seen.bus_locks:
                sums.locks += count
                locks += count
            waited = seen.run_delay
            if waited is not None:
                sums.knows_delay = True
                sums.delay += waited
                delay += waited
            if seen.throttled:
                sums.throttled += seen.throttled
                throttled += seen.throttled
            if seen.capped:
                sums.capped += seen.capped
        at.wanted += locks
        at.locks += locks
        at.throttled += throttled
        at.delay += delay

    def _add_other(
        self,
        facts: dict[str, VmFacts],
        name: str,
        want: Want | VmFacts,
        came: Passed,
        more: float,
        seconds: float,
        at: _Bin,
    ) -> None:
        """Add the difference of a VM that was held, or would have been, and change its facts accordingly."""
        seen, sums = facts[name], self._vms[name]
        wanted = want.bus_locks or 0.0
        locks = wanted * came.part - (seen.bus_locks or 0)
        fact = self._fact(seen, want, came, (more - locks) / seconds, seconds)
        throttled, capped = came.throttled - seen.throttled, came.capped - (seen.capped or 0.0)
        sums.more_locks += locks
        sums.more_wanted += wanted - (seen.bus_locks or 0)
        sums.more_fair += wanted - (seen.bus_locks or 0)
        sums.more_throttled += throttled
        sums.more_capped += capped
        sums.paused += came.paused
        at.wanted += wanted - (seen.bus_locks or 0)
        at.more_locks += locks
        at.more_throttled += throttled
        if fact.run_delay is not None and seen.run_delay is not None:
            sums.more_delay += fact.run_delay - seen.run_delay
            at.more_delay += fact.run_delay - seen.run_delay
        if came.part > 0:
            facts[name] = fact
        else:
            del facts[name]

    def _shift(
        self, facts: dict[str, VmFacts], others: Mapping[str, object], more: float, seconds: float, at: _Bin
    ) -> None:
        """Add how the free VMs would have fared if the others had made `more` bus locks more."""
        if not {"run_delay", "work"} & self._response.lines.keys():
            return
        for name, seen in facts.items():
            if name in others:
                continue
            fact = self._fact(seen, seen, FREE, more / seconds, seconds)
            if fact.run_delay is not None and seen.run_delay is not None:
                self._vms[name].more_delay += fact.run_delay - seen.run_delay
                at.more_delay += fact.run_delay - seen.run_delay
            facts[name] = fact

    def _fact(self, seen: VmFacts, want: Want | VmFacts, came: Passed, others: float, seconds: float) -> VmFacts:
        """The facts of a VM in the other world, where the others make `others` bus locks a second more."""
        ran = want.ran if isinstance(want, Want) else 1.0
        # What the VM did in the time in which it ran, scaled to the time in which it would have run.
        scale = came.part / ran
        delay, work = seen.run_delay, seen.work
        if delay is not None:
            per_second = delay / ran / (seconds * seen.vcpus) + self._response.change("run_delay", others)
            delay = min(1.0, max(0.0, per_second)) * seconds * seen.vcpus * came.part
        if work is not None:
            work *= scale * max(0.0, 1 + self._response.change("work", others))
        pages = None if seen.dirty_pages is None else seen.dirty_pages * scale
        return VmFacts(
            name=seen.name,
            tenant=seen.tenant,
            weight=seen.weight,
            vcpus=seen.vcpus,
            bus_locks=None if want.bus_locks is None else round(want.bus_locks * came.part),
            exits=round(want.exits * came.part),
            answers=round(want.answers * came.part),
            throttled=came.throttled,
            generation=seen.generation,
            cpu=None if seen.cpu is None else seen.cpu * scale,
            run_delay=delay,
            capped=None if seen.capped is None and not came.capped else came.capped,
            work=work,
            dirty_pages=None if pages is None else round(pages),
            dirty_rate=None if pages is None else pages / seconds,
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
        """Both worlds, once all intervals are added."""
        touched = self._touched[0] | self._touched[1]
        before, after = (self._world(world, touched) for world in (0, 1))
        return before, after

    def _world(self, world: int, touched: set[str]) -> World:
        vms = [self._sums(name, sums, world) for name, sums in self._vms.items()]
        order = {name: -max(one.throttled, one.throttled + one.more_throttled) for name, one in self._vms.items()}
        vms.sort(key=lambda one: (round(order[one.vm], 9), -one.wanted, one.vm))
        victims = [one.delay for one in vms if one.delay is not None and one.vm not in touched]
        # A VM whose fair share is less than one bus lock says nothing about fairness.
        asked = [one for one in vms if one.fair >= 1.0]
        return World(
            actions=dict(self._actions[world]),
            not_done=dict(self._not_done[world]),
            bus_locks=sum(one.bus_locks for one in vms),
            wanted=sum(one.wanted for one in vms),
            throttled=sum(one.throttled for one in vms),
            capped=sum(one.capped for one in vms),
            paused=None if world == 0 else sum(one.paused for one in vms),
            touched=frozenset(self._touched[world]),
            victims_delay=sum(victims) if victims else None,
            jain=jain([one.bus_locks / one.fair for one in asked]) if asked else None,
            vms=tuple(vms),
            series=tuple(
                Bin(
                    time=self._since + i * self._width + self._width // 2,
                    wanted=one.wanted / one.seconds,
                    bus_locks=_rest(one.locks, world * one.more_locks) / one.seconds,
                    throttled=_rest(one.throttled, world * one.more_throttled) / one.seconds,
                    delay=_rest(one.delay, world * one.more_delay) / one.seconds,
                )
                for i, one in sorted(self._bins.items())
            ),
        )

    @staticmethod
    def _sums(name: str, sums: _Vm, world: int) -> VmSums:
        delay = sums.delay + world * sums.more_delay
        return VmSums(
            vm=name,
            tenant=sums.tenant,
            bus_locks=_rest(sums.locks, world * sums.more_locks),
            wanted=sums.locks + sums.more_wanted,
            fair=sums.locks + sums.more_fair,
            throttled=_rest(sums.throttled, world * sums.more_throttled),
            capped=_rest(sums.capped, world * sums.more_capped),
            paused=world * sums.paused,
            delay=max(0.0, delay) if sums.knows_delay else None,
        )


def _rest(was: float, more: float) -> float:
    """The sum of both. What is left of sums that cancel out is rounding, and counts as 0."""
    found = was + more
    return found if found > 1e-9 * was else 0.0
