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
"""What a kill -9 can lose is what came since the last commit: well under the second that is promised."""

QUEUE: Final = 200_000
"""Rows that may wait for the disk; beyond it new ones are dropped and counted: actions and states beyond twice that."""

BATCH: Final = 10_000
"""Rows of one transaction: what is taken up at once in memory, and by how much the file can grow between two looks."""

PRUNE_SECONDS: Final = 60.0
PRUNED_ROWS: Final = 50_000
"""At most so many at a time, and at most half of a table."""

WAL_PART: Final = 8
"""The part of a file's bytes that is left for its write-ahead log."""

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
"""rip, mode, cpl, space, samples, weight, code: as the table `profiles` has them."""


# Made once: json.dumps makes one for each call that asks for more than its defaults, which costs more than the rest.
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode


def _json(value: Any) -> str:
    if not value and type(value) is dict:  # of a VM that nobody throttles, for instance
        return "{}"
    return _encode(value)


def _told(action: Action) -> tuple[str, dict[str, Any]]:
    """An action's kind and fields as data, what JSON has no form for in its evidence as text."""
    try:
        return encode_parts(action, str)
    except Exception as error:  # a cycle, a str() that raises: the action itself is worth more
        return encode_parts(attrs.evolve(action, evidence={"unreadable": f"{type(error).__name__}: {error}"}))


def _mended(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row that SQLite would not take, as near to it as can be."""
    return tuple(_mend(value) for value in row)


def _mend(value: Any) -> Any:
    if isinstance(value, str):  # a lone surrogate, of a file name for instance
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return float(value)
    return value


class Journal:
    """The journal of one fleet at a time, for `open_fleet(journal=...)`, which opens and closes it.

    Parameters:
        path: the file; made if it is not there, continued if it is.
        keep_days: older rows are removed.
        keep_bytes: beyond this the oldest rows are removed. The file and its write-ahead log together stay below it,
            but for what is just being written, or if a reader holds the log.

    Raises:
        SpecError: a bound that can't be.
        JournalError: (when the fleet is opened) the file can't be.
    """

    def __init__(self, path: str | Path, *, keep_days: float = 30.0, keep_bytes: int = 1 * GiB) -> None:
        JournalSpec(str(path), keep_days, keep_bytes)  # it checks them
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
        """A fleet opens; `now` is its clock. Blocks for some milliseconds.

        Raises:
            JournalError: the file can't be opened, or another fleet writes this journal, of whatever process.
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
        """An action, whatever came of it; or (without one) why a policy was switched off."""
        action: Action | None = applied.action
        kind, fields = ("PolicyError", {}) if action is None else _told(action)
        details = {name: fields[name] for name in fields if name not in ("vm", "tenant", "reason", "evidence")}
        if details.get("launch", 0) is None:  # whoever had the name
            del details["launch"]
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

    def state(self, now: int, vm: str, launch: int, tenant: str, state: str, reason: str) -> None:
        """A VM's state changed."""
        self._put("states", (self._session, now + self._offset, vm, launch, tenant, state, reason))

    def aggregate(self, facts: Facts) -> None:
        """What the VMs did in an interval, and how the host was: all of it is kept or, where too much waits, nothing.
        Half of it would read as if the other half of the VMs had done nothing."""
        session, time, interval = self._session, facts.time + self._offset, facts.interval
        # A row is one display: this runs for each VM of a fleet at each interval, on the fleet's thread.
        rows: list[tuple[str, tuple[Any, ...]]] = [
            (
                "aggregates",
                (
                    session,
                    time,
                    interval,
                    vm.name,
                    vm.launch,
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
                of = (session, time, interval, vm.name, vm.launch)
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

    def profile(self, now: int, vm: str, launch: int, rows: Iterable[Sample]) -> None:
        """Bus locks that were sampled."""
        for rip, mode, cpl, space, samples, weight, code in rows:
            signed = rip - (1 << 64) if rip >> 63 else rip  # SQLite's integers have a sign
            self._put(
                "profiles",
                (self._session, now + self._offset, vm, launch, signed, mode, cpl, space, samples, weight, code),
            )

    def end(self, now: int) -> None:
        """The fleet is gone: write what waits, and close. Blocks until that is done.

        What can't be written now never will be: it is counted as dropped, and told in the log.
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
            closing = self._closing  # read first: what is queued before it was set is written below
            try:
                while self._flush(connection):
                    self._shrink(connection)
                if time.monotonic() - pruned > PRUNE_SECONDS or closing:
                    pruned = time.monotonic()
                    self._forget(connection)
                self._tell(None)
            except Exception as error:  # a full disk may have room again: what waits stays, up to the bound
                self._tell(str(error) or type(error).__name__)
            if closing:
                break
            self._more.wait(COMMIT_SECONDS)
        try:
            connection.execute("UPDATE sessions SET ended = ? WHERE id = ?", (self._ended, self._session))
            connection.close()
        except sqlite3.Error as error:
            self._tell(str(error))

    def _tell(self, error: str | None) -> None:
        """What goes wrong from now on; None: nothing. Each change is logged once."""
        before, self._error = self._error, error
        if error is not None and error != before:
            log.error("%s: the journal can't be written (%s); %d rows wait", self.path, error, len(self._queue))
        elif error is None and before is not None:
            log.warning("%s: the journal is written again; %d rows were dropped so far", self.path, self._dropped)

    def _flush(self, connection: sqlite3.Connection) -> bool:
        """Write some of what waits; whether there was any."""
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
        """Write one row of a batch in which there is one that can't be; whether it could."""
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
        """Remove what is too old."""
        oldest = time.time_ns() - self._keep_ns
        removed = [self._remove(connection, table, "time <= ?", oldest, oldest) for table in _INSERTS]
        if any(removed):
            self._give_back(connection)

    def _remove(self, connection: sqlite3.Connection, table: str, which: str, value: int, until: int) -> int:
        """Remove rows, the last of which is of the time `until`, and note that: else it would look as if there had been
        none. How many there were."""
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
        """While the file is too large, remove the oldest of what there is most of."""
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
        connection.executescript("PRAGMA incremental_vacuum")  # execute() takes one step of it: one page
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _is_of_the_file(error: Exception) -> bool:
    """A full disk, a file that is locked or broken: no row is to blame, and all of them may be written later."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
