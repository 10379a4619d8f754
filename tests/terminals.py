"""A program at a real terminal (a pty), and a person who types and reads there."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DEADLINE = 60.0


class Seat:
    """A person at a terminal, with one program in its foreground."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""

        def take() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as at a login, also where the tests run under nohup
            fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

        files = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave, **options}
        self.process = subprocess.Popen(command, **files, start_new_session=True, preexec_fn=take)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def see(self, wanted: bytes, within: float = DEADLINE) -> bytes:
        """Read until the program has written that; what it wrote up to there."""
        end = time.monotonic() + within
        while wanted not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 4096)
        before, _, self.seen = self.seen.partition(wanted)
        return before

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def becomes_raw(self) -> None:
        end = time.monotonic() + DEADLINE
        while not self.is_raw:
            assert time.monotonic() < end
            select.select([], [], [], 0.01)

    def ended(self, within: float = DEADLINE) -> int:
        """Wait for its end: its exit status. The terminal is as it was."""
        status = self.process.wait(within)
        assert termios.tcgetattr(self.slave) == self.before
        return status


@contextmanager
def seat(command: list[str], **options: Any) -> Iterator[Seat]:
    one = Seat(command, **options)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        os.close(one.master)
        os.close(one.slave)
