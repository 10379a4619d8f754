"""The journal's tables, the version of the file, and the steps from one version to the next.

The file is SQLite in WAL mode. Readers never wait for the writer, and a process that is killed loses only what it had
not committed (https://www.sqlite.org/wal.html). All times are nanoseconds since the epoch.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ..model.errors import OrchestraError

__all__ = ["APPLICATION", "EMPTY", "VERSION", "JournalError", "connect", "prepare", "unreadable"]

APPLICATION: Final = 0x6F726368  # "orch", in the file's header: `file fleet.db` and we can tell it from other databases
BUSY_SECONDS: Final = 5.0
"""How long SQLite waits for a lock of another process before it gives up; the same as the default of `sqlite3`."""


class JournalError(OrchestraError, OSError):
    """A journal can't be opened, read or written; the message names the file and the remedy."""


_FIRST: Final = """
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY, begun INTEGER NOT NULL, ended INTEGER, host TEXT NOT NULL, backend TEXT NOT NULL,
    detection TEXT);
CREATE TABLE actions (
    id INTEGER PRIMARY KEY, session INTEGER NOT NULL, time INTEGER NOT NULL, kind TEXT NOT NULL, vm TEXT, tenant TEXT,
    policy TEXT, outcome TEXT NOT NULL, error TEXT, reason TEXT NOT NULL, evidence TEXT NOT NULL,
    details TEXT NOT NULL);
CREATE INDEX actions_by_time ON actions (time);
CREATE INDEX actions_by_vm ON actions (vm, time);
CREATE TABLE states (
    session INTEGER NOT NULL, time INTEGER NOT NULL, vm TEXT NOT NULL, launch INTEGER NOT NULL, tenant TEXT NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL);
CREATE INDEX states_by_time ON states (time);
CREATE INDEX states_by_vm ON states (vm, time);
CREATE TABLE aggregates (
    session INTEGER NOT NULL, time INTEGER NOT NULL, interval REAL NOT NULL, vm TEXT NOT NULL, launch INTEGER NOT NULL,
    tenant TEXT NOT NULL, weight REAL NOT NULL, vcpus INTEGER NOT NULL, bus_locks INTEGER, exits INTEGER NOT NULL,
    throttled REAL NOT NULL, cpu REAL, run_delay REAL, capped REAL, work REAL);
CREATE INDEX aggregates_by_time ON aggregates (time);
CREATE INDEX aggregates_by_vm ON aggregates (vm, time);
CREATE TABLE hosts (
    session INTEGER NOT NULL, time INTEGER NOT NULL, interval REAL NOT NULL, cpus INTEGER NOT NULL, cpu_pressure REAL,
    memory_pressure REAL, io_pressure REAL, lock_ns REAL, memory_ns REAL, rate REAL);
CREATE INDEX hosts_by_time ON hosts (time);
CREATE TABLE profiles (
    session INTEGER NOT NULL, time INTEGER NOT NULL, vm TEXT NOT NULL, launch INTEGER NOT NULL, rip INTEGER NOT NULL,
    mode INTEGER NOT NULL, cpl INTEGER NOT NULL, space INTEGER NOT NULL, samples INTEGER NOT NULL,
    weight INTEGER NOT NULL, code BLOB NOT NULL);
CREATE INDEX profiles_by_time ON profiles (time);
CREATE INDEX profiles_by_vm ON profiles (vm, time);
"""

_SECOND: Final = """
ALTER TABLE aggregates ADD COLUMN dirty_pages INTEGER;
ALTER TABLE aggregates ADD COLUMN by_reason TEXT;
ALTER TABLE hosts ADD COLUMN exit_rate REAL;
ALTER TABLE hosts ADD COLUMN llc_bytes REAL;
ALTER TABLE hosts ADD COLUMN memory_bandwidth REAL;
ALTER TABLE hosts ADD COLUMN absent TEXT;
CREATE TABLE vcpus (
    session INTEGER NOT NULL, time INTEGER NOT NULL, interval REAL NOT NULL, vm TEXT NOT NULL, launch INTEGER NOT NULL,
    vcpu INTEGER NOT NULL, bus_locks INTEGER, exits INTEGER NOT NULL, throttled REAL NOT NULL, cpu REAL,
    run_delay REAL, capped REAL);
CREATE INDEX vcpus_by_time ON vcpus (time);
CREATE INDEX vcpus_by_vm ON vcpus (vm, time);
"""

_THIRD: Final = """
ALTER TABLE aggregates ADD COLUMN throttled_by TEXT;
CREATE TABLE removed (name TEXT PRIMARY KEY, until INTEGER NOT NULL);
"""


def _fourth(connection: sqlite3.Connection) -> None:
    """The number that distinguishes VMs of one name is called `generation`, and was called `launch`."""
    for table in ("states", "aggregates", "profiles", "vcpus"):
        connection.execute(f"ALTER TABLE {table} RENAME COLUMN launch TO generation")
    # In Python and not with SQLite's JSON functions, which before 3.38 a build may lack. Only the key of the action
    # itself and of its evidence: a policy in a row about a reload may have a parameter of the old name.
    renamed = []
    for row in connection.execute("SELECT id, evidence, details FROM actions"):
        texts = [_rename(row["evidence"]), _rename(row["details"])]
        if texts != [row["evidence"], row["details"]]:
            renamed.append((*texts, row["id"]))
    connection.executemany("UPDATE actions SET evidence = ?, details = ? WHERE id = ?", renamed)


