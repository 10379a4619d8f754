"""Which VMs slow a VM, by a journal: the comparison of `orchestra.policy.suspects` over the last minutes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any, Final

import attrs

from ..model.errors import UnknownVm
from ..policy.suspects import WINDOWS, Past, Suspicion
from .intervals import join, whole
from .reader import Aggregate, HostRow, JournalReader

__all__ = ["suspects"]

SECOND: Final = 1_000_000_000

MOST: Final = 8
"""The VMs with the most bus locks that are compared, and as many with the most CPU time. A comparison costs some
milliseconds for each suspect."""


def suspects(journal: JournalReader, vm: str, at: int | None = None, *, seconds: float = 600.0) -> Suspicion:
    """Which VMs' bus locks and CPU time go up and down with what a VM suffers, and how surely; see `Suspicion`.

    Takes about a tenth of a second.

    Parameters:
        vm: the name of the VM that may suffer.
        at: the end of the time that is looked at, in nanoseconds since the epoch. Default: the last time in the
            journal.
        seconds: the length of that time. It is cut into 120 windows, or into the journal's own intervals if these are
            longer.

    Raises:
        UnknownVm: the journal has no row about the VM.
        JournalError: the journal can't be read.
    """
    span = journal.span()
    at = at if at is not None else span[1] if span is not None else 0
    since = at - round(seconds * SECOND)
    own = list(whole(journal.aggregates(vm=vm, since=since + 1, until=at)))
    if not own:
        if vm not in journal.vms():
            raise UnknownVm(f"vm={vm!r}: the journal has nothing of it; there are: {journal.some_vms()}")
        return Past(vm).suspicion()
    last = own[-1]
    own = [row for row in own if (row.session, row.generation) == (last.session, last.generation)]
    since = max(since, own[0].time - round(own[0].interval * SECOND))
    hosts = [row for row in journal.hosts(since=since + 1, until=at) if row.session == last.session]
    width = _width(at - since, hosts)
    past = Past(vm)
    rows = {vm: own}
    for name in _active(journal, last.session, since, at):
        if name != vm:
            rows[name] = list(whole(journal.aggregates(vm=name, since=since + 1, until=at)))
    did = {name: _by_window(found, since, width, last.session) for name, found in rows.items()}
    for number, there in _windows(hosts, since, width):
        vms = {name: windows[number] for name, windows in did.items() if number in windows}
        past.add(sum(row.interval for row in there), vms, _mean(there))
    return past.suspicion()


def _width(time: int, hosts: list[HostRow]) -> int:
    """The width of a window in nanoseconds: a whole number of intervals, so that all windows have as many."""
    interval = max(1, round(median(row.interval for row in hosts) * SECOND)) if hosts else SECOND
    return -(-time // (WINDOWS * interval)) * interval


def _active(journal: JournalReader, session: int, since: int, until: int) -> list[str]:
    """The VMs with the most bus locks and the most CPU time."""
    found: dict[str, None] = {}
    for what in ("bus_locks", "cpu"):
        for row in journal.query(
            f"SELECT vm, total({what}) AS did FROM aggregates WHERE session = ? AND time > ? AND time <= ? "
            "GROUP BY vm HAVING did > 0 ORDER BY did DESC, vm LIMIT ?",
            (session, since, until, MOST),
        ):
            found[str(row[0])] = None
    return list(found)


def _by_window(rows: Iterable[Aggregate], since: int, width: int, session: int) -> dict[int, Aggregate]:
    """The sums of a VM's rows, by the number of the window. All generations of a VM count as one suspect."""
    sums: dict[int, Aggregate] = {}
    for row in rows:
        if row.session == session:
            number = (row.time - 1 - since) // width
            before = sums.get(number)
            sums[number] = row if before is None else join(before, row)
    return sums


def _windows(hosts: Iterable[HostRow], since: int, width: int) -> Iterator[tuple[int, list[HostRow]]]:
    """The windows in which the journal has rows, with these rows."""
    there: dict[int, list[HostRow]] = {}
    for row in hosts:
        there.setdefault((row.time - 1 - since) // width, []).append(row)
    yield from sorted(there.items())


def _mean(rows: list[HostRow]) -> HostRow:
    def mean(name: str) -> float | None:
        known = [(getattr(row, name), row.interval) for row in rows if getattr(row, name) is not None]
        return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None

    signals: dict[str, Any] = {name: mean(name) for name in ("cpu_pressure", "memory_pressure", "lock_ns", "memory_ns")}
    return attrs.evolve(rows[-1], **signals) if len(rows) > 1 else rows[0]
