"""The scheduler's slice of a fleet's thread: a short one, so that its event loop waits less beside busy guests.

With more busy threads than CPUs, a thread that wakes waits for the slices of the others, about 3 ms each. One that asks
for a short slice runs sooner, and gets no more CPU time than before (EEVDF; sched_setattr(2), Linux 6.12).
"""

from __future__ import annotations

from ...native import lib

__all__ = ["ShortSlice", "end_short_slice"]


class ShortSlice:
    """A short slice for one thread, whose fleets share it: from the first `acquire` to the last `release`. All methods
    are for that thread.

    It changes nothing on a kernel without such slices, nor for a thread with another policy than SCHED_OTHER, nor for
    one that has a slice of its own already: somebody chose those. Policy and nice value stay as they are.

    Whatever is started from the thread inherits the slice, as the kernel can undo that only for the privileged
    (SCHED_FLAG_RESET_ON_FORK can't be cleared). Threads for long work begin with `end_short_slice`.
    """

    def __init__(self) -> None:
        self._users = 0
        self._ours = False

    def acquire(self) -> None:
        if not self._users:
            self._ours = bool(lib.orc_slice_shorten())
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if not self._users and self._ours:
            lib.orc_slice_restore()


def end_short_slice() -> None:
    """Give the calling thread, which may have inherited a short slice from a fleet's thread, the default again."""
    lib.orc_slice_restore()
