"""The demand of the VMs: what they did, and what they would have done in the time in which they were held."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import attrs

from ..journal import HostRow, JournalReader
from ..journal.intervals import SHORT
from ..policy import VmFacts
from ..policy.facts import add_known

__all__ = ["HELD", "Demands", "Tick", "Want", "ticks", "together"]

HELD: Final = 0.05
"""Part of a tick. A VM that was held for less counts as free. As `orchestra.policy.metered.WAITED`."""

MOST_HELD: Final = 0.99
"""Part of a tick. A VM that was held for longer did too little to show what it wanted: its counts are scaled by 100 at
most."""


@attrs.frozen
class Tick:
    """One interval of the journal, as it was.

    Attributes:
        vms: the facts of the VMs that were active.
        new: the VMs among them that were not seen before in this session, or only in another generation.
        gone: name and generation of the VMs that ended for good in the interval.
    """

    session: int
    time: int
    interval: float
    vms: Mapping[str, VmFacts]
    host: HostRow | None
    new: tuple[VmFacts, ...] = ()
    gone: tuple[tuple[str, int], ...] = ()


_COLUMNS: Final = (  # as of `VmFacts`
    "vm, tenant, weight, vcpus, bus_locks, exits, throttled, generation, cpu, run_delay, capped, work, dirty_pages, "
    "dirty_pages / interval"
)


def ticks(
    journal: JournalReader, since: int | None = None, until: int | None = None, *, every: int = 1
) -> Iterator[Tick]:
    """The journal's intervals in order, also those in which no VM was active.

    The end of a fleet cuts its last interval short. A very short interval is added to the one before it.

    Parameters:
        since, until: nanoseconds since the epoch.
        every: 2 gives every second interval in which a VM was active, and so on.

    Raises:
        JournalError: the journal can't be read.
    """
    before: Tick | None = None
    for tick in _ticks(journal, since, until, every):
        if before is not None and before.session == tick.session and tick.interval < SHORT * before.interval:
            tick = _join(before, tick)
        elif before is not None:
            yield before
        before = tick
    if before is not None:
        yield before


def _join(one: Tick, other: Tick) -> Tick:
    new = {vm.name: vm for vm in (*one.new, *other.new)}
    interval = one.interval + other.interval
    host = None if one.host is None else attrs.evolve(one.host, time=other.time, interval=interval)
    vms = together([one.vms, other.vms])
    return Tick(one.session, other.time, interval, vms, host, tuple(new.values()), (*one.gone, *other.gone))


def together(told: Sequence[Mapping[str, VmFacts]], gone: Collection[tuple[str, int]] = ()) -> Mapping[str, VmFacts]:
    """The sums of several intervals, without the VMs that have ended since."""
    sums = _added(told)
    return {name: vm for name, vm in sums.items() if (name, vm.generation) not in gone} if gone else sums


def _added(told: Sequence[Mapping[str, VmFacts]]) -> Mapping[str, VmFacts]:
    if len(told) < 2:
        return told[0] if told else {}
    sums: dict[str, VmFacts] = dict(told[0])
    for facts in told[1:]:
        for name, other in facts.items():
            one = sums.get(name)
            sums[name] = other if one is None or one.generation != other.generation else _sum(one, other)
    return sums


def _sum(one: VmFacts, other: VmFacts) -> VmFacts:
    return VmFacts(
        other.name,
        other.tenant,
        other.weight,
        other.vcpus,
        add_known((one.bus_locks, other.bus_locks)),
        one.exits + other.exits,
        one.throttled + other.throttled,
        other.generation,
        add_known((one.cpu, other.cpu)),
        add_known((one.run_delay, other.run_delay)),
        add_known((one.capped, other.capped)),
        add_known((one.work, other.work)),
        add_known((one.dirty_pages, other.dirty_pages)),
        one.dirty_rate if other.dirty_rate is None else other.dirty_rate,
        answers=one.answers + other.answers,
    )


def _ticks(journal: JournalReader, since: int | None, until: int | None, every: int) -> Iterator[Tick]:
    ends = _Ends(journal, since, until)
    hosts = journal.hosts(since=since, until=until)
    host = next(hosts, None)
    before: int | None = None
    generations: dict[str, int] = {}
    for n, (session, time, interval) in enumerate(journal.moments(since=since, until=until)):
        while host is not None and host.time < time:
            yield Tick(host.session, host.time, host.interval, {}, host, gone=ends.until(host.time, host.session))
            host = next(hosts, None)
        its = host if host is not None and host.time == time else None
        host = host if its is None else next(hosts, None)
        if n % every:
            continue
        if session != before:
            before, generations = session, {}
        # This runs for each row, so it does no more than it has to.
        vms = {row[0]: VmFacts(*row) for row in journal.moment(session, time, _COLUMNS)}
        new = [vm for name, vm in vms.items() if generations.get(name) != vm.generation]
        generations.update((vm.name, vm.generation) for vm in new)
        yield Tick(session, time, interval, vms, its, tuple(new), ends.until(time, session))
    while host is not None:
        yield Tick(host.session, host.time, host.interval, {}, host, gone=ends.until(host.time, host.session))
        host = next(hosts, None)


class _Ends:
    """Reads the ends of VMs, as time goes on."""

    def __init__(self, journal: JournalReader, since: int | None, until: int | None) -> None:
        self._rows = journal.ends(since=since, until=until)
        self._next = next(self._rows, None)

    def until(self, time: int, session: int) -> tuple[tuple[str, int], ...]:
        """The VMs of a session that ended before a time. Each session numbers its generations anew.

        A VM that ended at the very time of a look ended after the look, as does a VM that a policy stops.
        """
        gone = []
        while self._next is not None and self._next.time < time:
            if self._next.session == session:
                gone.append((self._next.vm, self._next.generation))
            self._next = next(self._rows, None)
        return tuple(gone)


@attrs.frozen
class Want:
    """What a VM that was held would have done in an interval if nothing had held it.

    Attributes:
        seen: what the VM did.
        bus_locks, exits, answers: what the VM would have done. Bus locks are None if the journal has none.
        ran: the part of the time in which nothing held the VM, 0.01 to 1. It did in this part what was seen.
    """

    seen: VmFacts
    bus_locks: float | None
    exits: float
    ran: float
    answers: float = 0.0

    @property
    def tenant(self) -> str:
        return self.seen.tenant

    @property
    def vcpus(self) -> int:
        return self.seen.vcpus

    @property
    def weight(self) -> float:
        return self.seen.weight

    @property
    def cpu(self) -> float | None:
        """Seconds of CPU time that the VM would have used. None: not known."""
        return None if self.seen.cpu is None else self.seen.cpu / self.ran


class Demands:
    """Works out demands tick by tick, and remembers how fast each VM was when it was free last."""

    def __init__(self) -> None:
        self._free: dict[str, VmFacts] = {}
        self._seconds: dict[str, float] = {}  # the time in which the VM did that

    def forget(self, vm: str) -> None:
        """Forget a VM that has ended."""
        self._free.pop(vm, None)
        self._seconds.pop(vm, None)

    def held(self, tick: Tick) -> dict[str, Want]:
        """The demand of the VMs that were held in an interval. All others did what they wanted."""
        wants: dict[str, Want] = {}
        before: list[tuple[str, VmFacts | None, float]] = []
        for name, seen in tick.vms.items():
            if seen.throttled or seen.capped:
                held = (seen.throttled + (seen.capped or 0.0)) / (tick.interval * seen.vcpus)
                held = min(MOST_HELD, max(0.0, held))
                wants[name] = self._want(seen, held, tick.interval)
                if held < HELD:
                    before.append((name, seen, tick.interval * (1.0 - held)))
                else:
                    before.append((name, self._free.get(name), self._seconds.get(name, 0.0)))
        self._free.update(tick.vms)
        self._seconds.update(dict.fromkeys(tick.vms, tick.interval))
        for name, free, seconds in before:
            if free is None:
                del self._free[name], self._seconds[name]
            else:
                self._free[name], self._seconds[name] = free, seconds
        return wants

    def _want(self, seen: VmFacts, held: float, interval: float) -> Want:
        ran = 1.0 - held
        free, seconds = self._free.get(seen.name), self._seconds.get(seen.name, 0.0)
        if held < HELD or (free is not None and free.generation != seen.generation):
            free = None

        def wanted(count: float, before: float | None) -> float:
            # In the time in which the VM was held, it would have gone on as when it ran, or as when it was free last,
            # whichever is more.
            rate = count / interval / ran
            return count + held * interval * max(rate, 0.0 if not before else before / seconds)

        locks = seen.bus_locks
        return Want(
            seen,
            None if locks is None else wanted(locks, None if free is None else free.bus_locks),
            wanted(seen.exits, None if free is None else free.exits),
            ran,
            wanted(seen.answers, None if free is None else free.answers),
        )
