"""Why is my VM slow? What the journal knows about one VM at one time: what held it, why, and how it fared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, Final

import attrs

from ..errors import UnknownVm
from .reader import ActionRow, Aggregate, HostRow, JournalReader, StateRow

__all__ = ["Bin", "Explanation", "Fared", "Hold", "Surroundings", "explain", "in_force", "series"]

SECOND: Final = 1_000_000_000
LATELY: Final = 60 * SECOND
"""What "lately" is: figures are of so long before the time in question."""

DAY: Final = 86400 * SECOND

ENDED: Final = ("stopped", "failed")


@attrs.frozen
class Hold:
    """Something that held the VM at that time.

    Attributes:
        action: that put it in force as it is, with reason and evidence.
        since: when the same policy began to hold it in that way; the action may have changed it later.
        where: "vm", "tenant" or "host".
    """

    action: ActionRow
    since: int
    where: str

    @property
    def rate(self) -> float | None:
        """Of a limit, events a second."""
        limit = self.action.details.get("limit")
        return None if limit is None else float(limit["rate"])


@attrs.frozen
class Fared:
    """How a VM fared over some seconds: events a second, parts of its vCPUs' time. None: not known.

    `delayed` is the part of the time that it could have run in which it had no CPU; `cpu` seconds a second.
    """

    seconds: float
    bus_locks: float | None
    exits: float
    throttled: float
    capped: float | None
    cpu: float | None
    delayed: float | None
    work: float | None


@attrs.frozen
class Surroundings:
    """How the host was: pressures as parts of the time.

    Attributes:
        lock_ns: that its probe took for a locked operation.
        lock_times: how many times as long as in the calm that is.
        bus_locks: a second, of all VMs together.
        share: the VM's part of them.
        loudest: who made most, and how many a second.
    """

    cpu_pressure: float | None
    memory_pressure: float | None
    io_pressure: float | None
    lock_ns: float | None
    lock_times: float | None
    bus_locks: float
    share: float | None
    loudest: tuple[str, float] | None


@attrs.frozen
class Explanation:
    """What is known of a VM at a time.

    Attributes:
        at: the time, nanoseconds since the epoch.
        since: where the time looked at begins.
        state: its last one; None: the journal begins later.
        holds: what held it, the tightest limit first.
        done: what was done to it from `since` to `at`, and was not undone before.
        fared: how it fared lately; None: it did nothing.
        before: how it fared in the worst interval of the minute before it was held first, if it is held.
        host: how the host was lately; None: not known.
    """

    vm: str
    tenant: str | None
    at: int
    since: int
    launched: int | None
    state: StateRow | None
    holds: tuple[Hold, ...]
    done: tuple[ActionRow, ...]
    fared: Fared | None
    before: Fared | None
    host: Surroundings | None


@attrs.frozen
class Bin:
    """A VM in a part of the time, for a plot. What is None is not known."""

    time: int
    bus_locks: float | None
    exits: float | None
    throttled: float | None
    delayed: float | None
    limit: float | None
    lock_ns: float | None


def explain(journal: JournalReader, vm: str, at: int | None = None, *, seconds: float = 3600.0) -> Explanation:
    """Gather what is known of a VM.

    Parameters:
        at: the time in question, nanoseconds since the epoch. Default: the last one in the journal.
        seconds: how far to look back.

    Raises:
        UnknownVm: the journal has nothing of it.
    """
    if vm not in journal.vms():
        known = ", ".join(journal.vms()[:8]) or "none"
        raise UnknownVm(f"vm={vm!r}: the journal has nothing of it; there are: {known}")
    span = journal.span()
    last = span[1] if span else 0
    at = last if at is None else at
    since = at - round(seconds * SECOND)
    states = list(journal.states(vm=vm, until=at))
    state = states[-1] if states else None
    first = next((row.time for row in states if state and row.launch == state.launch), None)
    rows = list(journal.aggregates(vm=vm, since=since, until=at))
    tenant = state.tenant if state else rows[-1].tenant if rows else None
    actions = _actions(journal, vm, tenant, at, first)
    ended = state is not None and state.state in ENDED
    holds = () if ended else tuple(in_force(actions))
    until = state.time if ended and state is not None else at  # how it was when it still ran
    lately = [row for row in rows if row.time > until - LATELY]
    before = None
    own = [hold.since for hold in holds if hold.where == "vm"]
    if own:
        earlier = list(journal.aggregates(vm=vm, since=min(own) - LATELY, until=min(own)))
        worst = max(earlier, key=lambda row: (row.bus_locks or 0) / row.interval, default=None)
        before = None if worst is None else _fared([worst])
    return Explanation(
        vm=vm,
        tenant=tenant,
        at=at,
        since=since,
        launched=first,
        state=state,
        holds=holds,
        done=tuple(row for row in actions if row.vm == vm and row.time >= since),
        fared=_fared(lately),
        before=before,
        host=_surroundings(journal, vm, until),
    )


def _actions(journal: JournalReader, vm: str, tenant: str | None, at: int, since: int | None) -> list[ActionRow]:
    """What was done to the VM since it was launched, and to its tenant and the host since the fleet was opened."""
    begun = journal.query("SELECT max(begun) FROM sessions WHERE begun <= ?", (at,))[0][0] or 0
    rows = list(journal.actions(vm=vm, since=since, until=at))
    columns = "session, time, kind, vm, tenant, policy, outcome, error, reason, evidence, details"
    for found in journal.query(
        f"SELECT {columns} FROM actions WHERE vm IS NULL AND time >= ? AND time <= ? "
        "AND (tenant IS NULL OR tenant = ?) AND kind IN ('Throttle', 'Unthrottle', 'SetLimit')",
        (begun, at, tenant),
    ):
        values: list[Any] = list(found)
        values[-2:] = (json.loads(text) for text in values[-2:])
        rows.append(ActionRow(*values))
    return sorted(rows, key=lambda row: row.time)


def in_force(actions: Iterable[ActionRow]) -> list[Hold]:
    """What holds after these actions, the tightest limit first."""
    held: dict[tuple[str, ...], Hold] = {}
    for row in actions:
        if row.outcome != "done":
            continue
        key: tuple[str, ...]
        where = "vm" if row.vm is not None else "tenant" if row.tenant is not None else "host"
        who, meter = row.policy or "", str(row.details.get("meter", ""))
        match row.kind:
            case "Throttle" | "Unthrottle":
                key, on = ("throttle", where, meter, who), row.kind == "Throttle"
            case "SetLimit":
                key = ("limit", where, meter, str(row.details.get("vcpu")))
                on = row.details.get("limit") is not None
            case "CapCpu":
                key, on = ("cap", where, who), row.details.get("share") is not None
            case "Pause" | "Resume":  # there is one for all
                key, on = ("pause", where), row.kind == "Pause"
            case "Isolate" | "Rejoin":
                key, on = ("isolate", where), row.kind == "Isolate"
            case _:
                continue
        if on:
            held[key] = Hold(row, held[key].since if key in held else row.time, where)
        else:
            held.pop(key, None)
    return sorted(held.values(), key=lambda hold: -1.0 if hold.rate is None else hold.rate)


def _fared(rows: list[Aggregate]) -> Fared | None:
    seconds = sum(row.interval for row in rows)
    if not seconds:
        return None
    vcpu_seconds = sum(row.interval * row.vcpus for row in rows)
    locks, cpu, delay = (
        _sum(row.bus_locks for row in rows),
        _sum(row.cpu for row in rows),
        _sum(r.run_delay for r in rows),
    )
    capped, work = _sum(row.capped for row in rows), _sum(row.work for row in rows)
    wanted = (cpu or 0.0) + (delay or 0.0)
    return Fared(
        seconds=seconds,
        bus_locks=None if locks is None else locks / seconds,
        exits=sum(row.exits for row in rows) / seconds,
        throttled=min(1.0, sum(row.throttled for row in rows) / vcpu_seconds),
        capped=None if capped is None else min(1.0, capped / vcpu_seconds),
        cpu=None if cpu is None else cpu / seconds,
        delayed=None if delay is None or cpu is None else delay / wanted if wanted else 0.0,
        work=None if work is None else work / seconds,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """None: not one is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _surroundings(journal: JournalReader, vm: str, until: int) -> Surroundings | None:
    now = list(journal.hosts(since=until - LATELY + 1, until=until))
    if not now:
        return None
    seconds = sum(row.interval for row in now)
    by_vm = [
        (row[0], row[1] / seconds)
        for row in journal.query(
            "SELECT vm, sum(bus_locks) AS locks FROM aggregates WHERE time > ? AND time <= ? AND bus_locks > 0 "
            "GROUP BY vm ORDER BY locks DESC",
            (until - LATELY, until),
        )
    ]
    total = sum(rate for _, rate in by_vm)
    lock_ns = _mean(row.lock_ns for row in now)
    usual = _usual(journal, until)
    return Surroundings(
        cpu_pressure=_mean(row.cpu_pressure for row in now),
        memory_pressure=_mean(row.memory_pressure for row in now),
        io_pressure=_mean(row.io_pressure for row in now),
        lock_ns=lock_ns,
        lock_times=lock_ns / usual if lock_ns is not None and usual else None,
        bus_locks=total,
        share=dict(by_vm).get(vm, 0.0) / total if total else None,
        loudest=by_vm[0] if by_vm else None,
    )


