"""Writes the journal, on a thread of its own: the fleet only appends to a queue, and no vCPU ever waits for a disk."""

from __future__ import annotations

import json
import logging
import platform
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

import attrs

from ..model.actions import Action, Applied
from ..model.codec import encode_parts
from ..model.journalspec import JournalSpec, JournalStatistics
from ..model.spec import GiB
from ..policy import Facts
from . import lock
from .schema import JournalError, connect, prepare

__all__ = ["Journal", "JournalStatistics"]

log: Final = logging.getLogger("orchestra.journal")

COMMIT_SECONDS: Final = 0.2
"""A kill -9 can lose the rows since the last commit. That is well under the second that is promised."""

QUEUE: Final = 200_000
"""Rows that may wait for the disk. Beyond it new rows are dropped and counted. Actions and states are dropped only
beyond twice that: the answers to "why?" need them most, and they are few."""

BATCH: Final = 10_000
"""Rows of one transaction. It bounds the memory of a batch, and the growth of the file between two looks at it."""

PRUNE_SECONDS: Final = 60.0
"""Seconds between two looks for rows that are too old. Rows are kept for days, so a minute is soon enough."""

PRUNED_ROWS: Final = 50_000
"""The most rows that are removed at a time, and half of a table at most: a transaction of removals stays short."""

WAL_PART: Final = 8
"""One part in so many of `keep_bytes` is left for the write-ahead log, which counts towards that bound too."""

_INSERTS: Final = {
    "actions": "INSERT INTO actions (session, time, kind, vm, tenant, policy, outcome, error, reason, evidence, "
    "details) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "states": "INSERT INTO states VALUES (?, ?, ?, ?, ?, ?, ?)",
    "aggregates": "INSERT INTO aggregates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "vcpus": "INSERT INTO vcpus VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "hosts": "INSERT INTO hosts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "profiles": "INSERT INTO profiles VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
}
_DEAR: Final = ("actions", "states")

Sample: TypeAlias = tuple[int, int, int, int, int, int, bytes]
"""rip, mode, cpl, space, samples, weight, code: columns of the table `profiles`."""


# Made once: `json.dumps` makes an encoder for each call with other than its default arguments, which costs more than
# the encoding itself.
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode


def _json(value: Any) -> str:
    if not value and type(value) is dict:  # the common case: most VMs are not throttled
        return "{}"
    return _encode(value)


def _as_data(action: Action) -> tuple[str, dict[str, Any]]:
    """An action's kind and fields as data. Evidence that has no form in JSON becomes text."""
    try:
        return encode_parts(action, str)
    except Exception as error:  # a cycle, or a str() that raises: the row is kept without its evidence
        return encode_parts(attrs.evolve(action, evidence={"unreadable": f"{type(error).__name__}: {error}"}))


