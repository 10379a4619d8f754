"""CPU time and run-queue delay of threads of this process, each asked for by itself.

To read a thread's clock costs about a microsecond, and shows whether the thread ran at all. To read its schedstat costs
twice that, and ten times that if the file is not open yet. The schedstat is worth reading only if the thread ran: the
kernel adds up a wait for a CPU when the wait ends (kernel/sched/stats.h, sched_info_arrive).

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
"""Files that are kept open, those of the newest threads: to open and close a file costs four times as much as to read
it. More files would take too many of the 1,024 descriptors that a process may have by default."""


class ThreadTimes:
    """Reads the times of threads. Any thread; `close` it at the end.

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
        """Nanoseconds that the thread ran; None: the thread is gone."""
        try:
            return time.clock_gettime_ns((~tid << 3) | PER_THREAD | SCHED)
        except OSError:
            return None

    def run_delay(self, tid: int) -> int | None:
        """Nanoseconds that the thread waited for a CPU; None: it is gone, or the kernel has no figures."""
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
        """The fields of schedstat: nanoseconds run, nanoseconds waited, number of times run."""
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
