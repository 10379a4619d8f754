"""Why is my VM slow? What the journal knows about one VM at one time: what held it, why, and how it fared."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Final

import attrs

from ..model.errors import UnknownVm
from ..policy.suspects import Past, Suspicion
from .causes import Cause, causes
from .coverage import Coverage, cover
from .holds import Hold, in_force, spans
from .intervals import whole
from .reader import ActionRow, Aggregate, JournalReader, StateRow
from .victims import suspects

__all__ = ["Coverage", "Explanation", "Fared", "Surroundings", "explain"]

SECOND: Final = 1_000_000_000
LATELY: Final = 60 * SECOND
"""What "lately" is: figures are of so long before the time in question."""

DAY: Final = 86400 * SECOND

ENDED: Final = ("stopped", "failed")


@attrs.frozen
class Fared:
    """How a VM fared over some seconds: events a second, parts of its vCPUs' time. None: not known.

    Attributes:
        cpu: seconds a second.
        delayed: the part of the time that it could have run in which it had no CPU.
        queued: the same, as a part of all of its time.
        asleep: neither ran, nor waited for a CPU, nor was held by limit or cap: it was idle, or an access of its waited
            to be answered.
    """

    seconds: float
    bus_locks: float | None
    exits: float
    throttled: float
    capped: float | None
    cpu: float | None
    delayed: float | None
    queued: float | None
    asleep: float | None
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
        until: up to when something is known of it: `at`, or when it ended, or when the journal ends.
        launched: when it was launched; None: the journal begins later.
        over: when its fleet was gone, if it was by then; the VM went with it.
        begins: `at` is before this, where the journal first has the VM, or begins at all.
        ends: `at` is after this, where the journal of the VM's fleet ends, which nobody has closed: the fleet was
            killed, or goes on and has not told more yet.
        covered: the intervals that the figures are of: the minute before `until`, as far as there are any.
        begin, end: the time that the figures are of: that of these intervals in which it was there.
        seconds: how much of it is known.
        state: its last one; None: the journal begins later.
        causes: what held it in that time, by the counters; what did for longest first.
        holds: what was in force at `at` that could hold it: what did for longest first, then the tightest limit.
        off: policies that were switched off, as they raised, after they had put what is in force: `error` says why.
        done: what was done to it from `since` to `at`, and was not undone before.
        fared: how it fared in the time of `covered`; None: it did nothing, or nothing is known.
        before: how it fared in the worst interval of the minute before it was held first, if it is held.
        host: how the host was in that time; None: not known.
        suspicion: who slowed it in the ten minutes before, as far as that can be told.
    """

    vm: str
    tenant: str | None
    at: int
    since: int
    until: int
    launched: int | None
    over: int | None
    begins: int | None
    ends: int | None
    covered: Coverage
    begin: int
    end: int
    seconds: float
    state: StateRow | None
    causes: tuple[Cause, ...]
    holds: tuple[Hold, ...]
    off: tuple[ActionRow, ...]
    done: tuple[ActionRow, ...]
    fared: Fared | None
    before: Fared | None
    host: Surroundings | None
    suspicion: Suspicion

    @property
    def gone(self) -> bool:
        """It had ended by then, by itself or with its fleet."""
        return self.over is not None or (self.state is not None and self.state.state in ENDED)


