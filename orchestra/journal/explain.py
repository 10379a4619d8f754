"""Why is my VM slow? What the journal knows about one VM at one time: what held it, why, and how it fared."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Final

import attrs

from ..errors import UnknownVm
from ..policy.suspects import Suspicion
from .intervals import whole
from .reader import ActionRow, Aggregate, HostRow, JournalReader, StateRow
from .victims import suspects

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
        raise UnknownVm(f"vm={vm!r}: the journal has nothing of it; there are: {journal.some_vms()}")
    span = journal.span()
    last = span[1] if span else 0
    at = last if at is None else at
    since = at - round(seconds * SECOND)
    states = list(journal.states(vm=vm, until=at))
    state = states[-1] if states else None
    rows = list(journal.aggregates(vm=vm, since=since, until=at))
    life = _life(state) or (_life(rows[-1]) if rows else None)
    rows = [row for row in rows if _life(row) == life]
    first = next((row.time for row in states if _life(row) == life), None)
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
            whole(row for row in earlier if _life(row) == life),
            key=lambda row: (row.bus_locks or 0) / row.interval,
            default=None,
        )
        before = None if worst is None else _fared([worst])
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
        fared=_fared(lately),
        before=before,
        host=_surroundings(journal, vm, life, until),
        suspicion=suspects(journal, vm, until),
    )


def _life(row: StateRow | Aggregate | None) -> tuple[int, int] | None:
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


class _Held:
    """Reads along in what was done, and knows what is in force. Its size is that of what is."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, ...], Hold] = {}

    def note(self, row: ActionRow) -> None:
        if row.outcome != "done":
            return
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
                return
        if on:
            since = self._held[key].since if key in self._held else row.time
            self._held[key] = Hold(row, since, where)
        else:
            self._held.pop(key, None)

    def holds(self) -> list[Hold]:
        """The tightest limit first."""
        return sorted(self._held.values(), key=lambda hold: -1.0 if hold.rate is None else hold.rate)


def in_force(actions: Iterable[ActionRow]) -> list[Hold]:
    """What holds after these actions, the tightest limit first."""
    held = _Held()
    for row in actions:
        held.note(row)
    return held.holds()


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
    where = "FROM hosts WHERE typeof(lock_ns) = 'real' AND time > ? AND time <= ?"
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


def _limits(journal: JournalReader, vm: str, since: int, until: int) -> list[tuple[int, float | None]]:
    """The tightest limit on bus locks of the VM itself, from each change on; from the launch on that is there at
    `since`. With a VM go its limits."""
    states = list(journal.states(vm=vm, until=until))
    there = next((_life(row) for row in reversed(states) if row.time <= since), None)
    begin = next((row.time for row in states if _life(row) == there), None)
    rows: list[ActionRow | StateRow] = [
        row
        for row in journal.actions(vm=vm, outcome="done", since=begin, until=until)
        if row.kind in ("Throttle", "Unthrottle", "SetLimit") and row.details.get("meter") == "bus_locks"
    ]
    lives = [row for row in states if begin is None or row.time >= begin]
    held, life = _Held(), there
    changes: list[tuple[int, float | None]] = []
    for row in sorted([*lives, *rows], key=lambda row: row.time):  # a state goes first: it is its VM's that was done
        if isinstance(row, ActionRow):
            held.note(row)
        elif _life(row) != life or row.state in ENDED:
            held, life = _Held(), _life(row)
        else:
            continue
        rates = [hold.rate for hold in held.holds() if hold.rate is not None]
        changes.append((row.time, min(rates, default=None)))
    return changes
