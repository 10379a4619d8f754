"""Pressure stall information: how much of the time some task waited for a CPU, for memory or for I/O.

Totals are read once a tick, from files that stay open. For stalls that can't wait for the next tick there is a trigger:
the kernel reports when there were too many.

Source: Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import trio

__all__ = ["RESOURCES", "Pressure", "Trigger", "open_triggers", "path_of"]

RESOURCES: Final = {"cpu_pressure": "cpu", "memory_pressure": "memory", "io_pressure": "io"}
"""The kernel's name of the resource of each signal."""

HOST: Final = Path("/proc/pressure")
ROOM: Final = 512
WINDOW: Final = 1.0
UNPRIVILEGED: Final = 2.0
"""Seconds that a trigger's window must be a multiple of without CAP_SYS_RESOURCE."""

STALL: Final = 0.15
"""Part of the window in which some task stalled, from which a trigger fires."""


def path_of(signal: str, cgroup: Path | None = None) -> Path:
    """The file of a signal: the host's, or that of a version-2 cgroup."""
    resource = RESOURCES[signal]
    return HOST / resource if cgroup is None else cgroup / f"{resource}.pressure"


def _why(path: Path, error: Exception) -> str:
    match getattr(error, "errno", None):
        case errno.ENOENT:
            return f"{path} is not there: the kernel was built without CONFIG_PSI, or booted with psi=0"
        case errno.EOPNOTSUPP:
            return f"{path}: switched off (psi=0 at boot, or cgroup.pressure)"
        case errno.EACCES | errno.EPERM:
            return f"{path}: this process may not open it"
    return f"{path}: {error}"


def _some(data: bytes) -> int:
    """Microseconds of the line "some": avg10=... avg60=... avg300=... total=N"""
    for line in data.splitlines():
        if line.startswith(b"some "):
            return int(line.rpartition(b"total=")[2])
    raise ValueError("it has no line that starts with 'some'")


class Pressure:
    """The totals of a host or a cgroup. `close` it at the end.

    Attributes:
        absent: why a signal is missing here, by its name.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """`paths`: by signal, as `path_of` says."""
        self.absent: dict[str, str] = {}
        self._files: dict[str, tuple[Path, int]] = {}
        for signal, path in paths.items():
            try:
                self._files[signal] = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                self.absent[signal] = _why(path, error)
        self.read()  # whatever can't be read is absent from the start

    def read(self) -> dict[str, int]:
        """Microseconds of stall so far, by signal; absent signals are left out."""
        totals = {}
        for signal, (path, fd) in list(self._files.items()):
            try:
                totals[signal] = _some(os.pread(fd, ROOM, 0))
            except (OSError, ValueError) as error:
                self.absent[signal] = _why(path, error)
                del self._files[signal]
                os.close(fd)
        return totals

    def close(self) -> None:
        for _, fd in self._files.values():
            os.close(fd)
        self._files.clear()


class Trigger:
    """Fires when some task stalled for too much of a window; at most once for each window. `close` it.

    Parameters:
        signal, path: the signal, and its file as `path_of` gives it.
        stall: part of the window.
        window: seconds. Made `UNPRIVILEGED` where the kernel asks for that.

    Raises:
        OSError: there is no such file, the file may not be written, or the kernel refuses the trigger.
    """

    def __init__(self, signal: str, path: Path, stall: float = STALL, window: float = WINDOW) -> None:
        self.signal = signal
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            try:
                self._set(stall, window)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EPERM):
                    raise
                self._set(stall, UNPRIVILEGED)
            # trio waits for readable descriptors, and a trigger is exceptional data (EPOLLPRI). But an epoll descriptor
            # that has an event is itself readable.
            self._poll = select.epoll()
        except BaseException:
            os.close(self._fd)
            raise
        self._poll.register(self._fd, select.EPOLLPRI)

    def _set(self, stall: float, window: float) -> None:
        os.write(self._fd, b"some %d %d\0" % (round(stall * window * 1e6), round(window * 1e6)))

    async def wait(self) -> None:
        """Wait until it fires.

        Raises:
            OSError: the cgroup of the trigger was removed.
        """
        await trio.lowlevel.wait_readable(self._poll.fileno())
        # The wake itself is the event: the kernel forgets that a trigger fired as soon as anybody polls it
        # (kernel/sched/psi.c, psi_trigger_poll), and trio's epoll has just polled. An error condition stays.
        if any(events & select.EPOLLERR for _, events in self._poll.poll(0)):
            raise OSError(errno.ENODEV, "is gone", str(self.path))

    def close(self) -> None:
        self._poll.close()
        os.close(self._fd)


def open_triggers(paths: Mapping[str, Path]) -> tuple[list[Trigger], str | None]:
    """Open triggers for signals with their files. Returns those that opened, and why the first of the others did
    not."""
    triggers, problem = [], None
    for signal, path in paths.items():
        try:
            triggers.append(Trigger(signal, path))
        except OSError as error:
            problem = problem or f"no trigger: {_why(path, error)}"
    return triggers, problem
