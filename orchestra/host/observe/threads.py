"""CPU time and run-queue delay of threads of this process, each asked for by itself.

The clock of a thread costs about a microsecond and tells whether it ran at all; its schedstat costs ten times that, and
is only worth reading if it did: the kernel adds a wait for a CPU up when it ends (kernel/sched/stats.h,
sched_info_arrive).

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

import attrs

__all__ = ["ThreadTimes"]

TASKS: Final = Path("/proc/self/task")
PER_THREAD: Final = 4  # CPUCLOCK_PERTHREAD_MASK
SCHED: Final = 2  # CPUCLOCK_SCHED: nanoseconds that it ran


@attrs.frozen
class _Schedstat:
    ran: int
    waited: int
    slices: int


def _schedstat(folder: Path | str, tid: int) -> _Schedstat:
    fd = os.open(f"{folder}/{tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        ran, waited, slices = os.read(fd, 128).split()
    finally:
        os.close(fd)
    return _Schedstat(int(ran), int(waited), int(slices))


class ThreadTimes:
    """Any thread.

    Attributes:
        absent: why a signal is missing here, by its name.

    Parameters:
        tasks: where the kernel lists the threads of this process.
    """

    def __init__(self, tasks: Path = TASKS) -> None:
        self._tasks = str(tasks)
        self.absent: Mapping[str, str] = {}
        own = threading.get_native_id()
        try:
            # A kernel without the figures has the file all the same, with zeros in it.
            missing = "" if _schedstat(tasks, own).slices else "this kernel was built without CONFIG_SCHED_INFO"
        except (OSError, ValueError) as error:
            missing = f"{tasks}/TID/schedstat can't be read ({error})"
        if missing:
            self.absent = {"run_delay": missing}

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
            return _schedstat(self._tasks, tid).waited
        except (OSError, ValueError):
            return None
