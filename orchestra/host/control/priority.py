"""The priority of a fleet's thread: its event loop runs before busy guests.

With more busy threads than CPUs, a thread that wakes waits for the others, 3 to 20 ms. A fleet's thread asks the
scheduler (EEVDF) for a short slice, so that it waits less, and for nice -3, so that it may use more of a CPU than each
guest before it waits (sched_setattr(2); the slice since Linux 6.12; nice with CAP_SYS_NICE or RLIMIT_NICE).
"""

from __future__ import annotations

from ...native import lib

__all__ = ["LoopPriority", "end_priority"]


class LoopPriority:
    """The priority of one thread, whose fleets share it: from the first `acquire` to the last `release`. All methods
    are for that thread.

    What the host does not allow or have is left out. So is what somebody chose for the thread: another policy than
    SCHED_OTHER, a nice value other than 0, a slice.

    What is started from the thread has nice 0 and the default slice, if the thread got nice -3. Otherwise it inherits
    the short slice, as the kernel can undo that only for the privileged (SCHED_FLAG_RESET_ON_FORK can't be cleared).
    Threads for long work begin with `end_priority`.
    """

    def __init__(self) -> None:
        self._users = 0
        self._ours = 0

    def acquire(self) -> None:
        if not self._users:
            self._ours = int(lib.orc_prefer())
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            lib.orc_prefer_no_more(self._ours)


def end_priority() -> None:
    """Give the calling thread, which may have inherited a part of the priority, the defaults again."""
    lib.orc_prefer_no_more(lib.ORC_PREFERRED)
