"""Why is my VM slow? What the journal knows about one VM at one time: what held it, why, and how it fared."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Final

import attrs

from ..errors import UnknownVm
from ..policy.suspects import Suspicion
from .holds import Hold, in_force
from .intervals import whole
from .reader import ActionRow, Aggregate, JournalReader, StateRow
from .victims import suspects

__all__ = ["Explanation", "Fared", "Surroundings", "explain"]

SECOND: Final = 1_000_000_000
LATELY: Final = 60 * SECOND
"""What "lately" is: figures are of so long before the time in question."""

DAY: Final = 86400 * SECOND

ENDED: Final = ("stopped", "failed")


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
        launched: when it was launched; None: the journal begins later.
        over: when its fleet was gone, if it was by then; the VM went with it.
        state: its last one; None: the journal begins later.
        holds: what held it, the tightest limit first.
        done: what was done to it from `since` to `at`, and was not undone before.
        fared: how it fared lately; None: it did nothing.
        before: how it fared in the worst interval of the minute before it was held first, if it is held.
        host: how the host was lately; None: not known.
        suspicion: who slowed it in the ten minutes before, as far as that can be told.
    """

    vm: str
    tenant: str | None
    at: int
    since: int
    launched: int | None
    over: int | None
    state: StateRow | None
    holds: tuple[Hold, ...]
    done: tuple[ActionRow, ...]
    fared: Fared | None
    before: Fared | None
    host: Surroundings | None
    suspicion: Suspicion


def explain(journal: JournalReader, vm: str, at: int | None = None, *, seconds: float = 3600.0) -> Explanation:
    """Gather what is known of a VM.

    Parameters:
        at: the time in question, nanoseconds since the epoch. Default: the last one in the journal.
        seconds: how far to look back.

    Raises:
        UnknownVm: the journal has nothing of it.
    """
    if vm not in journal.vms():
        raise UnknownVm(f"vm={vm!r}: the journal has nothing of it; there are: {journal.some_vms()}")
    span = journal.span()
    last = span[1] if span else 0
    at = last if at is None else at
    since = at - round(seconds * SECOND)
    states = list(journal.states(vm=vm, until=at))
    state = states[-1] if states else None
    rows = list(journal.aggregates(vm=vm, since=since, until=at))
    life = life_of(state) or (life_of(rows[-1]) if rows else None)
    rows = [row for row in rows if life_of(row) == life]
    first = next((row.time for row in states if life_of(row) == life), None)
    tenant = state.tenant if state else rows[-1].tenant if rows else None
    over = None if life is None else _over(journal, life[0], at)
    ended = state is not None and state.state in ENDED
    gone = state.time if ended and state is not None else over
    actions = _actions(journal, vm, tenant, at, life, first)
    holds = () if gone is not None else tuple(in_force(actions))
    until = at if gone is None else gone  # how it was when it still ran
    lately = [row for row in whole(rows) if row.time > until - LATELY]
    before = None
    own = [hold.since for hold in holds if hold.where == "vm"]
    if own:
        earlier = journal.aggregates(vm=vm, since=min(own) - LATELY, until=min(own))
        worst = max(
            whole(row for row in earlier if life_of(row) == life),
            key=lambda row: (row.bus_locks or 0) / row.interval,
            default=None,
        )
        before = None if worst is None else fared_by([worst])
    begin = since if first is None else max(since, first)
    return Explanation(
        vm=vm,
        tenant=tenant,
        at=at,
        since=since,
        launched=first,
        over=None if ended else over,
        state=state,
        holds=holds,
        done=tuple(
            row for row in journal.actions(vm=vm, since=begin, until=at) if life is None or row.session == life[0]
        ),
        fared=fared_by(lately),
        before=before,
        host=_surroundings(journal, vm, life, until),
        suspicion=suspects(journal, vm, until),
    )


def life_of(row: StateRow | Aggregate | None) -> tuple[int, int] | None:
    """What tells a VM from others of its name: launches are numbered anew in each fleet."""
    return None if row is None else (row.session, row.launch)


def _over(journal: JournalReader, session: int, at: int) -> int | None:
    """When a fleet was gone: by its own word or, if it was killed, because another has begun."""
    ends = journal.query(
        "SELECT min(ended) FROM sessions WHERE id = ? UNION ALL SELECT min(begun) FROM sessions WHERE id > ?",
        (session, session),
    )
    return min((row[0] for row in ends if isinstance(row[0], int) and row[0] < at), default=None)


def _actions(
    journal: JournalReader,
    vm: str,
    tenant: str | None,
    at: int,
    life: tuple[int, int] | None,
    first: int | None,
) -> list[ActionRow]:
    """What was done, or begun, to the VM since it was launched, and to its tenant and the host by then.

    Dry runs and refusals are left out: there may be one of each policy in each tick, and they hold nothing.
    """
    if life is None:
        return []
    rows = [
        row
        for outcome in ("done", "failed")
        for row in journal.actions(vm=vm, outcome=outcome, since=first, until=at)
        if row.session == life[0]
    ]
    return sorted([*rows, *journal.shared_limits(life[0], tenant, at)], key=lambda row: row.time)


def fared_by(rows: list[Aggregate]) -> Fared | None:
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


def _surroundings(journal: JournalReader, vm: str, life: tuple[int, int] | None, until: int) -> Surroundings | None:
    now = [
        row
        for row in journal.hosts(since=until - LATELY + 1, until=until)
        if life is None or row.session == life[0]  # not what an earlier fleet saw of its VMs
    ]
    if not now:
        return None
    seconds = sum(row.interval for row in now)
    by_vm = [
        (str(row[0]), row[1] / seconds)
        for row in journal.query(
            "SELECT vm, sum(bus_locks) AS locks FROM aggregates WHERE time > ? AND time <= ? AND bus_locks > 0 "
            "AND session = ? GROUP BY vm ORDER BY locks DESC",
            (until - LATELY, until, now[-1].session),
        )
    ]
    total = sum(rate for _, rate in by_vm)
    lock_ns = mean(row.lock_ns for row in now)
    usual = _usual(journal, until)
    return Surroundings(
        cpu_pressure=mean(row.cpu_pressure for row in now),
        memory_pressure=mean(row.memory_pressure for row in now),
        io_pressure=mean(row.io_pressure for row in now),
        lock_ns=lock_ns,
        lock_times=lock_ns / usual if lock_ns is not None and usual else None,
        bus_locks=total,
        share=dict(by_vm).get(vm, 0.0) / total if total else None,
        loudest=by_vm[0] if by_vm else None,
    )


def _usual(journal: JournalReader, until: int) -> float | None:
    """What the host's probe takes in the calm: what it took in the best tenth of the last day."""
    where = "FROM hosts WHERE typeof(lock_ns) = 'real' AND time > ? AND time <= ?"
    day = (until - DAY, until)
    count = int(journal.query(f"SELECT count(*) {where}", day)[0][0])
    found = journal.query(f"SELECT lock_ns {where} ORDER BY lock_ns LIMIT 1 OFFSET ?", (*day, count // 10))
    return float(found[0][0]) if found else None


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
