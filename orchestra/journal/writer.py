"""Writes the journal, on a thread of its own: the fleet only appends to a queue, and no vCPU ever waits for a disk."""

from __future__ import annotations

import json
import platform
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeAlias

import attrs

from ..actions import Action, Applied
from ..errors import SpecError
from ..policy import Facts
from ..spec import GiB, MiB
from .schema import JournalError, connect, prepare

__all__ = ["Journal", "JournalStatistics"]

COMMIT_SECONDS: Final = 0.2
"""What a kill -9 can lose is what came since the last commit: well under the second that is promised."""

QUEUE: Final = 200_000
"""Rows that may wait for the disk; beyond it aggregates are dropped and counted, actions and states never."""

PRUNE_SECONDS: Final = 60.0
PRUNED_ROWS: Final = 50_000

_INSERTS: Final = {
    "actions": "INSERT INTO actions (session, time, kind, vm, tenant, policy, outcome, error, reason, evidence, "
    "details) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "states": "INSERT INTO states VALUES (?, ?, ?, ?, ?, ?, ?)",
    "aggregates": "INSERT INTO aggregates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "hosts": "INSERT INTO hosts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "profiles": "INSERT INTO profiles VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
}
_NEVER_DROPPED: Final = ("actions", "states")

Sample: TypeAlias = tuple[int, int, int, int, int, int, bytes]
"""rip, mode, cpl, space, samples, weight, code: as the table `profiles` has them."""


@attrs.frozen
class JournalStatistics:
    """Rows written, rows that wait, and rows that were dropped as the disk was too slow; and what went wrong last."""

    written: int
    waiting: int
    dropped: int
    error: str | None


def _plain(value: Any) -> Any:
    """What JSON has no form for, as text; limits and the like by their fields."""
    return attrs.asdict(value) if attrs.has(type(value)) else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain, separators=(",", ":"))