def _rename(text: str) -> str:
    if '"launch"' not in text:  # most rows: not worth parsing
        return text
    try:
        found = json.loads(text)
    except ValueError:  # damaged: a reader says so when it comes to this row, and the others can be read
        return text
    if not isinstance(found, dict) or "launch" not in found:
        return text
    # The keys keep their order, as `orchestra why` lists evidence in the order in which the policy wrote it.
    return json.dumps({"generation" if k == "launch" else k: v for k, v in found.items()}, separators=(",", ":"))


_ANSWERS: Final = "ALTER TABLE aggregates ADD COLUMN answers INTEGER;"

_MIGRATIONS: Final[Sequence[Callable[[sqlite3.Connection], object]]] = (
    lambda connection: _run(connection, _FIRST),
    lambda connection: _run(connection, _SECOND),
    lambda connection: _run(connection, _THIRD),
    _fourth,
    lambda connection: _run(connection, _ANSWERS),
)
"""Entry n makes version n + 1 of version n. Append entries and never change one: files of every version exist."""

VERSION: Final = len(_MIGRATIONS)

EMPTY: Final = "empty: no fleet has written to it yet, or it was copied without its -wal"


def unreadable(path: str | Path, error: Exception) -> JournalError:
    return JournalError(
        f"{path}: can't be read ({error}); if it is damaged, `sqlite3 {path} .recover` may save some of it"
    )


def _run(connection: sqlite3.Connection, script: str) -> None:
    for statement in script.split(";"):  # not executescript(), which would commit the transaction that is open
        if statement.strip():
            connection.execute(statement)


def _mode(path: Path) -> str:
    """How to open a file to read it.

    Readers of a file in WAL mode share memory, in files beside it. The last process that closes the file removes these
    files, but only if that process may write; a reader that may not would leave them behind. So a reader that may write
    opens the file for writing (and `connect` forbids it to write). If the reader may not write and the file was closed
    in good order, it is opened as a file that no process writes, which needs no files beside it.
    """
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        return "mode=rw"
    return "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "mode=ro&immutable=1"


def connect(path: str | Path, *, readonly: bool) -> sqlite3.Connection:
    """Open a journal's file, and check that it is a journal of a version that can be read.

    Parameters:
        readonly: False: the file is made if it is not there.

    Raises:
        JournalError: the file is not there, is no journal, is of another version, or may not be opened.
    """
    path = Path(path)
    try:
        if readonly and not path.exists():
            raise JournalError(
                f"{path}: no such journal; a fleet writes one if it is opened with journal={str(path)!r}"
            )
        if path.is_dir():
            raise JournalError(f"{path}: {os.strerror(errno.EISDIR)}")
        uri = f"{path.resolve().as_uri()}?{_mode(path.resolve()) if readonly else 'mode=rwc'}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, JournalError):
            raise
        raise JournalError(f"{path}: can't be opened ({error}); is its folder there, and may it be written?") from error
    connection.row_factory = sqlite3.Row
    try:
        if readonly:
            connection.execute("PRAGMA query_only = ON")
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
        application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    except sqlite3.Error as error:
        connection.close()
        if readonly and "unable to open" in str(error):
            raise JournalError(
                f"{path}: can't be opened ({error}); it was not put away in good order (its -wal is there), and its "
                "folder can't be written: copy both files to one that can"
            ) from error
        if "malformed" in str(error):
            raise unreadable(path, error) from error
        raise JournalError(f"{path}: no journal ({error}); choose another file") from error
    if (version or tables) and application != APPLICATION:
        connection.close()
        raise JournalError(f"{path}: a database, but no journal of orchestra's; choose another file")
    if version > VERSION:
        connection.close()
        raise JournalError(
            f"{path}: written by a newer orchestra (version {version}, this one knows {VERSION}): upgrade it"
        )
    if readonly and not version:
        connection.close()
        raise JournalError(f"{path}: {EMPTY}")
    if readonly and version < VERSION:
        connection.close()
        raise JournalError(
            f"{path}: of version {version}: a fleet that writes to it, or `orchestra journal --upgrade`, upgrades it"
        )
    return connection


def prepare(connection: sqlite3.Connection) -> None:
    """Bring a file that may be written to the newest version, in one transaction."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if not version:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only before the first table; pruning gives pages back
    connection.execute("PRAGMA journal_mode = WAL")
    # A commit survives the death of the process. If the host dies, what was written since the last checkpoint is lost.
    connection.execute("PRAGMA synchronous = NORMAL")
    # Rows of an interval change pages all over an index by VM. So the pages are kept in memory, and copied to the file
    # once for many changes: 16 MB of cache, and as much of log (4000 pages), as fleets of thousands of VMs write some
    # MB a second. A small `keep_bytes` ends the log sooner (`_shrink` of writer.py).
    connection.execute("PRAGMA cache_size = -16000")
    connection.execute("PRAGMA wal_autocheckpoint = 4000")
    if version == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for migrate in _MIGRATIONS[version:]:
            migrate(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
