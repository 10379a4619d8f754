"""CPU caps that the kernel keeps: cpu.max of cgroup version 2, for single threads.

A capped thread has a cgroup of its own, for as long as it is capped, below the cgroup of its process. There is one for
each thread and not for each VM, so that a cap means the same as in the run loop: each vCPU may use this share of a CPU.
In a common cgroup, a busy vCPU would use up what idle vCPUs leave. A thread alone in a cgroup has the same weight
against threads outside as before (cpu.weight 100 is nice 0).

A thread moves itself, by writing "0": to move another, the kernel first waits for an RCU grace period, which is 16 ms
of the event loop's time where favordynmods is off (cgroup_procs_write_start, kernel/cgroup/cgroup.c).

A thread that has spent its share of the period gets no CPU before the next period: neither a signal nor a wake changes
that. So code that waits for threads loosens their caps meanwhile (`hurry`, `end`), which lets the threads go at once.

Sources: Documentation/admin-guide/cgroup-v2.rst ("Threads", "cpu.max"), Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import threading
from pathlib import Path
from typing import Final

from ...model.errors import ResourceLimit, SpecError
from .delegation import own_cgroup, why_not

__all__ = ["CpuCgroup", "ThreadCap", "cpu_max"]

PERIOD: Final = 50_000
"""Microseconds; as in `native/cap.c`. With shorter periods, large shares fall short by more than 5 % of a CPU, as the
kernel hands out quota in slices of 5 ms. Nor would threads be less late: the kernel looks at each tick only, and takes
what a thread used too much off its next periods."""

LEAST_QUOTA: Final = 1000
"""Microseconds: the kernel accepts no smaller quota."""

HINTS: Final = {
    errno.EAGAIN: "raise cgroup.max.descendants or cgroup.max.depth of the cgroups above",
    errno.ENOENT: "has the cpu controller been taken out of cgroup.subtree_control?",
    errno.EOPNOTSUPP: "has this process been moved to another cgroup? Threads move only within the domain of theirs",
    errno.EACCES: "is it still delegated to this user?",
    errno.EROFS: "cgroups are mounted read-only",
}


def _refused(path: Path, error: OSError) -> ResourceLimit:
    hint = HINTS.get(error.errno or 0)
    return ResourceLimit(error.errno or 0, f"{path}: {error.strerror}" + (f": {hint}" if hint else ""))


def _write(path: Path, text: str) -> None:
    """Write to a cgroup file. This never makes a file: a missing file means a missing controller."""
    try:
        # One write() for the whole text, as the kernel takes each write for a complete value; and no O_CREAT.
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise _refused(path, error) from error


def cpu_max(share: float | None, loose: bool = False) -> str:
    """The text of cpu.max for that share of a CPU.

    Parameters:
        loose: a quota so large that it holds no thread. Unlike "max", a change from it to a cap takes microseconds:
            between "max" and a quota, the kernel patches the code of its scheduler.
    """
    if share is None:
        return f"max {PERIOD}"
    period = max(PERIOD, math.ceil(LEAST_QUOTA / share))
    return f"{2 * period if loose else max(LEAST_QUOTA, round(share * period))} {period}"


class ThreadCap:
    """The cgroup of one thread, made empty. `remove` it at the end.

    Raises:
        ResourceLimit: the kernel refuses the cgroup.
    """

    def __init__(self, parent: Path, name: str, tid: int) -> None:
        self.folder = parent / name
        self._parent = parent
        self._tid = tid
        self._inside = False
        try:
            self.folder.mkdir()
        except OSError as error:
            raise _refused(self.folder, error) from error
        try:
            # A new cgroup is a domain, into which no single thread can be moved (admin-guide/cgroup-v2.rst, Threads).
            _write(self.folder / "cgroup.type", "threaded")
        except ResourceLimit:
            self.remove()
            raise

    def put(self, share: float | None, loose: bool = False) -> None:
        """See `cpu_max`. A thread that is held goes on at once if there is something left for it.

        Raises:
            ResourceLimit: the kernel refuses it.
        """
        _write(self.folder / "cpu.max", cpu_max(share, loose))

    def enter(self) -> None:
        """Move the calling thread in. If that is another thread, this does nothing: the capped thread has ended.

        Raises:
            ResourceLimit: the kernel refuses it.
        """
        if threading.get_native_id() == self._tid:
            _write(self.folder / "cgroup.threads", "0")
            self._inside = True

    def leave(self) -> None:
        """The thread's own way out, as `enter`, with those that it has started there: KVM starts one at a VM's first
        KVM_RUN (vhost_task_create).

        Raises:
            OSError: the kernel refuses it.
        """
        if self._inside and threading.get_native_id() == self._tid:
            _write(self._parent / "cgroup.threads", "0")
            self._inside = False
            # Threads that the vCPU's thread has started while inside are born in its cgroup, which can't be removed
            # with them.
            for other in (self.folder / "cgroup.threads").read_text().split():
                try:
                    _write(self._parent / "cgroup.threads", other)
                except ResourceLimit as error:
                    if error.errno != errno.ESRCH:  # it has ended
                        raise

    def held(self) -> int:
        """Nanoseconds for which the thread was held; the kernel counts a hold at its end."""
        try:
            lines = (self.folder / "cpu.stat").read_text().splitlines()
            return next(int(line.split()[1]) * 1000 for line in lines if line.startswith("throttled_usec "))
        except (OSError, ValueError, IndexError, StopIteration):
            return 0

    def remove(self) -> bool:
        """Remove the cgroup. False: a thread is still in it; a thread that has just ended may be, for a moment."""
        try:
            # With a quota, the scheduler would believe for ever that there is a cap (destroy_cfs_bandwidth, fair.c).
            self.put(None)
        except ResourceLimit:
            pass
        try:
            self.folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True


class CpuCgroup:
    """The cgroup that this process lives in, below which its threads can be capped; made once for a fleet.

    Parameters:
        folder: None: it is found.

    Raises:
        SpecError: they can't be; the message says why, and what to do.
    """

    def __init__(self, folder: Path | None = None) -> None:
        found = folder or own_cgroup()
        if found is None:
            raise SpecError(
                'cap_by="cgroup": this process lives in no cgroup of version 2, or it is not mounted: '
                "boot with one (systemd.unified_cgroup_hierarchy=1), or leave cap_by out"
            )
        self.folder = found
        self._numbers = itertools.count(1)
        tid = threading.get_native_id()
        if obstacle := why_not(found, tid):
            raise SpecError(f'cap_by="cgroup": {obstacle}; or leave cap_by out, and the run loop caps')
        try:
            self._try(tid)
        except ResourceLimit as error:
            raise SpecError(f'cap_by="cgroup": {error.strerror}; or leave cap_by out, and the run loop caps') from error

    def _try(self, tid: int) -> None:
        """Cap a thread for a trial: some obstacles show only then, and in no file."""
        cap = self.cap("trial", tid)
        try:
            cap.put(1, loose=True)
            try:
                cap.enter()
            finally:
                cap.leave()
        finally:
            cap.remove()

    def cap(self, name: str, tid: int) -> ThreadCap:
        """A cgroup for a thread.

        Raises:
            ResourceLimit: it can't be made.
        """
        # Fleets and processes may share this cgroup. A thread may have two caps for a moment, until it leaves the
        # first.
        return ThreadCap(self.folder, f"orchestra-{name}-{tid}-{next(self._numbers)}", tid)
