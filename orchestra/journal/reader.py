"""Reads a journal, also while a fleet writes to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import attrs

from ..model.actions import Action
from ..model.codec import KIND, TAGGED, decode
from ..model.errors import SpecError
from .checked import LAST, UNREADABLE, Maker, mapping
from .schema import JournalError, connect, unreadable

__all__ = ["ActionRow", "Aggregate", "HostRow", "JournalReader", "ProfileRow", "StateRow", "VcpuRow", "read_journal"]

T = TypeVar("T")


@attrs.frozen
class ActionRow:
    """An action as the journal has it.

    Attributes:
        session: the number of the fleet that wrote the row.
        time: nanoseconds since the epoch.
        kind: "Throttle", "Pause", ..., or "PolicyError".
        outcome: "done", "dry-run", "refused" or "failed".
        details: the action's other fields.
    """

    session: int
    time: int
    kind: str
    vm: str | None
    tenant: str | None
    policy: str | None
    outcome: str
    error: str | None
    reason: str
    evidence: Mapping[str, Any]
    details: Mapping[str, Any]

    @property
    def action(self) -> Action | None:
        """The action itself. None: the row is a policy's error, or this version of orchestra can't read the action."""
        kind = TAGGED.get(self.kind)
        if kind is None:
            return None
        said = {**self.details, "vm": self.vm, "tenant": self.tenant, "reason": self.reason, "evidence": self.evidence}
        fields = {field.alias for field in attrs.fields(kind) if field.init}
        data = {KIND: self.kind, **{name: value for name, value in said.items() if name in fields}}
        try:
            action: Action = decode(Action, data)
        except SpecError:
            return None
        return action

    @property
    def given(self) -> str | None:
        """Where a limit came from that was there from the start: "open_fleet", "spec", "default" or "host_budget".

        None: the row is no such limit.
        """
        by = self.evidence.get("given")
        return str(by) if by is not None and self.kind in ("SetLimit", "SetIoLimit") and self.policy is None else None


@attrs.frozen
class StateRow:
    """A VM came into a state at `time`, in nanoseconds since the epoch."""

    session: int
    time: int
    vm: str
    generation: int
    tenant: str
    state: str
    reason: str


@attrs.frozen
class Aggregate:
    """What a VM did in the `interval` seconds before `time`. The fields mean the same as in `VmFacts`.

    `throttled_by` and `answers` are None in rows that an older version of orchestra wrote.
    """

    session: int
    time: int
    interval: float
    vm: str
    generation: int
    tenant: str
    weight: float
    vcpus: int
    bus_locks: int | None
    exits: int
    throttled: float
    cpu: float | None
    run_delay: float | None
    capped: float | None
    work: float | None
    dirty_pages: int | None
    by_reason: Mapping[str, Any] | None
    throttled_by: Mapping[str, Any] | None
    answers: int | None


@attrs.frozen
class VcpuRow:
    """What one vCPU did in the `interval` seconds before `time`. The fields mean the same as in `VcpuFacts`.

    VMs with one vCPU have no such rows: their aggregates say the same.
    """

    session: int
    time: int
    interval: float
    vm: str
    generation: int
    vcpu: int
    bus_locks: int | None
    exits: int
    throttled: float
    cpu: float | None
    run_delay: float | None
    capped: float | None


@attrs.frozen
class HostRow:
    """The host's signals in the `interval` seconds before `time`. The fields mean the same as in `HostFacts`.

    `rate` and `exit_rate` are the host's limits on bus locks and on exits, in events per second. `absent` is None if it
    is the same as in the row before.
    """

    session: int
    time: int
    interval: float
    cpus: int
    cpu_pressure: float | None
    memory_pressure: float | None
    io_pressure: float | None
    lock_ns: float | None
    memory_ns: float | None
    rate: float | None
    exit_rate: float | None
    llc_bytes: float | None
    memory_bandwidth: float | None
    absent: Mapping[str, Any] | None


@attrs.frozen
class ProfileRow:
    """Sampled bus locks of one instruction: the number of `samples`, which stand for `weight` bus locks."""

    session: int
    time: int
    vm: str
    generation: int
    rip: int
    mode: int
    cpl: int
    space: int
    samples: int
    weight: int
    code: bytes


ACTION_COLUMNS: Final = "session, time, kind, vm, tenant, policy, outcome, error, reason, evidence, details"


class _ActionMaker(Maker[ActionRow]):
    def _made(self, values: tuple[Any, ...]) -> ActionRow:
        return ActionRow(*values[:-2], *(mapping(text) for text in values[-2:]))


class _JsonMaker(Maker[T]):
    """Makes rows in which the values from the field `first` up to `last` are JSON text or None."""

    def __init__(self, kind: type[T], first: str, last: str) -> None:
        super().__init__(kind)
        names = [field.name for field in attrs.fields(kind)]  # type: ignore[arg-type]
        self._first, self._end = names.index(first), names.index(last) + 1

    def _made(self, values: tuple[Any, ...]) -> T:
        first, end = self._first, self._end
        parts = (None if text is None else mapping(text) for text in values[first:end])
        return super()._made((*values[:first], *parts, *values[end:]))


class _ProfileMaker(Maker[ProfileRow]):
    def _made(self, values: tuple[Any, ...]) -> ProfileRow:
        # SQLite's integers are signed, so the writer keeps an address of the upper half as a negative number.
        row = ProfileRow(*values)
        return row if row.rip >= 0 else attrs.evolve(row, rip=row.rip + (1 << 64))


class JournalReader:
    """A journal that is open for reading; made by `read_journal`. A context manager.

    Queries take `since` and `until` in nanoseconds since the epoch; both ends are included. A query gives its rows in
    the order of their time. It raises `JournalError` at the place where the file is damaged, after it has given the
    rows before that place.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._action, self._profile = _ActionMaker(ActionRow), _ProfileMaker(ProfileRow)
        self._state, self._vcpu = Maker(StateRow), Maker(VcpuRow)
        self._aggregate, self._host = (
            _JsonMaker(Aggregate, "by_reason", "throttled_by"),
            _JsonMaker(HostRow, "absent", "absent"),
        )

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self._path

    def actions(
        self,
        *,
        vm: str | None = None,
        tenant: str | None = None,
        policy: str | None = None,
        kind: str | None = None,
        outcome: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> Iterator[ActionRow]:
        """The actions that fit all that is given, in the order of their time."""
        wanted = {"vm": vm, "tenant": tenant, "policy": policy, "kind": kind, "outcome": outcome}
        return self._rows("actions", ACTION_COLUMNS, self._action, wanted, since, until)

    def states(
        self, *, vm: str | None = None, since: int | None = None, until: int | None = None
    ) -> Iterator[StateRow]:
        return self._rows("states", "*", self._state, {"vm": vm}, since, until)

    def aggregates(
        self,
        *,
        vm: str | None = None,
        tenant: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> Iterator[Aggregate]:
        wanted = {"vm": vm, "tenant": tenant}
        return self._rows("aggregates", "*", self._aggregate, wanted, since, until)

    def vcpus(self, *, vm: str | None = None, since: int | None = None, until: int | None = None) -> Iterator[VcpuRow]:
        """What the vCPUs did, of VMs that have several."""
        return self._rows("vcpus", "*", self._vcpu, {"vm": vm}, since, until)

    def hosts(self, *, since: int | None = None, until: int | None = None) -> Iterator[HostRow]:
        return self._rows("hosts", "*", self._host, {}, since, until)

    def profiles(
        self, *, vm: str | None = None, since: int | None = None, until: int | None = None
    ) -> Iterator[ProfileRow]:
        return self._rows("profiles", "*", self._profile, {"vm": vm}, since, until)

    def vms(self) -> list[str]:
        """The names of all VMs about which the journal has a row."""
        query = (
            "SELECT vm FROM states UNION SELECT vm FROM actions WHERE vm IS NOT NULL UNION SELECT vm FROM aggregates"
        )
        return sorted(str(row[0]) for row in self.query(query))

    def some_vms(self) -> str:
        """The first names of `vms`, for a message."""
        return ", ".join(name if name.isprintable() else repr(name) for name in self.vms()[:8]) or "none"

    def span(self) -> tuple[int, int] | None:
        """The first and the last time in the journal, in nanoseconds since the epoch. None: the journal is empty."""
        return self._span(("actions", "states", "aggregates", "hosts"), "time")

    def intervals(self) -> tuple[int, int] | None:
        """Begin and end of the time that the journal's intervals cover. None: the journal has no intervals."""
        return self._span(("aggregates", "hosts"), "time - interval * 1e9")

    def _span(self, tables: Iterable[str], begin: str) -> tuple[int, int] | None:
        first = [self.query(f"SELECT min({begin}) FROM {table}")[0][0] for table in tables]
        last = [self.query(f"SELECT max(time) FROM {table}")[0][0] for table in tables]
        known = [time for time in (*first, *last) if time is not None]
        for time in known:
            # SQLite checks no types: a damaged file may have anything in this column.
            if not isinstance(time, int | float) or not 0 <= time <= LAST:
                raise self._unreadable(ValueError(f"time={time!r:.80}"))
        return (round(min(known)), round(max(known))) if known else None

    def interval_after(self, session: int, time: int) -> HostRow | None:
        """The first interval of a fleet that ends after a time."""
        query = "SELECT * FROM hosts WHERE session = ? AND time > ? ORDER BY time, rowid LIMIT 1"
        return next(self._made(query, (session, time), self._host), None)

    def last_interval(self, session: int) -> int | None:
        """When the last interval of a fleet ended. None: the journal has none."""
        time = self.query("SELECT max(time) FROM hosts WHERE session = ?", (session,))[0][0]
        return None if time is None else int(time)

    def removed(self) -> int:
        """The time up to which rows of intervals were removed to keep the file within its bounds. 0: none were."""
        return int(self.query("SELECT max(until) FROM removed WHERE name IN ('aggregates', 'hosts')")[0][0] or 0)

    def shared_limits(self, session: int, tenant: str | None, until: int) -> Iterator[ActionRow]:
        """The actions that changed limits of the host, and of `tenant` if there is one, while one fleet was open."""
        query = (
            f"SELECT {ACTION_COLUMNS} FROM actions WHERE vm IS NULL AND time <= ? AND session = ? AND outcome = 'done' "
            "AND ((tenant IS NULL OR tenant = ?) AND kind IN ('Throttle', 'Unthrottle', 'SetLimit') "
            # Of groups of disks the journal does not say whose disks are in them.
            "OR tenant = ? AND kind = 'SetIoLimit') ORDER BY time, id"
        )
        return self._made(query, (until, session, tenant, tenant), self._action)

    def _rows(
        self,
        table: str,
        columns: str,
        make: Callable[[sqlite3.Row], T],
        wanted: Mapping[str, Any],
        since: int | None,
        until: int | None,
    ) -> Iterator[T]:
        tests: list[str] = []
        values: list[Any] = []
        for name, value in wanted.items():
            if value is not None:
                tests.append(f"{name} = ?")
                values.append(value)
        if since is not None:
            tests.append("time >= ?")
            values.append(since)
        if until is not None:
            tests.append("time <= ?")
            values.append(until)
        where = f" WHERE {' AND '.join(tests)}" if tests else ""
        # Rows of one interval have the same time. rowid has the order in which they were written.
        return self._made(f"SELECT {columns} FROM {table}{where} ORDER BY time, rowid", values, make)

    def _made(self, sql: str, values: Sequence[Any], make: Callable[[sqlite3.Row], T]) -> Iterator[T]:
        try:
            for row in self._connection.execute(sql, values):
                yield make(row)
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def ends(self, *, since: int | None = None, until: int | None = None) -> Iterator[StateRow]:
        """The last state of each VM that has ended for good and is not started again, in the order of their time."""
        query = (
            "SELECT * FROM states AS last WHERE state IN ('stopped', 'failed') AND time BETWEEN ? AND ? AND NOT EXISTS "
            "(SELECT 1 FROM states WHERE vm = last.vm AND session = last.session AND generation = last.generation "
            "AND time >= last.time AND rowid > last.rowid) ORDER BY time"
        )
        # The largest integer of SQLite.
        most = (1 << 63) - 1
        values = (-1 if since is None else since, most if until is None else until)
        return self._made(query, values, self._state)

    def lives(self, session: int) -> Iterator[StateRow]:
        """The states of all VMs of one fleet, in the order of their time."""
        return self._made("SELECT * FROM states WHERE session = ? ORDER BY time, rowid", (session,), self._state)

    def limits_set(self, session: int) -> Iterator[ActionRow]:
        """The limits that one fleet and its VMs began with, and those that callers set."""
        query = (
            f"SELECT {ACTION_COLUMNS} FROM actions WHERE session = ? AND kind = 'SetLimit' AND outcome = 'done' "
            "AND policy IS NULL ORDER BY time, id"
        )
        return self._made(query, (session,), self._action)

    def moments(self, *, since: int | None = None, until: int | None = None) -> Iterator[tuple[int, int, float]]:
        """Session, time and interval of the aggregates, each once, in the order of their time."""
        # One query for each moment: it finds the next time in the index and reads the rows of that time alone.
        query = (
            "SELECT min(session), max(session), time, interval FROM aggregates "
            "WHERE time = (SELECT min(time) FROM aggregates WHERE time > ?)"
        )
        last = -1 if since is None else since - 1
        while True:
            first, final, time, interval = self.query(query, (last,))[0]
            if time is None or (until is not None and time > until):
                return
            if first == final:
                yield first, time, interval
            else:
                several = "SELECT session, time, max(interval) FROM aggregates WHERE time = ? GROUP BY session"
                yield from (tuple(row) for row in self.query(several, (time,)))
            last = time

    def moment(self, session: int, time: int, columns: str) -> list[tuple[Any, ...]]:
        """Columns of the aggregates of one moment, as plain tuples: for callers that read millions of rows."""
        cursor = self._connection.cursor()
        # Without Row objects, which nobody would use.
        cursor.row_factory = None
        query = f"SELECT {columns} FROM aggregates WHERE time = ? AND session = ?"
        try:
            return cursor.execute(query, (time, session)).fetchall()
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """The rows of any SELECT, for questions that have no method here. `schema.py` has the tables.

        The file is open read-only.

        Raises:
            JournalError: SQLite refuses the statement, or the file is damaged.
        """
        try:
            return self._connection.execute(sql, values).fetchall()
        except UNREADABLE as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> JournalError:
        return unreadable(self._path, error)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: str | Path) -> JournalReader:
    """Open a journal for reading. A fleet may write to it at the same time.

    Raises:
        JournalError: there is no such journal, or it is of another version. The message says what to do.
    """
    return JournalReader(connect(path, readonly=True), Path(path))