def _usual(journal: JournalReader, until: int) -> float | None:
    """What the host's probe takes in the calm: what it took in the best tenth of the last day."""
    where = "FROM hosts WHERE lock_ns IS NOT NULL AND time > ? AND time <= ?"
    day = (until - DAY, until)
    count = int(journal.query(f"SELECT count(*) {where}", day)[0][0])
    found = journal.query(f"SELECT lock_ns {where} ORDER BY lock_ns LIMIT 1 OFFSET ?", (*day, count // 10))
    return float(found[0][0]) if found else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def series(journal: JournalReader, vm: str, since: int, until: int, bins: int) -> list[Bin]:
    """How a VM fared over time, in parts of equal length. Where the journal was written and has no row of it, it was
    idle."""
    width = max(1, -(-(until - since) // bins))
    rows: dict[int, list[Aggregate]] = {}
    hosts: dict[int, list[HostRow]] = {}
    for row in journal.aggregates(vm=vm, since=since + 1, until=until):
        for i in _parts(row, since, width):
            rows.setdefault(i, []).append(row)
    for host in journal.hosts(since=since + 1, until=until):
        for i in _parts(host, since, width):
            hosts.setdefault(i, []).append(host)
    limits = _limits(journal, vm, until)
    made = []
    for i in range(bins):
        end = since + (i + 1) * width
        fared = _fared(rows.get(i, []))
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
                delayed=None if fared is None else fared.delayed,
                limit=limit,
                lock_ns=_mean(host.lock_ns for host in there),
            )
        )
    return made


def _parts(row: Aggregate | HostRow, since: int, width: int) -> range:
    """The parts that a row is of: that of its end or, if it is of a longer time than a part, all of that time."""
    end = row.time - 1 - since  # a row is of the time before it
    begin = max(0, row.time - round(row.interval * SECOND) - since)
    return range(end // width if row.interval * SECOND <= width else begin // width, end // width + 1)


def _limits(journal: JournalReader, vm: str, until: int) -> list[tuple[int, float | None]]:
    """The tightest limit on bus locks of the VM itself, from each change on."""
    actions: list[ActionRow] = []
    changes: list[tuple[int, float | None]] = []
    for row in journal.actions(vm=vm, until=until):
        if row.kind in ("Throttle", "Unthrottle", "SetLimit") and row.details.get("meter") == "bus_locks":
            actions = [*_others(actions, row), row]
            rates = [hold.rate for hold in in_force(actions) if hold.rate is not None]
            changes.append((row.time, min(rates, default=None)))
    return changes


def _others(actions: list[ActionRow], row: ActionRow) -> Iterator[ActionRow]:
    """Without those that it replaces, so that the list stays as short as what is in force."""
    for one in actions:
        if one.policy != row.policy or (one.kind == "SetLimit") != (row.kind == "SetLimit") or row.outcome != "done":
            yield one
