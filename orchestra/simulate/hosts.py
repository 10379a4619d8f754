"""The policies of all hosts: gives facts to the policies of active hosts, and lets them decide.

Each host has policies of its own, which are made when the host is first active; they are the objects that run live. A
host on which no VM locks and nothing is in force is skipped, as its policies would see empty facts. When the host
becomes active, its policies get the time that went by, as a few ticks that came late.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from ..model.spec import Limit
from ..policy import Facts, HostFacts, VmFacts
from .arrays import Bools, Floats, Ints, np
from .engines import Engines
from .layout import Layout
from .policies import Factory

__all__ = ["Hosts", "Sums"]

PATIENCE: Final = 300
"""Ticks for which policies still look at a host on which no VM locks and only limits are in force. After that it may be
skipped: a VM that does not lock does not feel a limit, and once a VM locks, the policies first get the time between."""


class Sums(Protocol):
    """What a world has counted so far: cumulative, by VM or by host."""

    locks: Floats
    throttled: Floats
    capped: Floats
    work: Floats
    bus: Floats


class _Schedule:
    """One of the policies, on all hosts."""

    def __init__(self, factory: Factory, order: int, layout: Layout, now: float) -> None:
        self.order = order
        self.interval = factory(layout.models[0]).interval
        self.due = now + (self.interval or 0.0)
        self.decided: set[int] = set()  # hosts on which it ever did
        self.again: list[tuple[float, int]] = []  # of one that decides once: when it wants another turn, and where
        self.pending: list[Ints] = []  # who was active since it last decided
        self.gone: dict[int, list[tuple[str, int]]] = {}  # who left each host since then
        self.last = np.full(layout.hosts, now)
        self.awake = np.full(layout.hosts, -PATIENCE - 1, np.int64)  # until which of its ticks
        self.tick = 0
        # As of its last decision.
        self.locks = np.zeros(layout.size)
        self.throttled = np.zeros(layout.size)
        self.capped = np.zeros(layout.size)
        self.work = np.zeros(layout.size)
        self.bus = np.zeros(layout.hosts)
        self.at = now


class Hosts:
    """The policies of all hosts.

    Parameters:
        engines: the policy engine of each host.
        limit: each host's own limit now.
        engaged, hindering: of each host, how many limits, and how many other things, policies have in force.

    The scenario's `settle` is for how many ticks with empty facts a host's policies see before the first with something
    in it, and again before they are left alone: what they take for usual is of the calm. With a very large one every
    host is looked at in every tick, as live.
    """

    def __init__(
        self,
        layout: Layout,
        factories: Sequence[Factory],
        sums: Sums,
        *,
        engines: Engines,
        limit: Callable[[int], Limit | None],
        engaged: Ints,
        hindering: Ints,
    ) -> None:
        self.layout = layout
        self._sums = sums
        self._engines = engines
        self._limit = limit
        self._engaged, self._hindering = engaged, hindering
        self._settle = layout.scenario.settle
        self._schedules = [_Schedule(factory, order, layout, 0.0) for order, factory in enumerate(factories)]
        self._tenants = layout.tenant_tables()
        self._names: dict[int, str] = {}
        self._absent: Mapping[str, str] = {"io_pressure": "not simulated", "memory_pressure": "not simulated"}
        self.decisions = 0
        groups = layout.scenario.vms
        reporting = [i for i, vms in enumerate(groups) if vms.reports_work]
        self.witnesses = np.flatnonzero(np.isin(layout.group, reporting))
        self._witness_order = self.witnesses[np.argsort(layout.host[self.witnesses], kind="stable")]
        self._witness_from = np.searchsorted(layout.host[self._witness_order], np.arange(layout.hosts + 1))

    def open(self) -> None:
        """At time 0: policies that decide only once do it now, on every host."""
        for schedule in self._schedules:
            if schedule.interval is None:
                for host in range(self.layout.hosts):
                    self._decide(schedule, host, 0.0, 1e-9, {})

    def tick(self, now: float, active: Ints) -> None:
        """Let those decide that are due at `now` (seconds). `active`: VMs that did something since the last tick."""
        for schedule in self._schedules:
            if schedule.interval is None:
                self._once_more(schedule, now)
                continue
            schedule.pending.append(active)
            if schedule.due <= now + 1e-9:
                self._round(schedule, now)
                schedule.due = now + schedule.interval

    def _once_more(self, schedule: _Schedule, now: float) -> None:
        """One that decides once was refused something on these hosts, and asks again."""
        while schedule.again and schedule.again[0][0] <= now + 1e-9:
            _, host = heapq.heappop(schedule.again)
            vms = np.flatnonzero(self.layout.host == host)
            interval = now - float(schedule.last[host])
            schedule.last[host] = now
            rows = self._rows(schedule, vms, interval)
            self._decide(schedule, host, now, interval, {row.name: row for row in rows if row.exits or row.throttled})

    def _round(self, schedule: _Schedule, now: float) -> None:
        layout, sums = self.layout, self._sums
        active = np.unique(np.concatenate(schedule.pending)) if len(schedule.pending) > 1 else schedule.pending[0]
        schedule.pending = []
        schedule.tick += 1
        interval = now - schedule.at
        schedule.at = now
        here = layout.host[active]
        schedule.awake[here] = schedule.tick + self._settle
        awake: Bools = schedule.awake >= schedule.tick
        awake |= (self._engaged > 0) & (schedule.awake >= schedule.tick - PATIENCE)
        awake |= self._hindering > 0
        hosts = np.flatnonzero(awake)
        if len(self.witnesses) and len(hosts):
            theirs = [self._witness_order[self._witness_from[h] : self._witness_from[h + 1]] for h in hosts]
            active = np.union1d(active, np.concatenate(theirs))
            here = layout.host[active]
        order = np.argsort(here, kind="stable")
        active, here = active[order], here[order]
        rows = self._rows(schedule, active, interval)
        bus = (sums.bus[hosts] - schedule.bus[hosts]) / max(interval, 1e-12)
        schedule.bus[:] = sums.bus
        start = np.searchsorted(here, hosts)
        end = np.searchsorted(here, hosts, side="right")
        for host, share, first, last in zip(hosts.tolist(), bus.tolist(), start.tolist(), end.tolist(), strict=True):
            vms = {}
            for i in range(first, last):
                vm = rows[i]
                vms[vm.name] = vm
            gap = now - interval - schedule.last[host]
            if gap > 1e-9 and vms:
                self._catch_up(schedule, host, now - interval, gap, interval)
            self._decide(schedule, host, now, interval, vms, share)
            schedule.last[host] = now

    def _rows(self, schedule: _Schedule, active: Ints, interval: float) -> list[VmFacts]:
        """What facts tell of the active VMs, in their order."""
        layout, sums = self.layout, self._sums
        # Locks are a fluid: whole ones are told, and the rest with the next.
        locks = np.floor(sums.locks[active]).astype(np.int64)
        seen = np.floor(schedule.locks[active]).astype(np.int64)
        counts = (locks - seen).tolist()
        throttled = (sums.throttled[active] - schedule.throttled[active]).tolist()
        capped = (sums.capped[active] - schedule.capped[active]).tolist()
        work = (sums.work[active] - schedule.work[active]).tolist()
        for name in ("locks", "throttled", "capped", "work"):
            getattr(schedule, name)[active] = getattr(sums, name)[active]
        rows = []
        for vm, count, waited, held, done in zip(active.tolist(), counts, throttled, capped, work, strict=True):
            group = layout.group_of(vm)
            if vm not in self._names:
                self._names[vm] = layout.name(vm)
            free = max(0.0, group.vcpus * interval - waited - held)
            rows.append(
                VmFacts(
                    self._names[vm],
                    layout.tenants[layout.tenant[vm]],
                    group.weight,
                    group.vcpus,
                    count,
                    count,
                    max(0.0, waited),
                    0,
                    free * group.cpu,
                    None,
                    held,
                    done if group.reports_work else None,
                )
            )
        return rows

    def _catch_up(self, schedule: _Schedule, host: int, now: float, gap: float, interval: float) -> None:
        """Tell of the time in which nothing happened, as of ticks that came ever later: each twice as long as the last.

        A host's first ones are told the other way round: what counts is that the last few are of the usual length.
        """
        lengths: list[float] = []
        if host in schedule.decided:
            length, left = interval, gap
            while left > 1.5 * length:
                lengths.append(length)
                left -= length
                length *= 2
            lengths.append(left)
        else:
            short = min(self._settle, int(gap / interval + 0.5) - 1)
            lengths = [gap - short * interval, *[interval] * short]
        at = now - gap
        for length in lengths:
            at += length
            self._decide(schedule, host, at, length, {})

    def _decide(
        self, schedule: _Schedule, host: int, now: float, interval: float, vms: dict[str, VmFacts], bus: float = 0.0
    ) -> None:
        layout = self.layout
        kind = int(layout.host_class[host])
        engine = self._engines.of(host, now)
        state = engine.states[schedule.order]
        schedule.decided.add(host)
        if not state.on:
            return
        model = layout.models[kind]
        slower = 1 + (model.worst - 1) * min(1.0, bus)
        gone = tuple(schedule.gone.pop(host, ()))
        for name, _ in gone:
            vms.pop(name, None)
        load, cpus = float(layout.load[host]), float(layout.cpus[host])
        facts = Facts(
            round(now * 1e9),
            interval,
            self._limit(host),
            None,
            self._tenants[kind],
            vms,
            HostFacts(
                int(cpus), max(0.0, 1 - cpus / load) if load else 0.0, None, None,
                model.lock_ns * slower, model.memory_ns * slower, self._absent,
            ),
            gone,
        )  # fmt: skip
        self.decisions += 1
        engine.decide(state, facts, facts.time)
        if schedule.interval is None and state.on:
            heapq.heappush(schedule.again, (state.due / 1e9, host))
        for where, name in self._engines.take_left():
            for other in self._schedules:
                other.gone.setdefault(where, []).append((name, 0))
