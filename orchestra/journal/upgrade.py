"""Brings a journal that an older orchestra wrote to the newest version."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from . import lock, schema
from .schema import EMPTY, JournalError, connect, prepare

__all__ = ["upgrade"]


def upgrade(path: str | Path) -> tuple[int, int]:
    """Bring a journal to the newest version. Returns the versions before and after.

    Raises:
        JournalError: there is no such journal, it can't be written, or a fleet writes it: its rows would no longer fit
            the tables.
    """
    path = Path(path)
    if not path.exists():
        raise JournalError(f"{path}: no such journal")
    connection = connect(path, readonly=False)
    try:
        before = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if not before:
            raise JournalError(f"{path}: {EMPTY}")
        if before != schema.VERSION:
            held = lock.take(path, "close that fleet first")
            try:
                prepare(connection)
            finally:
                lock.release(path, held)
    except sqlite3.Error as error:
        raise JournalError(f"{path}: can't be upgraded ({error})") from error
    except OSError as error:
        if isinstance(error, JournalError):
            raise
        raise JournalError(f"{path}: can't be upgraded ({error})") from error
    finally:
        connection.close()
    return before, schema.VERSION