def _mended(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row that SQLite refused, with its values changed as little as needed for SQLite to accept it."""
    return tuple(_mend(value) for value in row)


def _mend(value: Any) -> Any:
    if isinstance(value, str):  # a lone surrogate, for example from a file name
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return float(value)
    return value


class Journal:
    """The journal of one fleet at a time, for `open_fleet(journal=...)`, which opens and closes it.

    Parameters:
        path: the file. It is made if it is not there, and continued if it is.
        keep_days: rows that are older are removed.
        keep_bytes: beyond this size the oldest rows are removed. The file and its write-ahead log together stay below
            it, except for what is just being written, and while a reader holds the log.

    Raises:
        SpecError: a bound is out of its range.
        JournalError: the file can't be used. This is raised when the fleet is opened.
    """

    def __init__(self, path: str | Path, *, keep_days: float = 30.0, keep_bytes: int = 1 * GiB) -> None:
        JournalSpec(str(path), keep_days, keep_bytes)  # checks the bounds
        self.path = Path(path)
        self._keep_ns = round(keep_days * 86400e9)
        self._keep_bytes = keep_bytes
        self._queue: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._more = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._session = 0
        self._offset = self._ended = 0
        self._written = self._dropped = 0
        self._error: str | None = None
        self._absent: dict[str, str] | None = None
        self._lock = -1

    # ---- for the fleet

    def begin(self, now: int, backend: str, detection: str | None) -> None:
        """Begin a session for a fleet that opens. Blocks for some milliseconds.

        Parameters:
            now: nanoseconds on the fleet's clock.
            backend: the backend's name.
            detection: how the backend reports bus locks. None: it does not.

        Raises:
            JournalError: the file can't be opened, or another fleet writes this journal, in this or another process.
        """
        if self._thread is not None:
            raise JournalError(f"{self.path}: this Journal is in use by a fleet; give each its own")
        connection = connect(self.path, readonly=False)
        held = -1
        try:
            held = lock.take(self.path)
            prepare(connection)
            wall = time.time_ns()
            cursor = connection.execute(
                "INSERT INTO sessions (begun, host, backend, detection) VALUES (?, ?, ?, ?)",
                (wall, platform.node(), backend, detection),
            )
        except (sqlite3.Error, OSError) as error:
            connection.close()
            if held >= 0:
                lock.release(self.path, held)
            if isinstance(error, JournalError) and str(error).startswith(str(self.path)):
                raise
            raise JournalError(f"{self.path}: can't be written ({error})") from error
        self._session, self._offset, self._lock = int(cursor.lastrowid or 0), wall - now, held
        self._more.clear()
        self._closing, self._written, self._dropped, self._absent = False, 0, 0, None
        self._thread = threading.Thread(target=self._write, args=(connection,), name="journal", daemon=True)
        self._thread.start()

    def action(self, applied: Applied) -> None:
        """Record an action, whatever came of it. Without an action: record why a policy was switched off."""
        action: Action | None = applied.action
        kind, fields = ("PolicyError", {}) if action is None else _as_data(action)
        details = {name: fields[name] for name in fields if name not in ("vm", "tenant", "reason", "evidence")}
        if details.get("generation", 0) is None:  # the action names no generation, so the row has none
            del details["generation"]
        self._put(
            "actions",
            (
                self._session,
                applied.time + self._offset,
                kind,
                fields.get("vm"),
                fields.get("tenant"),
                applied.policy,
                applied.outcome,
                applied.error,
                fields.get("reason", ""),
                _json(fields.get("evidence", {})),
                _json(details),
            ),
        )

    def state(self, now: int, vm: str, generation: int, tenant: str, state: str, reason: str) -> None:
        """Record that a VM's state changed, at `now` on the fleet's clock."""
        self._put("states", (self._session, now + self._offset, vm, generation, tenant, state, reason))

    def aggregate(self, facts: Facts) -> None:
        """Record what the VMs did in an interval, and how the host was.

        All rows of the interval are kept or, if too many rows wait, none of them. With half of the rows, the other half
        of the VMs would seem to have been idle.
        """
        session, time, interval = self._session, facts.time + self._offset, facts.interval
        # Each row is one tuple, written out: this runs for each VM in each interval, on the fleet's thread.
        rows: list[tuple[str, tuple[Any, ...]]] = [
            (
                "aggregates",
                (
                    session,
                    time,
                    interval,
                    vm.name,
                    vm.generation,
                    vm.tenant,
                    vm.weight,
                    vm.vcpus,
                    vm.bus_locks,
                    vm.exits,
                    vm.throttled,
                    vm.cpu,
                    vm.run_delay,
                    vm.capped,
                    vm.work,
                    vm.dirty_pages,
                    _json(vm.by_reason),
                    _json(vm.throttled_by),
                ),
            )
            for vm in facts.vms.values()
        ]
        for vm in facts.vms.values():
            if vm.vcpus > 1:
                of = (session, time, interval, vm.name, vm.generation)
                for vcpu in vm.by_vcpu:
                    what = (vcpu.index, vcpu.bus_locks, vcpu.exits, vcpu.throttled, vcpu.cpu, vcpu.run_delay)
                    rows.append(("vcpus", (*of, *what, vcpu.capped)))
        host = facts.host
        pressures = (host.cpu_pressure, host.memory_pressure, host.io_pressure)
        rate, exit_rate = (None if limit is None else limit.rate for limit in (facts.limit, facts.exit_limit))
        was = (session, time, interval, host.cpus, *pressures, host.lock_ns, host.memory_ns)
        missing = None if dict(host.absent) == self._absent else _json(host.absent)
        rows.append(("hosts", (*was, rate, exit_rate, host.llc_bytes, host.memory_bandwidth, missing)))
        if len(self._queue) + len(rows) > QUEUE:
            self._dropped += len(rows)
            return
        self._absent = dict(host.absent)
        self._queue += rows

    def profile(self, now: int, vm: str, generation: int, rows: Iterable[Sample]) -> None:
        """Record bus locks that the profile sampled, at `now` on the fleet's clock."""
        for rip, mode, cpl, space, samples, weight, code in rows:
            signed = rip - (1 << 64) if rip >> 63 else rip  # SQLite's integers have a sign
            self._put(
                "profiles",
                (self._session, now + self._offset, vm, generation, signed, mode, cpl, space, samples, weight, code),
            )

    def end(self, now: int) -> None:
        """End the session: write the rows that wait, and close the file. Blocks until that is done.

        Rows that can't be written now are lost. They are counted as dropped, and the log says so.

        Parameters:
            now: nanoseconds on the fleet's clock.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ended = now + self._offset
        self._closing = True
        self._more.set()
        thread.join()
        lock.release(self.path, self._lock)
        self._dropped += len(self._queue)
        self._queue.clear()
        if self._dropped:
            why = f": {self._error}" if self._error else ""
            log.error("%s: %d rows of the journal are lost%s", self.path, self._dropped, why)

    def statistics(self) -> JournalStatistics:
        return JournalStatistics(self._written, len(self._queue), self._dropped, self._error)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(time.time_ns() - self._offset)

    def _put(self, table: str, row: tuple[Any, ...]) -> None:
        if len(self._queue) >= (2 * QUEUE if table in _DEAR else QUEUE):
            self._dropped += 1
            return
        self._queue.append((table, row))

    # ---- the thread

    def _write(self, connection: sqlite3.Connection) -> None:
        pruned = time.monotonic()
        while True:
            closing = self._closing  # read first: rows that were queued before it was set are written below
            try:
                while self._flush(connection):
                    self._shrink(connection)
                if time.monotonic() - pruned > PRUNE_SECONDS or closing:
                    pruned = time.monotonic()
                    self._forget(connection)
                self._report(None)
            except Exception as error:  # a full disk may have room again later: the rows wait, up to the bound
                self._report(str(error) or type(error).__name__)
            if closing:
                break
            self._more.wait(COMMIT_SECONDS)
        try:
            connection.execute("UPDATE sessions SET ended = ? WHERE id = ?", (self._ended, self._session))
            connection.close()
        except sqlite3.Error as error:
            self._report(str(error))

    def _report(self, error: str | None) -> None:
        """Note an error, or None for its end. Only a change is logged: a full disk would else fill the log as well."""
        before, self._error = self._error, error
        if error is not None and error != before:
            log.error("%s: the journal can't be written (%s); %d rows wait", self.path, error, len(self._queue))
        elif error is None and before is not None:
            log.warning("%s: the journal is written again; %d rows were dropped so far", self.path, self._dropped)

    def _flush(self, connection: sqlite3.Connection) -> bool:
        """Write a batch of the rows that wait. Returns whether there were any.

        If the transaction fails, the rows go back to the front of the queue, in their order.
        """
        queue = self._queue
        taken = [queue.popleft() for _ in range(min(len(queue), BATCH))]
        if not taken:
            return False
        rows: dict[str, list[tuple[Any, ...]]] = {}
        for table, row in taken:
            rows.setdefault(table, []).append(row)
        written = len(taken)
        try:
            connection.execute("BEGIN")
            try:
                for table, values in rows.items():
                    connection.executemany(_INSERTS[table], values)
            except Exception as error:
                if _is_of_the_file(error) or not connection.in_transaction:
                    raise
                connection.execute("ROLLBACK")
                connection.execute("BEGIN")
                written = sum(self._insert(connection, table, row) for table, row in taken)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            queue.extendleft(reversed(taken))
            raise
        self._written += written
        self._dropped += len(taken) - written
        return True

    def _insert(self, connection: sqlite3.Connection, table: str, row: tuple[Any, ...]) -> bool:
        """Write one row of a batch in which SQLite refused a row. Returns whether this row could be written."""
        why: Exception | None = None
        for mend in (False, True):
            try:
                connection.execute(_INSERTS[table], _mended(row) if mend else row)
            except Exception as error:
                if _is_of_the_file(error):
                    raise
                why = error
            else:
                return True
        log.error("%s: a row of %s can't be written and is dropped (%s): %.200r", self.path, table, why, row)
        return False

    # ---- bounds

    def _forget(self, connection: sqlite3.Connection) -> None:
        """Remove the rows that are too old."""
        oldest = time.time_ns() - self._keep_ns
        removed = [self._remove(connection, table, "time <= ?", oldest, oldest) for table in _INSERTS]
        if any(removed):
            self._give_back(connection)

    def _remove(self, connection: sqlite3.Connection, table: str, which: str, value: int, until: int) -> int:
        """Remove rows, and return how many. `until` is the time of the last one of them.

        The same transaction notes that time: else the journal would look as if there had never been such rows.
        """
        connection.execute("BEGIN")
        try:
            count = connection.execute(f"DELETE FROM {table} WHERE {which}", (value,)).rowcount
            if count:
                note = "INSERT INTO removed VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET until = max(until, ?)"
                connection.execute(note, (table, until, until))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return count

    def _shrink(self, connection: sqlite3.Connection) -> None:
        """While the file is too large, remove the oldest rows of the table that has most rows."""
        most = self._keep_bytes - self._keep_bytes // WAL_PART
        page = int(connection.execute("PRAGMA page_size").fetchone()[0])
        removed = False
        while True:
            pages = int(connection.execute("PRAGMA page_count").fetchone()[0])
            free = int(connection.execute("PRAGMA freelist_count").fetchone()[0])
            if (pages - free) * page <= most:
                break
            counts = {
                table: int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]) for table in _INSERTS
            }
            table = max(counts, key=counts.__getitem__)
            if counts[table] < 2:
                break
            going = min(PRUNED_ROWS, counts[table] // 2)
            order = f"FROM {table} ORDER BY time LIMIT"
            last = int(connection.execute(f"SELECT time {order} 1 OFFSET ?", (going - 1,)).fetchone()[0])
            self._remove(connection, table, f"rowid IN (SELECT rowid {order} ?)", going, last)
            removed = True
        if removed or pages * page > most:
            self._give_back(connection)
        elif self._log_bytes() > self._keep_bytes // WAL_PART:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _log_bytes(self) -> int:
        try:
            return self.path.with_name(f"{self.path.name}-wal").stat().st_size
        except FileNotFoundError:
            return 0

    def _give_back(self, connection: sqlite3.Connection) -> None:
        connection.executescript("PRAGMA incremental_vacuum")  # execute() would do one step of it only: one page
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _is_of_the_file(error: Exception) -> bool:
    """Whether an error is about the file (a full disk, a lock, damage). Then no row is to blame, and all may be written
    later."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
