"""One writer for a journal: a lock on a file beside it. The kernel releases the lock when its process ends, even by
a kill -9, so no lock is ever left behind."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from .schema import JournalError

__all__ = ["release", "take"]


def _beside(path: Path) -> Path:
    # A file of its own: SQLite's locks on the database are POSIX locks, which are all lost when any descriptor of the
    # file is closed by this process (https://www.sqlite.org/howtocorrupt.html, section 2.2).
    return path.with_name(f"{path.name}-lock")


def take(path: Path, remedy: str = "give each a file of its own") -> int:
    """Become the writer of a journal. Returns the descriptor for `release`.

    Parameters:
        remedy: what the error says to do.

    Raises:
        JournalError: another fleet writes this journal.
        OSError: the lock's file can't be made.
    """
    beside = _beside(path.resolve())
    while True:
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise JournalError(f"{path}: another fleet writes this journal; {remedy}") from None
        if _is_still(fd, beside):
            return fd
        os.close(fd)  # the previous writer removed the file between our two calls


def _is_still(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def release(path: Path, fd: int) -> None:
    """Stop being the writer, so that another fleet can write."""
    _beside(path.resolve()).unlink(missing_ok=True)  # before the lock is released: no other writer can hold it yet
    os.close(fd)
