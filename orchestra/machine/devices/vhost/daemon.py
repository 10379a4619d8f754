"""A back-end that is a process of ours: begun, listened to, ended. It never outlives the thread that began it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from ....model.errors import ResourceLimit, VhostUserError
from ....native import ffi, lib

__all__ = ["Daemon"]

WORDS: Final = 4096
"""Bytes of its output that are kept, the last ones: an error message, and what led to it."""

PIPE: Final = 1 << 16
"""Bytes that a pipe holds (pipe(7)): one read takes all."""

PATIENCE: Final = 30.0
"""Seconds for its orderly end, in which it finishes requests and writes what it has of the image in memory."""


class Daemon:
    """A process. For the thread that began it: it gets SIGTERM when that thread, or this process, ends in whatever way.

    Attributes:
        pidfd: readable once it has ended.
        output: what it prints; non-blocking.

    Parameters:
        command: the program, found by its path, and its arguments.
        keep: descriptors of ours that it gets, under their numbers.

    Raises:
        VhostUserError: there is no such program, or it can't be executed.
        ResourceLimit: the host has no more of what that takes.
    """

    def __init__(self, command: Sequence[str], keep: Sequence[int]) -> None:
        words = [ffi.new("char[]", os.fsencode(word)) for word in command]
        pidfd = ffi.new("int *")
        self.output, end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(end, True)
        try:
            pid = lib.orc_spawn(words[0], [*words, ffi.NULL], list(keep), len(keep), end, signal.SIGTERM, pidfd)
        finally:
            os.close(end)
        if pid < 0:
            os.close(self.output)
            if -pid in (11, 12, 23, 24):  # EAGAIN, ENOMEM, ENFILE, EMFILE
                raise ResourceLimit(-pid, f"{command[0]} can't be started: see ulimit -u and ulimit -n")
            raise VhostUserError(f"{command[0]}: can't be started: {os.strerror(-pid)}")
        self.pid, self.pidfd = pid, pidfd[0]
        self._words = b""
        self._how: str | None = None
        self._closed = False

    def read(self) -> bool:
        """Take what it has printed. False: it prints nothing any more."""
        try:
            more = os.read(self.output, PIPE)
        except BlockingIOError:
            return True
        self._words = (self._words + more)[-WORDS:]
        return bool(more)

    @property
    def words(self) -> str:
        """The last lines that it printed."""
        return self._words.decode(errors="replace").strip()

    def has_ended(self, within: float) -> bool:
        """Whether it has ended by itself, or does within that many seconds."""
        return self._how is not None or self._wait(within)

    @property
    def how(self) -> str:
        """How it ended: "exit status 1", "signal 9"."""
        return self._how or "it goes on"

    def end(self, patience: float = PATIENCE) -> None:
        """End it, by force if it takes longer than that many seconds. Closes all; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._how is None:
            for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, PATIENCE)):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, number)
                if self._wait(seconds):
                    break
            self._take()
        os.close(self.pidfd)
        os.close(self.output)

    def _wait(self, seconds: float) -> bool:
        """Wait for its end, and listen meanwhile: a full pipe would make it wait. False: it goes on."""
        deadline, waited = time.monotonic() + seconds, select.poll()
        waited.register(self.pidfd, select.POLLIN)
        waited.register(self.output, select.POLLIN)
        while True:
            ready = dict(waited.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if self.output in ready and not self.read():
                waited.unregister(self.output)
            if self.pidfd in ready:
                self._take()
                return True
            if time.monotonic() >= deadline:
                return False

    def _take(self) -> None:
        """Its exit status, which the kernel keeps for us; and the last that it printed."""
        if self._how is not None:
            return
        try:
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # the program ignores SIGCHLD, so the kernel keeps nothing
            self._how = "exit status unknown"
        else:
            if found is None:
                self._how = "not even by SIGKILL: it waits in the kernel"
                return
            kind = "exit status" if found.si_code == os.CLD_EXITED else "signal"
            self._how = f"{kind} {found.si_status}"
        self.read()
