"""What the VMs wanted: what they were seen to do, and what they would have done in the time that they were held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Final

import attrs

from ..journal import Aggregate, HostRow, JournalReader
from ..journal.intervals import SHORT, join
from ..spec import Meter

__all__ = ["Demands", "Tick", "Want", "ticks"]

HELD: Final = 0.05
"""Part of a tick: who was held for less was as good as free."""

MOST_HELD: Final = 0.99
"""One that was held for longer than that did too little to tell what it wanted."""


@attrs.frozen
class Tick:
    """One interval of the journal, as it was."""

    session: int
    time: int
    interval: float
    vms: Mapping[str, Aggregate]
    host: HostRow | None


def ticks(journal: JournalReader, since: int | None = None, until: int | None = None) -> Iterator[Tick]:
    """The journal's intervals in order, also those in which no VM did anything. The rest of one in which a fleet was
    closed is added to the one before."""
    before: Tick | None = None
    for tick in _ticks(journal, since, until):
        if before is not None and before.session == tick.session and tick.interval < SHORT * before.interval:
            tick = _join(before, tick)
        elif before is not None:
            yield before
        before = tick
    if before is not None:
        yield before


def _join(one: Tick, other: Tick) -> Tick:
    vms = dict(one.vms)
    for name, row in other.vms.items():
        there = vms.get(name)
        if there is None:
            vms[name] = attrs.evolve(row, interval=one.interval + row.interval)
        elif there.launch == row.launch:
            vms[name] = join(there, row)
    interval = one.interval + other.interval
    host = None if one.host is None else attrs.evolve(one.host, time=other.time, interval=interval)
    return Tick(one.session, other.time, interval, vms, host)


def _ticks(journal: JournalReader, since: int | None, until: int | None) -> Iterator[Tick]:
    hosts = journal.hosts(since=since, until=until)
    host = next(hosts, None)
    rows = journal.aggregates(since=since, until=until)
    for (session, time), group in groupby(rows, lambda row: (row.session, row.time)):
        while host is not None and host.time < time:
            yield Tick(host.session, host.time, host.interval, {}, host)
            host = next(hosts, None)
        vms = {row.vm: row for row in group}
        its = host if host is not None and host.time == time else None
        yield Tick(session, time, next(iter(vms.values())).interval, vms, its)
        if its is not None:
            host = next(hosts, None)
    while host is not None:
        yield Tick(host.session, host.time, host.interval, {}, host)
        host = next(hosts, None)


@attrs.frozen
class Want:
    """What a VM would have done in an interval if nothing had held it.

    Attributes:
        seen: the row.
        events: by meter; bus locks are missing where they were not seen.
        ran: the part of the time that nothing held it, 0.01 to 1: what was seen was done in this part.
    """

    seen: Aggregate
    events: Mapping[Meter, float]
    ran: float

    @property
    def vcpu_seconds(self) -> float:
        return self.seen.interval * self.seen.vcpus


class Demands:
    """Works out demands row by row, and remembers how fast each VM was when it was free last."""

    def __init__(self) -> None:
        self._free: dict[tuple[str, int], dict[Meter, float]] = {}

    def want(self, row: Aggregate) -> Want:
        held = (row.throttled + (row.capped or 0.0)) / (row.interval * row.vcpus)
        held = min(MOST_HELD, max(0.0, held))
        ran = 1.0 - held
        free = self._free.setdefault((row.vm, row.launch), {})
        counts: dict[Meter, float] = {Meter.EXITS: row.exits}
        if row.bus_locks is not None:
            counts[Meter.BUS_LOCKS] = row.bus_locks
        events = {}
        for meter, count in counts.items():
            rate = count / row.interval / ran
            if held < HELD:
                free[meter] = rate
            # What waited: it would have gone on as it did when it ran, or as it did when it was free last.
            events[meter] = count + held * row.interval * max(rate, free.get(meter, 0.0))
        return Want(row, events, ran)