def explain(journal: JournalReader, vm: str, at: int | None = None, *, seconds: float = 3600.0) -> Explanation:
    """Gather what is known of a VM.

    Parameters:
        at: the time in question, nanoseconds since the epoch. Default: the last one that the journal knows all of: of a
            fleet that goes on, or was killed, the end of its last interval.
        seconds: how far to look back.

    Raises:
        UnknownVm: the journal has nothing of it.
    """
    if vm not in journal.vms():
        raise UnknownVm(f"vm={vm!r}: the journal has nothing of it; there are: {journal.some_vms()}")
    at = _last(journal) if at is None else at
    since = at - round(seconds * SECOND)
    every = list(journal.states(vm=vm, until=at))
    state = every[-1] if every else None
    rows = list(journal.aggregates(vm=vm, since=since, until=at))
    life = life_of(state) or (life_of(rows[-1]) if rows else None)
    states = [row for row in every if life_of(row) == life]
    first = states[0].time if states else None
    tenant = state.tenant if state else rows[-1].tenant if rows else None
    ended = state is not None and state.state in ENDED
    over, end = (None, None) if life is None else _end(journal, life[0], at)
    over = None if ended else over
    # Its first states may have been removed, and what was done to it then not.
    other = max((row.time for row in every if life_of(row) != life and row.time <= (first or 0)), default=None)
    actions = _actions(journal, vm, tenant, at, life, other)
    ends = None
    until = at
    if ended and state is not None:
        until = state.time
    elif over is not None:
        until = over if end is None else end
    elif life is not None and (end is None or end < at):
        ends = max((row.time for row in states), default=0) if end is None else end
        until = ends
    asked = until if ends is None else at  # of one that has ended it is its last minute
    begin = asked - LATELY if first is None else min(max(asked - LATELY, first), asked)
    covered = Coverage((begin, asked), (), ()) if life is None else cover(journal, life[0], begin, asked)
    start, stop = max(covered.begin, first or 0), covered.end
    later = actions
    if stop > at:  # the time in question is in the middle of an interval
        later = _actions(journal, vm, tenant, stop, life, other)
        states = [row for row in journal.states(vm=vm, until=stop) if life_of(row) == life]
    stop = min([stop, *([until] if over is not None else []), *(row.time for row in states if row.state in ENDED)])
    rows = [] if stop <= start else _of(journal, vm, life, start, covered.end)
    length = covered.seconds(start, stop) if stop > start else 0.0
    counted = spans(later, start, stop)
    vcpus = rows[-1].vcpus if rows else _vcpus(journal, vm, life)
    found = causes(rows, states, counted, start, stop, length, vcpus) if length else ()
    holds: tuple[Hold, ...] = ()
    if not ended and over is None:
        some = sorted((_held(hold, found), i, hold) for i, hold in enumerate(in_force(actions)))
        # A default is everybody's: it is worth a word for those that it held.
        holds = tuple(hold for held, _, hold in some if held or hold.action.given != "default")
    before = None
    own = [hold.since for hold in holds if hold.where == "vm" and hold.action.given is None]
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
        until=until,
        launched=first,
        over=over,
        begins=_begins(journal, vm, at) if life is None else None,
        ends=ends,
        covered=covered,
        begin=start,
        end=stop,
        seconds=length,
        state=state,
        causes=found,
        holds=holds,
        off=_off(journal, holds, at),
        done=tuple(
            row
            for row in journal.actions(vm=vm, since=begin, until=at)
            if (life is None or row.session == life[0]) and row.given is None
        ),
        fared=fared_by(rows, length),
        before=before,
        host=_surroundings(journal, vm, covered, start) if length else None,
        suspicion=suspects(journal, vm, stop) if length else Past(vm).suspicion(),
    )


def _end(journal: JournalReader, session: int, at: int) -> tuple[int | None, int | None]:
    """When a fleet was gone, if it was by then, and when its journal ends, if that is not by its own word.

    A fleet that was killed says nothing. It was gone when another one began to write to its journal."""
    own = journal.query("SELECT min(ended) FROM sessions WHERE id = ?", (session,))[0][0]
    if own is not None:
        return (own, None) if own < at else (None, max(at, own))
    other = journal.query("SELECT min(begun) FROM sessions WHERE id > ?", (session,))[0][0]
    return (other if other is not None and other < at else None), journal.last_interval(session)


def _last(journal: JournalReader) -> int:
    """The last time that the journal knows all of."""
    span = journal.span()
    session, ended = journal.query(
        "SELECT max(id), (SELECT ended FROM sessions ORDER BY id DESC LIMIT 1) FROM sessions"
    )[0]
    last = journal.last_interval(session) if session is not None and ended is None else None
    return last if last is not None else span[1] if span else 0


def _begins(journal: JournalReader, vm: str, at: int) -> int | None:
    """When the journal has something of a VM that it has nothing of by then; None: nor has it later."""
    found = [
        islice((row.time for row in rows), 1)
        for rows in (
            journal.states(vm=vm, since=at),
            journal.aggregates(vm=vm, since=at),
            journal.actions(vm=vm, since=at),
        )
    ]
    return min(chain(*found), default=None)


