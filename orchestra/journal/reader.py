"""Reads a journal, also while a fleet writes it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import attrs

from .schema import connect

__all__ = ["ActionRow", "Aggregate", "HostRow", "JournalReader", "ProfileRow", "StateRow", "read_journal"]

T = TypeVar("T")


@attrs.frozen
class ActionRow:
    """An action as it was journaled. `time` in nanoseconds since the epoch; `kind` "Throttle", "Pause", ..., or
    "PolicyError"; `outcome` "done", "dry-run", "refused" or "failed"; `details` its other fields."""

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


@attrs.frozen
class StateRow:
    """A VM came into a state."""

    session: int
    time: int
    vm: str
    launch: int
    tenant: str
    state: str
    reason: str


@attrs.frozen
class Aggregate:
    """What a VM did in the `interval` seconds before `time`; as `VmFacts`."""

    session: int
    time: int
    interval: float
    vm: str
    launch: int
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


@attrs.frozen
class HostRow:
    """How the host was in the `interval` seconds before `time`; as `HostFacts`. `rate`: its limit on bus locks."""

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


@attrs.frozen
class ProfileRow:
    """Sampled bus locks of one instruction: `samples` of them, standing for `weight`."""

    session: int
    time: int
    vm: str
    launch: int
    rip: int
    mode: int
    cpl: int
    space: int
    samples: int
    weight: int
    code: bytes


class JournalReader:
    """Made by `read_journal`. A context manager. Queries take `since` and `until`, nanoseconds since the epoch."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

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
        """In the order of their time."""
        columns = "session, time, kind, vm, tenant, policy, outcome, error, reason, evidence, details"
        wanted = {"vm": vm, "tenant": tenant, "policy": policy, "kind": kind, "outcome": outcome}
        for row in self._rows("actions", columns, wanted, since, until):
            values = list(row)
            values[-2:] = (json.loads(text) for text in values[-2:])
            yield ActionRow(*values)

    def states(
        self, *, vm: str | None = None, since: int | None = None, until: int | None = None
    ) -> Iterator[StateRow]:
        yield from (StateRow(*row) for row in self._rows("states", "*", {"vm": vm}, since, until))

    def aggregates(
        self,
        *,
        vm: str | None = None,
        tenant: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> Iterator[Aggregate]:
        wanted = {"vm": vm, "tenant": tenant}
        yield from (Aggregate(*row) for row in self._rows("aggregates", "*", wanted, since, until))

    def hosts(self, *, since: int | None = None, until: int | None = None) -> Iterator[HostRow]:
        yield from (HostRow(*row) for row in self._rows("hosts", "*", {}, since, until))

    def profiles(
        self, *, vm: str | None = None, since: int | None = None, until: int | None = None
    ) -> Iterator[ProfileRow]:
        for row in self._rows("profiles", "*", {"vm": vm}, since, until):
            values = list(row)
            values[4] %= 1 << 64
            yield ProfileRow(*values)

    def vms(self) -> list[str]:
        """Names that anything is known of."""
        query = (
            "SELECT vm FROM states UNION SELECT vm FROM actions WHERE vm IS NOT NULL UNION SELECT vm FROM aggregates"
        )
        return sorted(row[0] for row in self._connection.execute(query))

    def span(self) -> tuple[int, int] | None:
        """The first and the last time in it; None if it is empty."""
        tables = ("actions", "states", "aggregates", "hosts")
        found = [self._connection.execute(f"SELECT min(time), max(time) FROM {table}").fetchone() for table in tables]
        known = [(row[0], row[1]) for row in found if row[0] is not None]
        return (min(first for first, _ in known), max(last for _, last in known)) if known else None

    def _rows(
        self, table: str, columns: str, wanted: Mapping[str, Any], since: int | None, until: int | None
    ) -> Iterator[sqlite3.Row]:
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
        return self._connection.execute(f"SELECT {columns} FROM {table}{where} ORDER BY time", values)

    def ends(self, *, since: int | None = None, until: int | None = None) -> Iterator[StateRow]:
        """The last state of each VM that has ended for good (not to be started again), in the order of their time."""
        query = (
            "SELECT * FROM states AS last WHERE state IN ('stopped', 'failed') AND time BETWEEN ? AND ? AND NOT EXISTS "
            "(SELECT 1 FROM states WHERE vm = last.vm AND session = last.session AND launch = last.launch "
            "AND time >= last.time AND rowid > last.rowid) ORDER BY time"
        )
        most = (1 << 63) - 1
        rows = self._connection.execute(query, (-1 if since is None else since, most if until is None else until))
        yield from (StateRow(*row) for row in rows)

    def moments(self, *, since: int | None = None, until: int | None = None) -> Iterator[tuple[int, int, float]]:
        """Session, time and interval of the aggregates, each once, in the order of their time."""
        query = (
            "SELECT min(session), max(session), time, interval FROM aggregates "
            "WHERE time = (SELECT min(time) FROM aggregates WHERE time > ?)"
        )
        last = -1 if since is None else since - 1
        while True:
            first, final, time, interval = self._connection.execute(query, (last,)).fetchone()
            if time is None or (until is not None and time > until):
                return
            if first == final:
                yield first, time, interval
            else:
                several = "SELECT session, time, max(interval) FROM aggregates WHERE time = ? GROUP BY session"
                yield from (tuple(row) for row in self.query(several, (time,)))
            last = time

    def moment(self, session: int, time: int, columns: str) -> list[tuple[Any, ...]]:
        """Columns of the aggregates of one moment, as they are: for those who read millions."""
        cursor = self._connection.cursor()
        cursor.row_factory = None
        query = f"SELECT {columns} FROM aggregates WHERE time = ? AND session = ?"
        return cursor.execute(query, (time, session)).fetchall()

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Any SELECT, for what is not foreseen here; `schema.py` has the tables. The file is open read-only."""
        return self._connection.execute(sql, values).fetchall()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: str | Path) -> JournalReader:
    """Open a journal to read.

    Raises:
        JournalError: there is none, or it is of another version; the message says what to do.
    """
    return JournalReader(connect(path, readonly=True))
