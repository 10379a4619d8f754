"""CPU time and run-queue delay of threads of this process, each asked for by itself.

The clock of a thread costs about a microsecond and tells whether it ran at all. Its schedstat costs twice that, and ten
times if its file is not open yet. It is only worth reading if the thread ran: the kernel adds a wait for a CPU up when
that ends (kernel/sched/stats.h, sched_info_arrive).

Sources: clock_getcpuclockid(3) and include/linux/posix-timers_types.h for the clock's number; Documentation/scheduler/
sched-stats.rst for /proc/PID/schedstat.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

__all__ = ["ThreadTimes"]

TASKS: Final = Path("/proc/self/task")
PER_THREAD: Final = 4  # CPUCLOCK_PERTHREAD_MASK
SCHED: Final = 2  # CPUCLOCK_SCHED: nanoseconds that it ran

KEPT: Final = 128
"""Files that are kept open, of the threads that were first seen last: to open and close one costs four times what it
costs to read it. More than this would be many of the 1,024 descriptors that a process may have by default."""


class ThreadTimes:
    """Any thread. `close` it.

    Attributes:
        absent: why a signal is missing here, by its name.

    Parameters:
        tasks: where the kernel lists the threads of this process.
    """

    def __init__(self, tasks: Path = TASKS) -> None:
        self._tasks = str(tasks)
        self._files: dict[int, int] = {}  # by thread, in the order in which they were opened
        self.absent: Mapping[str, str] = {}
        own = threading.get_native_id()
        try:
            # A kernel without the figures has the file all the same, with zeros in it.
            missing = "" if int(self._read(own)[2]) else "this kernel was built without CONFIG_SCHED_INFO"
        except (OSError, ValueError, IndexError) as error:
            missing = f"{tasks}/TID/schedstat can't be read ({error})"
        if missing:
            self.absent = {"run_delay": missing}
        self.forget(own)

    def cpu(self, tid: int) -> int | None:
        """Nanoseconds that the thread ran; None if it is gone."""
        try:
            return time.clock_gettime_ns((~tid << 3) | PER_THREAD | SCHED)
        except OSError:
            return None

    def run_delay(self, tid: int) -> int | None:
        """Nanoseconds that it could have run and had no CPU; None if it is gone, or the kernel does not tell."""
        if self.absent:
            return None
        try:
            return int(self._read(tid)[1])
        except (OSError, ValueError, IndexError):
            return None

    def forget(self, tid: int) -> None:
        """The thread is gone, or will not be asked for again."""
        if (file := self._files.pop(tid, None)) is not None:
            os.close(file)

    def close(self) -> None:
        for tid in list(self._files):
            self.forget(tid)

    def _read(self, tid: int) -> list[bytes]:
        """Nanoseconds that it ran, and that it waited; how often it ran."""
        files = self._files
        if (file := files.get(tid)) is not None:
            try:
                return os.pread(file, 128, 0).split()
            except OSError:  # that thread is gone; another may have its number
                self.forget(tid)
        file = os.open(f"{self._tasks}/{tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            told = os.pread(file, 128, 0).split()
        except BaseException:
            os.close(file)
            raise
        files[tid] = file
        if len(files) > KEPT:
            self.forget(next(iter(files)))
        return told