def _of(journal: JournalReader, vm: str, life: tuple[int, int] | None, begin: int, end: int) -> list[Aggregate]:
    """What it did in the intervals that lie between two times, at least in part."""
    return [row for row in whole(journal.aggregates(vm=vm, since=begin + 1, until=end)) if life_of(row) == life]


def _vcpus(journal: JournalReader, vm: str, life: tuple[int, int] | None) -> int:
    """How many it has. One that never did anything may have any number, and it makes no difference."""
    query = "SELECT vcpus FROM aggregates WHERE vm = ? AND session = ? AND launch = ? LIMIT 1"
    found = [] if life is None else journal.query(query, (vm, *life))
    return int(found[0][0]) if found else 1


def _off(journal: JournalReader, holds: Iterable[Hold], at: int) -> tuple[ActionRow, ...]:
    last: dict[str, ActionRow] = {}
    for row in [hold.action for hold in holds]:
        if row.policy is not None:
            errors = journal.actions(policy=row.policy, kind="PolicyError", since=row.time, until=at)
            last.update((row.policy, error) for error in errors if error.session == row.session)
    return tuple(last.values())


def _held(hold: Hold, found: Sequence[Cause]) -> float:
    """For sorting: what held it for longest goes first."""
    return -sum(cause.seconds for cause in found if any(one.hold.action == hold.action for one in cause.setters))


def life_of(row: StateRow | Aggregate | None) -> tuple[int, int] | None:
    """What tells a VM from others of its name: launches are numbered anew in each fleet."""
    return None if row is None else (row.session, row.launch)


def _actions(
    journal: JournalReader,
    vm: str,
    tenant: str | None,
    at: int,
    life: tuple[int, int] | None,
    since: int | None,
) -> list[ActionRow]:
    """What was done, or begun, to the VM since another had its name, and to its tenant and the host by then.

    Dry runs and refusals are left out: there may be one of each policy in each tick, and they hold nothing.
    """
    if life is None:
        return []
    rows = [
        row
        for outcome in ("done", "failed")
        for row in journal.actions(vm=vm, outcome=outcome, since=since, until=at)
        if row.session == life[0] and row.details.get("launch", life[1]) == life[1]
    ]
    return sorted([*rows, *journal.shared_limits(life[0], tenant, at)], key=lambda row: row.time)


def fared_by(rows: Sequence[Aggregate], seconds: float | None = None) -> Fared | None:
    """`seconds`: of which this is all that it did. Default: those of the rows."""
    seconds = sum(row.interval for row in rows) if seconds is None else seconds
    if not rows or not seconds:
        return None
    vcpu_seconds = seconds * rows[-1].vcpus
    locks, cpu, delay = (
        _sum(row.bus_locks for row in rows),
        _sum(row.cpu for row in rows),
        _sum(r.run_delay for r in rows),
    )
    capped, work = _sum(row.capped for row in rows), _sum(row.work for row in rows)
    wanted = (cpu or 0.0) + (delay or 0.0)
    throttled = sum(row.throttled for row in rows)
    known = cpu is not None and delay is not None
    asleep = max(0.0, 1 - (wanted + throttled + (capped or 0.0)) / vcpu_seconds) if known else None
    return Fared(
        seconds=seconds,
        bus_locks=None if locks is None else locks / seconds,
        exits=sum(row.exits for row in rows) / seconds,
        throttled=min(1.0, throttled / vcpu_seconds),
        capped=None if capped is None else min(1.0, capped / vcpu_seconds),
        cpu=None if cpu is None else cpu / seconds,
        delayed=None if delay is None or cpu is None else delay / wanted if wanted else 0.0,
        queued=None if delay is None else min(1.0, delay / vcpu_seconds),
        asleep=asleep,
        work=None if work is None else work / seconds,
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """None: not one is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _surroundings(journal: JournalReader, vm: str, covered: Coverage, begin: int) -> Surroundings:
    now, until = [row for row in covered.hosts if row.time > begin], covered.end
    seconds = sum(row.interval for row in now)
    by_vm = [
        (str(row[0]), row[1] / seconds)
        for row in journal.query(
            "SELECT vm, sum(bus_locks) AS locks FROM aggregates WHERE time > ? AND time <= ? AND bus_locks > 0 "
            "AND session = ? GROUP BY vm ORDER BY locks DESC",
            (begin, until, now[-1].session),
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
