"""How a VM fared over time, for a plot."""

from __future__ import annotations

import attrs

from .explain import ENDED, SECOND, fared_by, life_of, mean
from .holds import HoldTracker
from .intervals import whole
from .reader import ActionRow, Aggregate, HostRow, JournalReader, StateRow

__all__ = ["Bin", "series"]


@attrs.frozen
class Bin:
    """How a VM fared in a part of the time, for a plot. None: not known.

    Attributes:
        time: the middle of the part, in nanoseconds since the epoch.
        bus_locks, exits: per second.
        throttled: the part of its vCPUs' time in which the VM waited for a bucket.
        queued: the part of its vCPUs' time in which the VM could have run and waited for a CPU.
        limit: the tightest limit on the VM's bus locks at the end of the part, per second.
        lock_ns: nanoseconds that the host's probe took for a locked operation.
    """

    time: int
    bus_locks: float | None
    exits: float | None
    throttled: float | None
    queued: float | None
    limit: float | None
    lock_ns: float | None


def series(journal: JournalReader, vm: str, since: int, until: int, bins: int) -> list[Bin]:
    """How a VM fared over time, in parts of equal length.

    The VM was idle in intervals that the journal has and in which it has no row about the VM.

    Parameters:
        since, until: nanoseconds since the epoch.
        bins: how many parts.

    Raises:
        JournalError: the journal can't be read.
    """
    width = max(1, -(-(until - since) // bins))
    rows: dict[int, list[Aggregate]] = {}
    hosts: dict[int, list[HostRow]] = {}
    for row in whole(journal.aggregates(vm=vm, since=since + 1, until=until)):
        for i in _parts(row, since, width):
            rows.setdefault(i, []).append(row)
    for host in journal.hosts(since=since + 1, until=until):
        for i in _parts(host, since, width):
            hosts.setdefault(i, []).append(host)
    limits = _limits(journal, vm, since, until)
    made = []
    for i in range(bins):
        end = since + (i + 1) * width
        fared = fared_by(rows.get(i, []))
        there = hosts.get(i, [])
        idle = 0.0 if there and fared is None else None
        limit = next((rate for time, rate in reversed(limits) if time <= end), None)
        seconds = sum(host.interval for host in there)
        part = fared.seconds / seconds if fared is not None and seconds > fared.seconds else 1.0
        made.append(
            Bin(
                time=since + i * width + width // 2,
                bus_locks=idle if fared is None else None if fared.bus_locks is None else fared.bus_locks * part,
                exits=idle if fared is None else fared.exits * part,
                throttled=idle if fared is None else fared.throttled * part,
                queued=idle if fared is None else None if fared.queued is None else fared.queued * part,
                limit=limit,
                lock_ns=mean(host.lock_ns for host in there),
            )
        )
    return made


def _parts(row: Aggregate | HostRow, since: int, width: int) -> range:
    """The parts to which a row belongs: the part of its end, or all parts of its interval if it is longer than one."""
    end = row.time - 1 - since  # a row is about the time before it
    begin = max(0, row.time - round(row.interval * SECOND) - since)
    return range(end // width if row.interval * SECOND <= width else begin // width, end // width + 1)


def _limits(journal: JournalReader, vm: str, since: int, until: int) -> list[tuple[int, float | None]]:
    """The changes of the tightest limit on the bus locks of the VM itself: their times, and the limit from there on.

    They begin with the generation that ran at `since`. A VM that ends takes its limits with it.
    """
    states = list(journal.states(vm=vm, until=until))
    there = next((life_of(row) for row in reversed(states) if row.time <= since), None)
    begin = next((row.time for row in states if life_of(row) == there), None)
    rows: list[ActionRow | StateRow] = [
        row
        for row in journal.actions(vm=vm, outcome="done", since=begin, until=until)
        if row.kind in ("Throttle", "Unthrottle", "SetLimit") and row.details.get("meter") == "bus_locks"
    ]
    lives = [row for row in states if begin is None or row.time >= begin]
    held, life = HoldTracker(), there
    changes: list[tuple[int, float | None]] = []
    for row in sorted([*lives, *rows], key=lambda row: row.time):  # a state goes before the actions of its time
        if isinstance(row, ActionRow):
            held.note(row)
        elif life_of(row) != life or row.state in ENDED:
            held, life = HoldTracker(), life_of(row)
        else:
            continue
        rates = [hold.rate for hold in held.holds() if hold.rate is not None]
        changes.append((row.time, min(rates, default=None)))
    return changes
