"""Why is my VM slow? What the journal knows about a VM at a time: what held the VM, why, and how it fared."""

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
"""Nanoseconds before the time in question that the figures are about."""

DAY: Final = 86400 * SECOND

ENDED: Final = ("stopped", "failed")


@attrs.frozen
class Fared:
    """How a VM fared over some seconds. None: not known.

    Attributes:
        bus_locks, exits, work: per second.
        throttled, capped: parts of the time of the VM's vCPUs in which limits and a CPU cap held it.
        cpu: seconds of CPU time per second.
        delayed: of the time in which the VM could have run, the part in which it had no CPU.
        queued: the same, as a part of all its time.
        asleep: the part of the time in which the VM neither ran, nor waited for a CPU, nor was held by a limit or a
            cap. The VM was idle then, or waited for the answer to an access.
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
    """How the host was. None: not known.

    Attributes:
        cpu_pressure, memory_pressure, io_pressure: PSI, as parts of the time.
        lock_ns: nanoseconds that the host's probe took for a locked operation.
        lock_times: how many times as long that is as in the calm.
        bus_locks: bus locks per second of all VMs together.
        share: the VM's part of them.
        loudest: the VM with the most bus locks, and how many it made per second.
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
    """What the journal knows of a VM at a time. All times are nanoseconds since the epoch.

    Attributes:
        at: the time in question.
        since: where the time that is looked at begins.
        until: the time up to which something is known of the VM: `at`, the VM's end, or the end of the journal.
        launched: when the VM was launched. None: the journal begins later.
        over: when the VM's fleet was gone, if that was before `at`. The VM ended with it.
        begins: set if `at` is before it: the time at which the journal first has the VM.
        ends: set if `at` is after it: the time at which the journal of the VM's fleet ends without a word. The fleet
            was killed, or it goes on and has not written more yet.
        covered: the intervals that the figures are about: the minute before `until`, as far as there are intervals.
        begin, end: the time that the figures are about: the part of these intervals in which the VM was there.
        seconds: how much of that time is known.
        state: the VM's last state. None: the journal begins later.
        causes: what held the VM in that time, by the counters; the longest first.
        holds: what was in force at `at` and could hold the VM: what held the VM for longest first, then the tightest
            limit.
        off: errors of policies that raised and were switched off after they had put in force what is in `holds`.
        done: the actions that were done to the VM from `since` to `at`.
        fared: how the VM fared in the time of `covered`. None: the VM was idle, or nothing is known.
        before: how the VM fared in the worst interval of the minute before it was first held, if it is held.
        host: how the host was in that time. None: not known.
        suspicion: which VMs slowed the VM in the ten minutes before, as far as that can be said.
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
        """Whether the VM had ended by then, by itself or with its fleet."""
        return self.over is not None or (self.state is not None and self.state.state in ENDED)


def explain(journal: JournalReader, vm: str, at: int | None = None, *, seconds: float = 3600.0) -> Explanation:
    """Gather what a journal knows of a VM.

    Parameters:
        vm: the name of the VM.
        at: the time in question, in nanoseconds since the epoch. Default: the last time of which the journal knows
            everything. For a fleet that goes on, or was killed, this is the end of its last interval.
        seconds: how far to look back.

    Raises:
        UnknownVm: the journal has no row about the VM.
        JournalError: the journal can't be read.
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
    # The VM's first states may have been removed, while the actions of that time are still there.
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
    asked = until if ends is None else at  # for a VM that has ended: its last minute
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
        # All VMs have the default limit, so it is listed only if it held this VM.
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
    """When a fleet was gone, if that was before `at`, and when its rows end, if the fleet did not write its end.

    A fleet that was killed writes no end. It was gone by the time at which another fleet began to write to its
    journal.
    """
    own = journal.query("SELECT min(ended) FROM sessions WHERE id = ?", (session,))[0][0]
    if own is not None:
        return (own, None) if own < at else (None, max(at, own))
    other = journal.query("SELECT min(begun) FROM sessions WHERE id > ?", (session,))[0][0]
    return (other if other is not None and other < at else None), journal.last_interval(session)


def _last(journal: JournalReader) -> int:
    """The last time of which the journal knows everything."""
    span = journal.span()
    session, ended = journal.query(
        "SELECT max(id), (SELECT ended FROM sessions ORDER BY id DESC LIMIT 1) FROM sessions"
    )[0]
    last = journal.last_interval(session) if session is not None and ended is None else None
    return last if last is not None else span[1] if span else 0


def _begins(journal: JournalReader, vm: str, at: int) -> int | None:
    """When the journal first has a row about a VM, from `at` on. None: it has none."""
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
    """What the VM did in the intervals that lie between two times, at least in part."""
    return [row for row in whole(journal.aggregates(vm=vm, since=begin + 1, until=end)) if life_of(row) == life]


def _vcpus(journal: JournalReader, vm: str, life: tuple[int, int] | None) -> int:
    """How many vCPUs the VM has. For a VM that was never active any number will do: all its figures are 0."""
    query = "SELECT vcpus FROM aggregates WHERE vm = ? AND session = ? AND generation = ? LIMIT 1"
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
    """The key for sorting: what held the VM for longest goes first."""
    return -sum(cause.seconds for cause in found if any(one.hold.action == hold.action for one in cause.setters))


def life_of(row: StateRow | Aggregate | None) -> tuple[int, int] | None:
    """Session and generation, which distinguish VMs of one name: each fleet numbers its VMs from 1."""
    return None if row is None else (row.session, row.generation)


def _actions(
    journal: JournalReader,
    vm: str,
    tenant: str | None,
    at: int,
    life: tuple[int, int] | None,
    since: int | None,
) -> list[ActionRow]:
    """The actions on the VM since another VM had its name, and those on its tenant's and the host's limits, by `at`.

    Dry runs and refusals are left out: there may be one of each policy in each tick, and they hold nothing.
    """
    if life is None:
        return []
    rows = [
        row
        for outcome in ("done", "failed")
        for row in journal.actions(vm=vm, outcome=outcome, since=since, until=at)
        if row.session == life[0] and row.details.get("generation", life[1]) == life[1]
    ]
    return sorted([*rows, *journal.shared_limits(life[0], tenant, at)], key=lambda row: row.time)


def fared_by(rows: Sequence[Aggregate], seconds: float | None = None) -> Fared | None:
    """How a VM fared in the time of these rows. None: there are no rows.

    Parameters:
        seconds: the length of the time, if the VM was idle in the rest of it. Default: the sum of the rows' intervals.
    """
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
    """The sum of the values that are known. None: no value is known."""
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
    """What the host's probe takes in the calm: the limit of the best tenth of its times in the last day.

    The very best time may be a lucky one, and the median of a noisy day is no calm.
    """
    where = "FROM hosts WHERE typeof(lock_ns) = 'real' AND time > ? AND time <= ?"
    day = (until - DAY, until)
    count = int(journal.query(f"SELECT count(*) {where}", day)[0][0])
    found = journal.query(f"SELECT lock_ns {where} ORDER BY lock_ns LIMIT 1 OFFSET ?", (*day, count // 10))
    return float(found[0][0]) if found else None


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
