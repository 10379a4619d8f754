"""KVM's third level: a vCPU, its ``struct kvm_run`` and the way to its state."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ...model.errors import KvmError, StateError
from ...native import ffi, lib
from ..registers import new_struct
from .ioctl import call, failure
from .part import Part
from .statistics import Statistic, StatisticsReader

if TYPE_CHECKING:
    from .vm import KvmVm

__all__ = ["KvmVcpu", "map_run"]

T = TypeVar("T")

_RUN = ffi.typeof("struct kvm_run *")
_MOST_MSRS = 255  # one call takes fewer than MAX_IO_MSRS (256, arch/x86/kvm/x86.c)


def map_run(fd: int, size: int) -> Any:
    """A vCPU's ``struct kvm_run *``. Raises ResourceLimit (no memory or mapping left), KvmError."""
    # Not mmap.mmap: it keeps a duplicate of the descriptor, and descriptors bound how many VMs a process can have.
    address = lib.mmap(ffi.NULL, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if int(ffi.cast("intptr_t", address)) == -1:
        raise failure(ffi.errno, f"mmap of a vCPU's {size} bytes")
    return ffi.cast(_RUN, address)


class KvmVcpu:
    """A vCPU's file descriptor and mapping. Make one with `KvmVm.create_vcpu`. A context manager that closes it.

    The kernel wants its ioctls from one thread at a time: they wait for a KVM_RUN in progress.

    Attributes:
        fd: the file descriptor; -1 once closed.
    """

    __slots__ = ("_run", "_size", "_statistics", "_vm", "fd")

    def __init__(self, vm: KvmVm, fd: int, run: Any, mmap_size: int) -> None:
        self._run = run
        self._size = mmap_size
        self._statistics: StatisticsReader | None = None
        self._vm = vm
        self.fd = fd

    @property
    def run(self) -> Any:
        """The ``struct kvm_run *`` shared with the kernel. Like any C pointer it is good only until `close`."""
        if self.fd < 0:
            raise StateError("the vCPU is closed and its kvm_run is gone")
        return self._run

    # ---- its state

    def extension(self, number: int) -> int:
        """What KVM_CHECK_EXTENSION says for its VM."""
        return self._vm.extension(number)

    def read(self, part: Part[T]) -> T:
        """One part of its state, such as `state.REGISTERS`."""
        return part.read(self)

    def write(self, part: Part[T], value: T) -> None:
        """Set one part of its state."""
        part.write(self, value)

    def msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """The values of the MSRs `indices` (KVM_GET_MSRS). Raises KvmError, which names the first that KVM refuses."""
        values: dict[int, int] = {}
        for entries, count in self._msr_calls("KVM_GET_MSRS", [(index, 0) for index in indices]):
            values |= {entries[i].index: entries[i].data for i in range(count)}
        return values

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write MSRs in the mapping's order (KVM_SET_MSRS).

        Raises KvmError, which names the first that KVM refuses: those before it are written.
        """
        for _ in self._msr_calls("KVM_SET_MSRS", list(values.items())):
            pass

    def _msr_calls(self, name: str, values: Sequence[tuple[int, int]]) -> Iterable[tuple[Any, int]]:
        for start in range(0, len(values), _MOST_MSRS):
            part = values[start : start + _MOST_MSRS]
            entries = [{"index": index, "data": data} for index, data in part]
            msrs = new_struct("struct kvm_msrs *", {"nmsrs": len(part), "entries": entries})
            done = call(self.fd, name, msrs)
            if done < len(part):
                index = part[done][0]
                raise KvmError(
                    errno.EINVAL, f"{name}: MSR {index:#x} refused, number {start + done + 1} of {len(values)}"
                )
            yield msrs.entries, done

    # ---- debugging and the clock

    def guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """Debug the guest from outside (KVM_SET_GUEST_DEBUG): its traps then come as KVM_EXIT_DEBUG.

        Parameters:
            control: KVM_GUESTDBG_ENABLE with _SINGLESTEP, _USE_SW_BP or _USE_HW_BP; 0 ends it.
            debugreg: DR0 to DR7 for hardware breakpoints.
        """
        values = {"control": control, "arch": {"debugreg": tuple(debugreg)}}
        call(self.fd, "KVM_SET_GUEST_DEBUG", new_struct("struct kvm_guest_debug *", values))

    def kvmclock_ctrl(self) -> bool:
        """Tell the guest that it was paused, so that it reports no soft lockup (KVM_KVMCLOCK_CTRL).

        Returns False if the guest uses no kvmclock and so could not be told.
        """
        try:
            call(self.fd, "KVM_KVMCLOCK_CTRL")
        except KvmError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def open_statistics(self) -> None:
        """Open what `statistics` reads, if it is not open. Waits while the vCPU is in KVM_RUN, as all its ioctls do."""
        if self._statistics is None:
            self._statistics = StatisticsReader.open(self.fd)

    def statistics(self) -> dict[str, Statistic]:
        """KVM's own statistics of the vCPU; see `KvmVm.statistics`. Keeps one more descriptor open from then on.

        Only the first call waits for anybody (`open_statistics`).
        """
        self.open_statistics()
        assert self._statistics is not None
        return self._statistics.read()

    def close(self) -> None:
        """Unmap and close it. Nobody may be in KVM_RUN. Done at once if it is closed already."""
        if self._statistics is not None:
            self._statistics.close()
            self._statistics = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            lib.munmap(self._run, self._size)
            self._run = None
            os.close(fd)

    def __enter__(self) -> KvmVcpu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
