"""A VM's dirty log, and its one owner: reads it, and counts the pages that the guest wrote."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from ...native import ffi, lib
from .ioctl import failure

__all__ = ["DirtyLog", "read_logs"]


class DirtyLog:
    """Of one VM. Any thread: it is fine to read it while it is switched or closed."""

    __slots__ = ("_slots", "handle")

    def __init__(self, vm: int, slots: Any) -> None:
        """`vm`: its descriptor. `slots`: its ``struct kvm_userspace_memory_region[]``, whose flags `log` changes."""
        handle = lib.orc_dirty_new(vm, slots, len(slots))
        if handle == ffi.NULL:
            raise MemoryError("orc_dirty_new")
        self.handle = ffi.gc(handle, lib.orc_dirty_free)  # a reading may outlive the VM
        self._slots = slots

    def log(self, on: bool) -> None:
        """Log all memory that the guest may write, or none. Waits for the kernel, and for a reading in progress.

        Raises:
            ResourceLimit, KvmError: it can't be; all is as it was.
        """
        result = lib.orc_dirty_log(self.handle, on)
        if result:
            raise failure(-result, f"KVM_SET_USER_MEMORY_REGION, to {'log' if on else 'log no more'} written pages")

    def sums(self) -> tuple[int, int]:
        """Pages found by all readings so far; when the last began, 0 if there was none. At once."""
        sums = self._sums()
        return int(sums.pages), int(sums.read)

    @property
    def on(self) -> bool:
        """Some of the memory is logged."""
        return bool(self._sums().on)

    def _sums(self) -> Any:
        sums = ffi.new("struct orc_dirty_sums *")
        lib.orc_dirty_sums(self.handle, sums)
        return sums

    def close(self) -> None:
        """Before the VM's descriptor is closed: nothing is read from now on. The sums stay."""
        lib.orc_dirty_close(self.handle)


def read_logs(logs: Sequence[DirtyLog]) -> str | None:
    """Read these one after the other, in one call into the core. Waits for the kernel. What went wrong, if anything."""
    result = lib.orc_dirty_read([log.handle for log in logs], len(logs))
    return f"KVM_GET_DIRTY_LOG: {errno.errorcode.get(-result, -result)}" if result else None
