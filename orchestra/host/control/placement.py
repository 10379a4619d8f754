"""Decides where vCPU threads may run: isolated VMs on quarantine CPUs, with core scheduling where the kernel has it,
and in the resctrl control group of isolated VMs if there is one.

Sources: sched_setaffinity(2); Documentation/admin-guide/hw-vuln/core-scheduling.rst (PR_SCHED_CORE: threads of other
cookies never run on the two hyperthreads of a core at the same time).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable
from typing import Final

from ...model.errors import ResourceLimit, SpecError
from .resources import ControlGroup

__all__ = ["Quarantine", "quarantine_cpus"]

# include/uapi/linux/prctl.h of Linux 7.0
PR_SCHED_CORE: Final = 62
PR_SCHED_CORE_CREATE: Final = 1
PR_SCHED_CORE_SHARE_TO: Final = 2
SCOPE_THREAD: Final = 0


def quarantine_cpus(cpus: Iterable[int] | None) -> frozenset[int]:
    """Check the CPUs for isolated VMs.

    Parameters:
        cpus: their numbers; None: the last that this process may run on, if it may run on more than one.

    Raises:
        SpecError: this process may not run on one of them, or on no other.
    """
    allowed = os.sched_getaffinity(0)
    if cpus is None:
        return frozenset([max(allowed)]) if len(allowed) > 1 else frozenset()
    chosen = frozenset(cpus)
    if not chosen or not all(isinstance(cpu, int) and not isinstance(cpu, bool) for cpu in chosen):
        raise SpecError(f"quarantine={sorted(chosen, key=str)!r}: must be numbers of CPUs, one at least")
    if not chosen <= allowed:
        raise SpecError(
            f"quarantine={sorted(chosen)!r}: this process may run on {sorted(allowed)} only (taskset, cpuset.cpus)"
        )
    if chosen == allowed:
        raise SpecError(f"quarantine={sorted(chosen)!r}: leaves no CPU for the VMs that are not isolated")
    return chosen


class Quarantine:
    """The CPUs that isolated VMs share; made once for a fleet.

    Parameters:
        cpus: as `quarantine_cpus` returns them; empty: this host has none to spare.
        group: the control group that isolated threads move to as well.
        moved: called for each thread that changed groups, with whether it is isolated.
    """

    def __init__(
        self,
        cpus: frozenset[int],
        group: ControlGroup | None = None,
        moved: Callable[[int, bool], object] = lambda thread, isolated: None,
    ) -> None:
        self.cpus = cpus
        self._group = group
        self._moved = moved
        self._all = frozenset(os.sched_getaffinity(0))

    def confine(self, threads: Iterable[int]) -> None:
        """Let these threads (ids as of gettid) run on the quarantine CPUs only, and share a core with no other thread.

        Raises:
            ResourceLimit: there is no CPU to spare, or the host does not allow it; nothing has moved then.
        """
        if not self.cpus and self._group is None:
            raise ResourceLimit(errno.ENODEV, "isolate: this process may run on one CPU only: there is none to spare")
        threads = list(threads)
        placed: list[int] = []
        try:
            for thread in threads if self.cpus else ():
                _set(thread, self.cpus)
                placed.append(thread)
            if self._group is not None:
                self._group.admit(threads)
        except ResourceLimit:
            self._let_run(placed)
            raise
        _core_scheduling(PR_SCHED_CORE_CREATE, placed)
        self._notify(threads, True)

    def free(self, threads: Iterable[int]) -> None:
        """Let these threads run on all CPUs that this process had when the fleet was opened.

        Raises:
            ResourceLimit: the host does not allow it.
        """
        threads = list(threads)
        if self._group is not None:
            self._group.release(threads)
            self._notify(threads, False)
        self._let_run(threads)

    def _let_run(self, threads: list[int]) -> None:
        if self.cpus:
            _core_scheduling(PR_SCHED_CORE_SHARE_TO, threads)  # the caller's cookie, which is none
            for thread in threads:
                _set(thread, self._all)

    def _notify(self, threads: list[int], isolated: bool) -> None:
        if self._group is not None:
            for thread in threads:
                self._moved(thread, isolated)


def _set(thread: int, cpus: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(thread, cpus)
    except ProcessLookupError:
        pass  # it has ended
    except OSError as error:
        raise ResourceLimit(
            error.errno or 0, f"CPUs {sorted(cpus)}: {error.strerror}: see cpuset.cpus of this process's cgroup"
        ) from error


def _core_scheduling(what: int, threads: Iterable[int]) -> None:
    """Call prctl(PR_SCHED_CORE). A refusal is ignored: a host without SMT has no hyperthreads to share, and on a kernel
    without core scheduling the CPUs alone must do."""
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    for thread in threads:
        prctl(PR_SCHED_CORE, what, thread, SCOPE_THREAD, 0)
