"""KVM's third level: a vCPU, its registers and its ``struct kvm_run``."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...model.errors import KvmError, SpecError, StateError
from ...native import ffi, lib
from ..registers import DebugRegisters, MpState, Registers, SpecialRegisters, new_struct
from .cpuid import Cpuid, CpuidEntry
from .ioctl import call, failure
from .statistics import Statistic, StatisticsReader

if TYPE_CHECKING:
    from .vm import KvmVm

__all__ = ["KvmVcpu", "map_run"]

_RUN = ffi.typeof("struct kvm_run *")
_REGS = ffi.typeof("struct kvm_regs *")
_SREGS = ffi.typeof("struct kvm_sregs *")
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

    # ---- general and special registers; those with a struct are for the launch path

    def read_regs(self) -> Any:
        """KVM_GET_REGS as a new ``struct kvm_regs *``."""
        regs = ffi.new(_REGS)
        call(self.fd, "KVM_GET_REGS", regs)
        return regs

    def write_regs(self, regs: Any) -> None:
        """KVM_SET_REGS from a ``struct kvm_regs *``, which may be used for many vCPUs."""
        call(self.fd, "KVM_SET_REGS", regs)

    def registers(self) -> Registers:
        return Registers.from_struct(self.read_regs())

    def set_registers(self, registers: Registers) -> None:
        """Raises SpecError for a value that is no unsigned 64-bit number."""
        self.write_regs(registers.to_struct())

    def read_sregs(self) -> Any:
        """KVM_GET_SREGS as a new ``struct kvm_sregs *``."""
        sregs = ffi.new(_SREGS)
        call(self.fd, "KVM_GET_SREGS", sregs)
        return sregs

    def write_sregs(self, sregs: Any) -> None:
        """KVM_SET_SREGS from a ``struct kvm_sregs *``. Raises KvmError (EINVAL: no state that a CPU can be in)."""
        call(self.fd, "KVM_SET_SREGS", sregs)

    def special_registers(self) -> SpecialRegisters:
        return SpecialRegisters.from_struct(self.read_sregs())

    def set_special_registers(self, registers: SpecialRegisters) -> None:
        """Raises SpecError (a value that does not fit), KvmError (EINVAL: no state that a CPU can be in)."""
        self.write_sregs(registers.to_struct())

    def update_special(self, change: Callable[[Any], object]) -> None:
        """Read, change and write the special registers: `change` is called with the ``struct kvm_sregs *``."""
        sregs = self.read_sregs()
        change(sregs)
        self.write_sregs(sregs)

    # ---- what the CPU is

    def set_cpuid(self, cpuid: Any) -> None:
        """KVM_SET_CPUID2, before the first KVM_RUN.

        Parameters:
            cpuid: a ``struct kvm_cpuid2 *`` (such as `Cpuid.with_apic_id` returns), a `Cpuid`, or `CpuidEntry` objects.
        """
        if isinstance(cpuid, Cpuid):
            cpuid = cpuid.buffer
        elif not isinstance(cpuid, ffi.CData):
            cpuid = Cpuid.from_entries(cpuid).buffer
        call(self.fd, "KVM_SET_CPUID2", cpuid)

    def cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_CPUID2: what was set, with what KVM keeps up to date in it."""
        room = 256  # KVM_MAX_CPUID_ENTRIES, the most that a vCPU can have
        buffer = ffi.new("struct kvm_cpuid2 *", {"nent": room, "entries": room})
        call(self.fd, "KVM_GET_CPUID2", buffer)
        return Cpuid(buffer).entries()

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

    # ---- the rest of the state, opaque where nobody looks into it

    def fpu(self) -> bytes:
        """``struct kvm_fpu`` as it is (KVM_GET_FPU); `xsave` has all of it and more."""
        return self._get_opaque("KVM_GET_FPU", "struct kvm_fpu")

    def set_fpu(self, state: bytes) -> None:
        self._set_opaque("KVM_SET_FPU", "struct kvm_fpu", state)

    def vcpu_events(self) -> bytes:
        """Pending exceptions, interrupts, NMIs and SMIs: ``struct kvm_vcpu_events`` as it is."""
        return self._get_opaque("KVM_GET_VCPU_EVENTS", "struct kvm_vcpu_events")

    def set_vcpu_events(self, state: bytes) -> None:
        self._set_opaque("KVM_SET_VCPU_EVENTS", "struct kvm_vcpu_events", state)

    def _get_opaque(self, name: str, kind: str) -> bytes:
        struct = ffi.new(f"{kind} *")
        call(self.fd, name, struct)
        return bytes(ffi.buffer(struct))

    def _set_opaque(self, name: str, kind: str, state: bytes) -> None:
        struct = ffi.new(f"{kind} *")
        _copy_exactly(kind, ffi.buffer(struct), state)
        call(self.fd, name, struct)

    def xsave(self) -> bytes:
        """The extended state (x87, SSE, AVX and on) in the CPU's XSAVE format, `KvmVm.xsave_size` bytes."""
        size = self._vm.xsave_size
        area = ffi.new("uint64_t[]", (size + 7) // 8)
        # KVM_GET_XSAVE writes 4096 bytes and fails if the guest's state is larger.
        call(self.fd, "KVM_GET_XSAVE2" if size > 4096 else "KVM_GET_XSAVE", area)
        return bytes(ffi.buffer(area)[:size])

    def set_xsave(self, state: bytes) -> None:
        """KVM_SET_XSAVE. Raises SpecError (another size than this host's), KvmError (EINVAL: features it lacks)."""
        size = self._vm.xsave_size
        area = ffi.new("uint64_t[]", (size + 7) // 8)
        _copy_exactly("xsave", memoryview(ffi.buffer(area))[:size], state)
        call(self.fd, "KVM_SET_XSAVE", area)

    def xcrs(self) -> dict[int, int]:
        """The extended control registers by number: XCR0 under 0 (KVM_GET_XCRS)."""
        xcrs = ffi.new("struct kvm_xcrs *")
        call(self.fd, "KVM_GET_XCRS", xcrs)
        return {xcrs.xcrs[i].xcr: xcrs.xcrs[i].value for i in range(xcrs.nr_xcrs)}

    def set_xcrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_XCRS. Raises SpecError (more than 16), KvmError (EINVAL: features that the host lacks)."""
        entries = [{"xcr": number, "value": value} for number, value in values.items()]
        call(self.fd, "KVM_SET_XCRS", new_struct("struct kvm_xcrs *", {"nr_xcrs": len(entries), "xcrs": entries}))

    def mp_state(self) -> MpState:
        state = ffi.new("struct kvm_mp_state *")
        call(self.fd, "KVM_GET_MP_STATE", state)
        return MpState(state.mp_state)

    def set_mp_state(self, state: MpState) -> None:
        """Raises KvmError (EINVAL: a state that needs an in-kernel irqchip)."""
        call(self.fd, "KVM_SET_MP_STATE", new_struct("struct kvm_mp_state *", {"mp_state": int(state)}))

    def debug_registers(self) -> DebugRegisters:
        debugregs = ffi.new("struct kvm_debugregs *")
        call(self.fd, "KVM_GET_DEBUGREGS", debugregs)
        return DebugRegisters.from_struct(debugregs)

    def set_debug_registers(self, registers: DebugRegisters) -> None:
        """Raises SpecError (a value that does not fit), KvmError (EINVAL: bits 32 and up of DR6 or DR7)."""
        call(self.fd, "KVM_SET_DEBUGREGS", registers.to_struct())

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


def _copy_exactly(what: str, target: Any, state: bytes) -> None:
    if len(state) != len(target):
        raise SpecError(f"{what}: {len(state)} bytes, must be {len(target)}: read it on a host like this one")
    target[:] = state
