"""What is typed for a guest: from a terminal, which is raw meanwhile, or from a pipe or file.

    terminal ──→ escape keys are taken out ──→ a bounded queue ──→ console     a full queue drops what is typed
    pipe, file ───────────────────────────────────────────────→ console     waits until the guest has taken it

A terminal is raw only while this program is in its foreground and runs. It is restored before each stop and at each
end, except for SIGKILL and SIGSTOP, which nothing can catch.
"""

from __future__ import annotations

import os
import signal
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import trio

from ..machine.devices.console import Console
from ..model.errors import StateError

__all__ = ["Terminal", "type_from"]

READ: Final = 4096
QUEUED: Final = 64
"""Reads that wait for the guest. A guest that takes no input has 4 KiB in its console as well; what comes then is
dropped, so that the escape key is always read."""


class Terminal:
    """A terminal that is raw within `raw`.

    Parameters:
        fd: a descriptor for which `os.isatty` is true.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        # As it was first: a shell may bring it back to us as raw as we were when we were stopped.
        self._settings: list[Any] | None = None
        self._is_raw = False
        self._changed = trio.Event()

    @property
    def is_ours(self) -> bool:
        """Whether this program is in its foreground. Otherwise to change or read it would stop the program."""
        try:
            return os.tcgetpgrp(self.fd) == os.getpgrp()
        except OSError:
            return True  # not the terminal of our session: there is no job control on it

    async def wait_ours(self) -> None:
        while not self.is_ours:
            await self._changed.wait()

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Make it raw, and what it was at the end."""
        try:
            self._enter()
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        if self._is_raw or not self.is_ours:
            return
        with suppress(termios.error):  # hung up
            self._settings = self._settings or termios.tcgetattr(self.fd)
            iflag, oflag, cflag, lflag, *speeds, cc = self._settings
            cc = list(cc)
            # As cfmakeraw(3), but output is processed: for our own lines, and for guests that write bare line feeds.
            iflag &= ~(
                termios.IGNBRK
                | termios.BRKINT
                | termios.PARMRK
                | termios.ISTRIP
                | termios.INLCR
                | termios.IGNCR
                | termios.ICRNL
                | termios.IXON
            )
            lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
            cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            cc[termios.VMIN], cc[termios.VTIME] = 1, 0
            # NOW and not DRAIN: output that nobody takes must not keep us.
            termios.tcsetattr(self.fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, *speeds, cc])
            self._is_raw = True

    def _leave(self) -> None:
        was_raw, self._is_raw = self._is_raw, False
        if was_raw and self._settings is not None and self.is_ours:  # else it is as its foreground program wants it
            with suppress(termios.error):
                termios.tcsetattr(self.fd, termios.TCSANOW, self._settings)

    async def follow(
        self, resized: Callable[[int, int], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Restore it before a stop (SIGTSTP), and make it raw again when the program goes on. Say how large it is.

        Parameters:
            resized: called with columns and rows: at first, and when they may have changed.
        """
        watched = [signal.SIGCONT, signal.SIGWINCH]
        if signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN:
            watched.append(signal.SIGTSTP)
        with trio.open_signal_receiver(*watched) as signals:
            self._tell_size(resized)
            task_status.started()
            async for one in signals:
                if one != signal.SIGWINCH:
                    self._was_stopped(first=one == signal.SIGTSTP)
                self._tell_size(resized)  # also after a stop: in the background, SIGWINCH goes to others

    def _was_stopped(self, *, first: bool) -> None:
        """`first`: it is to be stopped now."""
        self._leave()
        if first:
            os.kill(os.getpid(), signal.SIGSTOP)  # the shell sees it as the stop that it asked for
        # A shell may have changed it. After a SIGSTOP, which nobody sees, it was not even restored.
        self._enter()
        self._changed.set()
        self._changed = trio.Event()

    def _tell_size(self, resized: Callable[[int, int], None]) -> None:
        with suppress(OSError):  # hung up
            columns, rows = os.get_terminal_size(self.fd)
            if columns and rows:  # otherwise it does not know
                resized(columns, rows)


async def type_from(
    fd: int, console: Console, terminal: Terminal | None, key: bytes, pressed: Callable[[], None]
) -> None:
    """Type what comes from a descriptor, until its end or the VM's.

    Parameters:
        terminal: the terminal that `fd` is; None: it is none.
        key: the escape key of a terminal. b"": there is none.
        pressed: called each time that the key is pressed.
    """
    if terminal is None:
        with suppress(StateError):  # the VM has ended
            while data := await _read(fd):
                await console.write(data)
        return
    send, receive = trio.open_memory_channel[bytes](QUEUED)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_type_all, console, receive)
        with send, suppress(trio.BrokenResourceError):
            while True:
                await terminal.wait_ours()
                data = await _read(fd)
                if not data:
                    return
                first, *others = data.split(key) if key else [data]
                _queue(send, first)
                for part in others:
                    pressed()
                    _queue(send, part)


def _queue(send: trio.MemorySendChannel[bytes], data: bytes) -> None:
    if data:
        with suppress(trio.WouldBlock):
            send.send_nowait(data)


async def _type_all(console: Console, typed: trio.MemoryReceiveChannel[bytes]) -> None:
    with suppress(StateError):
        async with typed:
            async for data in typed:
                await console.write(data)


async def _read(fd: int) -> bytes:
    """The next bytes. b"": there are no more."""
    try:
        await trio.lowlevel.wait_readable(fd)
    except PermissionError:  # what epoll does not take, such as a file or /dev/null, does not block
        await trio.lowlevel.checkpoint()
    try:
        return os.read(fd, READ)
    except OSError:  # a terminal that hung up, a directory
        return b""