class Journal:
    """The journal of one fleet at a time, for `open_fleet(journal=...)`, which opens and closes it.

    Parameters:
        path: the file; made if it is not there, continued if it is.
        keep_days: older rows are removed.
        keep_bytes: beyond this the oldest rows are removed.

    Raises:
        SpecError: a bound that can't be.
        JournalError: (when the fleet is opened) the file can't be.
    """

    def __init__(self, path: str | Path, *, keep_days: float = 30.0, keep_bytes: int = 1 * GiB) -> None:
        if not 0 < keep_days <= 36500:
            raise SpecError(f"keep_days={keep_days!r}: must be more than 0 and at most 36500")
        if not MiB <= keep_bytes <= 1 << 46:
            raise SpecError(f"keep_bytes={keep_bytes!r}: must be 1 MiB at least")
        self.path = Path(path)
        self._keep_ns = round(keep_days * 86400e9)
        self._keep_bytes = keep_bytes
        self._queue: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._more = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._session = 0
        self._offset = 0
        self._written = self._dropped = 0
        self._error: str | None = None

    # ---- for the fleet

    def begin(self, now: int, backend: str, detection: str | None) -> None:
        """A fleet opens; `now` is its clock. Blocks for some milliseconds.

        Raises:
            JournalError: the file can't be opened, or another fleet writes this journal.
        """
        if self._thread is not None:
            raise JournalError(f"{self.path}: this Journal is in use by a fleet; give each its own")
        connection = connect(self.path, readonly=False)
        try:
            prepare(connection)
            wall = time.time_ns()
            cursor = connection.execute(
                "INSERT INTO sessions (begun, host, backend, detection) VALUES (?, ?, ?, ?)",
                (wall, platform.node(), backend, detection),
            )
        except (sqlite3.Error, JournalError) as error:
            connection.close()
            raise JournalError(f"{self.path}: can't be written ({error})") from error
        self._session, self._offset = int(cursor.lastrowid or 0), wall - now
        self._closing = False
        self._thread = threading.Thread(target=self._write, args=(connection,), name="journal", daemon=True)
        self._thread.start()

    def action(self, applied: Applied) -> None:
        """An action, whatever came of it; or (without one) why a policy was switched off."""
        action: Action | None = applied.action
        fields: Mapping[str, Any] = {} if action is None else attrs.asdict(action, recurse=False)
        details = {name: fields[name] for name in fields if name not in ("vm", "tenant", "reason", "evidence")}
        if details.get("launch", 0) is None:  # whoever had the name
            del details["launch"]
        self._put(
            "actions",
            (
                self._session,
                applied.time + self._offset,
                "PolicyError" if action is None else type(action).__name__,
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
        """What the VMs did in an interval, and how the host was."""
        time = facts.time + self._offset
        for vm in facts.vms.values():
            row = (vm.name, vm.launch, vm.tenant, vm.weight, vm.vcpus, vm.bus_locks, vm.exits, vm.throttled)
            absent = (vm.cpu, vm.run_delay, vm.capped, vm.work, vm.dirty_pages)  # what may be
            self._put("aggregates", (self._session, time, facts.interval, *row, *absent))
        host, limit = facts.host, facts.limit
        pressures = (host.cpu_pressure, host.memory_pressure, host.io_pressure)
        rate = None if limit is None else limit.rate
        self._put(
            "hosts",
            (self._session, time, facts.interval, host.cpus, *pressures, host.lock_ns, host.memory_ns, rate),
        )

    def profile(self, now: int, vm: str, launch: int, rows: Iterable[Sample]) -> None:
        """Bus locks that were sampled."""
        for rip, mode, cpl, space, samples, weight, code in rows:
            signed = rip - (1 << 64) if rip >> 63 else rip  # SQLite's integers have a sign
            self._put(
                "profiles",
                (self._session, now + self._offset, vm, launch, signed, mode, cpl, space, samples, weight, code),
            )

    def end(self, now: int) -> None:
        """The fleet is gone: write what waits, and close. Blocks until that is done."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._closing = True
            self._more.set()
            thread.join()

    def statistics(self) -> JournalStatistics:
        return JournalStatistics(self._written, len(self._queue), self._dropped, self._error)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(0)

    def _put(self, table: str, row: tuple[Any, ...]) -> None:
        if len(self._queue) >= QUEUE and table not in _NEVER_DROPPED:
            self._dropped += 1
            return
        self._queue.append((table, row))

    # ---- the thread

    def _write(self, connection: sqlite3.Connection) -> None:
        pruned = time.monotonic()
        while True:
            closing = self._closing  # read first: what is queued before it was set is written below
            try:
                self._flush(connection)
                if time.monotonic() - pruned > PRUNE_SECONDS or closing:
                    pruned = time.monotonic()
                    self._prune(connection)
                self._error = None
            except sqlite3.Error as error:  # a full disk may have room again: what waits stays, up to the bound
                self._error = str(error)
            if closing:
                break
            self._more.wait(COMMIT_SECONDS)
        try:
            connection.execute("UPDATE sessions SET ended = ? WHERE id = ?", (time.time_ns(), self._session))
        except sqlite3.Error as error:
            self._error = str(error)
        connection.close()

    def _flush(self, connection: sqlite3.Connection) -> None:
        queue, count = self._queue, len(self._queue)
        if not count:
            return
        rows: dict[str, list[tuple[Any, ...]]] = {}
        taken = [queue.popleft() for _ in range(count)]
        for table, row in taken:
            rows.setdefault(table, []).append(row)
        try:
            connection.execute("BEGIN")
            for table, values in rows.items():
                connection.executemany(_INSERTS[table], values)
            connection.execute("COMMIT")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            queue.extendleft(reversed(taken))
            raise
        self._written += count

    def _prune(self, connection: sqlite3.Connection) -> None:
        """Remove what is too old; and, while the file is too large, the oldest of what there is most of."""
        oldest = time.time_ns() - self._keep_ns
        for table in _INSERTS:
            connection.execute(f"DELETE FROM {table} WHERE time < ?", (oldest,))
        page = int(connection.execute("PRAGMA page_size").fetchone()[0])
        while True:
            pages = int(connection.execute("PRAGMA page_count").fetchone()[0])
            free = int(connection.execute("PRAGMA freelist_count").fetchone()[0])
            if (pages - free) * page <= self._keep_bytes:
                break
            removed = 0
            for table in ("aggregates", "hosts", "profiles", "states", "actions"):
                newest_to_go = connection.execute(
                    f"SELECT time FROM {table} ORDER BY time LIMIT 1 OFFSET ?", (PRUNED_ROWS,)
                ).fetchone()
                if newest_to_go is not None:
                    removed += connection.execute(f"DELETE FROM {table} WHERE time <= ?", (newest_to_go[0],)).rowcount
            if not removed:
                break
        connection.executescript("PRAGMA incremental_vacuum")  # execute() takes one step of it: one page
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
