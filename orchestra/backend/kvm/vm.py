"""KVM's second level: a VM, with its memory, its in-kernel devices and its capabilities."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from ...model.errors import BusLockUnsupported, SpecError, StateError
from ...native import ffi, lib
from ..memory import GuestMemory
from ..memory_layout import slot_flags
from ..registers import new_struct
from .ioctl import call, failure
from .part import Part
from .statistics import Statistic, StatisticsReader
from .vcpu import KvmVcpu, map_run

__all__ = ["KvmVm"]

T = TypeVar("T")

_REGION = ffi.typeof("struct kvm_userspace_memory_region *")
_BUS_LOCK = lib.KVM_CAP_X86_BUS_LOCK_EXIT
_OFF, _EXIT = lib.KVM_BUS_LOCK_DETECTION_OFF, lib.KVM_BUS_LOCK_DETECTION_EXIT


class KvmVm:
    """A VM's file descriptor. Make one with `Kvm.create_vm`. A context manager that closes it.

    The kernel keeps a VM until the last of its vCPUs is closed as well.

    Attributes:
        fd: the file descriptor; -1 once closed.
        bus_lock_exits: they were enabled (the kernel has no way to ask).
        interrupts: its interrupt lines for devices of the core (``orc_interrupts *``), which outlive it.
    """

    __slots__ = (
        "_has_vcpus",
        "_pages",
        "_statistics",
        "_vcpu_mmap_size",
        "bus_lock_exits",
        "fd",
        "interrupts",
    )

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        """Take over `fd`, which is closed if this raises."""
        self.fd = fd
        self.interrupts: Any = ffi.gc(lib.orc_interrupts_new(fd), lib.orc_interrupts_free)
        if self.interrupts == ffi.NULL:
            os.close(fd)
            raise MemoryError("orc_interrupts_new")
        self.bus_lock_exits = False
        self._vcpu_mmap_size = vcpu_mmap_size
        self._has_vcpus = False
        self._pages: dict[int, int] = {}
        self._statistics: StatisticsReader | None = None

    @classmethod
    def adopt(cls, fd: int, vcpu_mmap_size: int, memory: GuestMemory, *, bus_lock_exits: bool) -> KvmVm:
        """A VM that `orc_kvm_build` made, with a slot for each region of `memory` in their order."""
        vm = cls(fd, vcpu_mmap_size)
        vm.bus_lock_exits = bus_lock_exits
        vm._has_vcpus = True
        vm._pages = {slot: len(region.span) >> 12 for slot, region in enumerate(memory.regions)}
        return vm

    # ---- capabilities

    def extension(self, number: int) -> int:
        """What KVM_CHECK_EXTENSION says for this VM: 0 for no, 1 for yes, or what the capability defines."""
        return call(self.fd, "KVM_CHECK_EXTENSION", number)

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments. KVM_CAP_X86_BUS_LOCK_EXIT goes through `set_bus_lock_detection`.

        Raises SpecError (an argument that is no unsigned 64-bit number, too many), KvmError (EINVAL: not known here).
        """
        if cap != _BUS_LOCK:
            self._enable_cap(cap, args)
        elif len(args) == 1:
            self.set_bus_lock_detection(args[0])
        else:
            raise SpecError(f"args={args!r}: KVM_CAP_X86_BUS_LOCK_EXIT takes one argument, its bits")

    def _enable_cap(self, cap: int, args: tuple[int, ...]) -> None:
        call(self.fd, "KVM_ENABLE_CAP", new_struct("struct kvm_enable_cap *", {"cap": cap, "args": args}))

    def enable_bus_lock_exit(self) -> None:
        """Have every bus lock of the vCPUs made from now on reported. Done at once if it is on already.

        Raises:
            StateError: a vCPU exists. The kernel would accept it, and leave that vCPU uncovered.
            BusLockUnsupported: the host can't (where it can't, KVM_ENABLE_CAP returns 0 and does nothing).
        """
        if self.bus_lock_exits:
            return
        if self._has_vcpus:
            raise StateError(
                "bus-lock exits must be enabled before the VM's first vCPU is created: those that exist would stay "
                "uncovered; make a new VM"
            )
        bits = self.extension(_BUS_LOCK)
        if not bits & _EXIT:
            raise BusLockUnsupported(
                f"KVM_CAP_X86_BUS_LOCK_EXIT is {bits}: this host can't report bus locks. It takes an Intel CPU with "
                "bus-lock detection (Linux 5.12) or an AMD CPU with Bus Lock Threshold (Linux 6.16), visible to this "
                'KVM; with bus_locks="auto" or "off" VMs run, and their bus locks are not seen'
            )
        self._enable_cap(_BUS_LOCK, (_EXIT,))
        self.bus_lock_exits = True

    def set_bus_lock_detection(self, bits: int) -> None:
        """KVM_CAP_X86_BUS_LOCK_EXIT by its bits: KVM_BUS_LOCK_DETECTION_OFF (how a VM starts) or _EXIT.

        Raises SpecError (both, neither, or unknown bits), StateError (off again; a vCPU exists), BusLockUnsupported.
        """
        if isinstance(bits, bool) or not isinstance(bits, int):
            raise SpecError(f"bits={bits!r}: must be KVM_BUS_LOCK_DETECTION_OFF ({_OFF}) or _EXIT ({_EXIT})")
        if unknown := bits & ~(_OFF | _EXIT):
            raise SpecError(
                f"bits={bits:#x}: {unknown:#x} is not known; use KVM_BUS_LOCK_DETECTION_OFF ({_OFF}) or _EXIT ({_EXIT})"
            )
        if bits not in (_OFF, _EXIT):
            which = "both" if bits else "neither"
            raise SpecError(
                f"bits={bits:#x}: {which} of KVM_BUS_LOCK_DETECTION_OFF ({_OFF}) and _EXIT ({_EXIT}): choose one"
            )
        if bits == _EXIT:
            self.enable_bus_lock_exit()
        elif self.bus_lock_exits:
            raise StateError("bus-lock exits are on and KVM has no way to switch them off again; make a new VM")

    # ---- its state

    def read(self, part: Part[T]) -> T:
        """One part of its state, such as `state.CLOCK`."""
        return part.read(self)

    def write(self, part: Part[T], value: T) -> None:
        """Set one part of its state."""
        part.write(self, value)

    # ---- memory

    def set_memory(
        self,
        slot: int,
        guest_address: int,
        size: int,
        host_pointer: Any,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Give the guest memory, change a slot's flags, or take it away (KVM_SET_USER_MEMORY_REGION).

        Parameters:
            slot: from 0, below what KVM_CAP_NR_MEMSLOTS says.
            guest_address: guest-physical, a multiple of 4096.
            size: bytes, a multiple of 4096; 0 takes the slot away.
            host_pointer: a cffi pointer or the address as a number, page-aligned; the memory must outlive the slot.
            readonly: a guest's write leaves KVM_RUN as MMIO (KVM_MEM_READONLY).
            log_dirty: log the written pages for `dirty_log` (KVM_MEM_LOG_DIRTY_PAGES).

        Raises KvmError: EEXIST (it overlaps another slot), EINVAL (alignment, or a change of size).
        """
        region = ffi.new(_REGION)
        try:
            region.slot = slot
            region.flags = slot_flags(readonly, log_dirty)
            region.guest_phys_addr = guest_address
            region.memory_size = size
            region.userspace_addr = (
                host_pointer if type(host_pointer) is int else int(ffi.cast("uintptr_t", host_pointer))
            )
        except (OverflowError, TypeError) as error:
            raise SpecError(
                f"memory slot {slot!r} at {guest_address!r} of {size!r} bytes from {host_pointer!r}: must be unsigned "
                f"numbers ({error})"
            ) from None
        call(self.fd, "KVM_SET_USER_MEMORY_REGION", region)
        if size:
            self._pages[slot] = size >> 12
        else:
            self._pages.pop(slot, None)

    def dirty_log(self, slot: int) -> bytes:
        """The pages of `slot` written since the last call: bit n%8 of byte n//8 for page n, in whole 64-bit words.
        Written by the guest, and by KVM for it; or read for the first time, where KVM maps it writable at once. What
        this process writes into guest memory is not in the log.

        KVM_GET_DIRTY_LOG, which starts the log over: what one reader has seen no other will. So a log has one owner. Of
        a VM in a fleet that is its `DirtyLog`: calling this as well takes pages from its readers. Whoever needs the
        pages (a snapshot, a live migration) opens a `DirtyLog.reader`.

        Raises SpecError (no such slot), KvmError (ENOENT: not logged).
        """
        pages = self._pages.get(slot)
        if pages is None:
            # The kernel writes as many bytes as the slot has pages for: the buffer must never be a guess.
            raise SpecError(f"slot={slot!r}: this VM has no such memory slot; it has {sorted(self._pages)}")
        bitmap = ffi.new("uint64_t[]", (pages + 63) // 64)
        call(self.fd, "KVM_GET_DIRTY_LOG", ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": bitmap}))
        return bytes(ffi.buffer(bitmap))

    def set_tss_address(self, address: int) -> None:
        """Three pages below 4 GiB that Intel hosts need for real mode (KVM_SET_TSS_ADDR); before the first vCPU."""
        call(self.fd, "KVM_SET_TSS_ADDR", address)

    def set_identity_map_address(self, address: int) -> None:
        """A page below 4 GiB that Intel hosts without unrestricted guest need (KVM_SET_IDENTITY_MAP_ADDR)."""
        call(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", new_struct("uint64_t *", address))

    # ---- in-kernel devices

    def create_irqchip(self) -> None:
        """Two PICs, an I/O APIC and a local APIC for each vCPU (KVM_CREATE_IRQCHIP); before the first vCPU."""
        call(self.fd, "KVM_CREATE_IRQCHIP")

    def create_pit(self) -> None:
        """An i8254 timer with the speaker port answered (KVM_CREATE_PIT2); needs `create_irqchip` first."""
        call(self.fd, "KVM_CREATE_PIT2", ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY}))

    def irq_line(self, gsi: int, level: bool) -> None:
        """Set an interrupt line (KVM_IRQ_LINE). Any thread; nothing once it is closed, or while it is being closed.

        Raises KvmError (ENXIO without an irqchip), SpecError (no unsigned 32-bit number).
        """
        try:
            result = lib.orc_interrupts_set(self.interrupts, gsi, level)
        except OverflowError:
            raise SpecError(f"gsi={gsi!r}: must be an unsigned 32-bit number") from None
        if result:
            raise failure(-result, "KVM_IRQ_LINE")

    def irqfd(self, fd: int, gsi: int, *, resample_fd: int | None = None, deassign: bool = False) -> None:
        """Have writes to the eventfd `fd` raise the interrupt `gsi` (KVM_IRQFD).

        Parameters:
            resample_fd: an eventfd that the kernel writes when the guest ends a level-triggered interrupt.
            deassign: undo it.
        """
        flags = lib.KVM_IRQFD_FLAG_DEASSIGN if deassign else 0
        if resample_fd is not None:
            flags |= lib.KVM_IRQFD_FLAG_RESAMPLE
        values = {"fd": fd, "gsi": gsi, "flags": flags, "resamplefd": resample_fd or 0}
        call(self.fd, "KVM_IRQFD", new_struct("struct kvm_irqfd *", values))

    def ioeventfd(
        self,
        fd: int,
        address: int,
        length: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """Have a guest's write to an address or port signal the eventfd `fd` without an exit (KVM_IOEVENTFD).

        Parameters:
            address: guest-physical, or with `pio` a port.
            length: of the write that counts: 1, 2, 4 or 8 bytes; 0 for any.
            datamatch: only writes of this value count.
            deassign: undo it; all else as it was assigned.

        Raises KvmError (EEXIST: taken), ResourceLimit (KVM's limit on them).
        """
        flags = (
            (lib.KVM_IOEVENTFD_FLAG_PIO if pio else 0)
            | (lib.KVM_IOEVENTFD_FLAG_DEASSIGN if deassign else 0)
            | (lib.KVM_IOEVENTFD_FLAG_DATAMATCH if datamatch is not None else 0)
        )
        values = {"datamatch": datamatch or 0, "addr": address, "len": length, "fd": fd, "flags": flags}
        call(self.fd, "KVM_IOEVENTFD", new_struct("struct kvm_ioeventfd *", values))

    # ---- vCPUs and the rest

    def create_vcpu(self, index: int) -> KvmVcpu:
        """A vCPU (KVM_CREATE_VCPU); `index` is also its APIC id.

        Raises ResourceLimit (no file descriptor or memory left; nothing stays behind), KvmError (EEXIST, EINVAL).
        """
        fd = call(self.fd, "KVM_CREATE_VCPU", index)
        # Also if the mapping fails below: the kernel keeps a vCPU that was created until the VM ends, without its
        # descriptor too (virt/kvm/kvm_main.c, kvm_destroy_vcpus).
        self._has_vcpus = True
        try:
            return KvmVcpu(self, fd, map_run(fd, self._vcpu_mmap_size), self._vcpu_mmap_size)
        except BaseException:
            os.close(fd)
            raise

    def statistics(self) -> dict[str, Statistic]:
        """KVM's own statistics of the VM, by names that differ from kernel to kernel (KVM_GET_STATS_FD).

        Keeps one file descriptor open from the first call on. Raises KvmError where the kernel has none (before 5.14).
        """
        if self._statistics is None:
            self._statistics = StatisticsReader.open(self.fd)
        return self._statistics.read()

    def close(self) -> None:
        """Close it, and its statistics. Done at once if it is closed already."""
        if self._statistics is not None:
            self._statistics.close()
            self._statistics = None
        # Before the descriptor: a device that sets a line from here on finds the VM closed. Afterwards the number may
        # already be another file's.
        lib.orc_interrupts_close(self.interrupts)
        # Forgotten first: Linux frees the number even if close() fails (close(2)), so a second try could close another
        # file.
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> KvmVm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
