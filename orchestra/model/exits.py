"""The reasons for which KVM_RUN returns: a type for each x86 exit reason of the kernel's API document, and a catch-all.

Source: Linux Documentation/virt/kvm/api.rst, section 5 (The kvm_run structure), and include/uapi/linux/kvm.h. The
types carry no numbers: `orchestra.native.records` maps the kernel's numbers, taken from its headers, to them.

Objects are built 100,000s a second, so they are plain slotted classes, not frozen ones: treat them as read-only.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

__all__ = [
    "BusLock",
    "Debug",
    "DirtyRingFull",
    "ExceptionExit",
    "Exit",
    "FailEntry",
    "Hlt",
    "Hypercall",
    "Hyperv",
    "InternalError",
    "Interrupted",
    "Io",
    "IoapicEoi",
    "IrqWindowOpen",
    "MemoryFault",
    "Mmio",
    "Nmi",
    "Notify",
    "OtherExit",
    "Rdmsr",
    "SetTpr",
    "ShutdownExit",
    "SystemEvent",
    "TprAccess",
    "UnknownExit",
    "Wrmsr",
    "Xen",
]


@attrs.define(unsafe_hash=True)
class Exit:
    """Any exit. Subscribe to a type to get it and its subclasses.

    Attributes:
        vm: name of the VM.
        vcpu: number of the vCPU.
        time: nanoseconds on CLOCK_MONOTONIC (scripted backend: on trio's clock), when KVM_RUN returned.
        rip: the instruction pointer, or None where it was not sampled. For a bus lock: on the locking instruction on
            AMD (fault-like), behind it on Intel (trap-like).
        wait: nanoseconds that the guest has to wait for this exit before it goes on, by the limits then in force on bus
            locks and on exits.
        bus_lock: the exit reports a bus lock (KVM_RUN_X86_BUS_LOCK), whatever its reason.
        guest_mode: a nested guest exited (KVM_RUN_X86_GUEST_MODE).
        smm: the vCPU was in system management mode (KVM_RUN_X86_SMM).
    """

    kernel_name: ClassVar[str] = ""

    vm: str
    vcpu: int
    time: int
    rip: int | None
    wait: int
    bus_lock: bool
    guest_mode: bool
    smm: bool


@attrs.define(unsafe_hash=True)
class OtherExit(Exit):
    """An exit reason that this version of orchestra has no type for: `reason` is the kernel's number."""

    reason: int


@attrs.define(unsafe_hash=True)
class UnknownExit(Exit):
    """KVM_EXIT_UNKNOWN: the hardware gave a reason that KVM does not know."""

    kernel_name: ClassVar[str] = "unknown"
    hardware_exit_reason: int


@attrs.define(unsafe_hash=True)
class ExceptionExit(Exit):
    """KVM_EXIT_EXCEPTION: an exception that the guest has a handler for, which the emulated backend can't enter.

    KVM delivers exceptions itself, and its current kernels do not use this on x86.

    Attributes:
        exception: the vector.
        error_code: as KVM gives it; 0 on the emulated backend.
        address: emulated backend: the address that a page fault is about, else of the instruction.
    """

    kernel_name: ClassVar[str] = "exception"
    exception: int
    error_code: int
    address: int


@attrs.define(unsafe_hash=True)
class Io(Exit):
    """KVM_EXIT_IO: port I/O. `data`: what was written, at most the first 32 bytes of a string instruction's."""

    kernel_name: ClassVar[str] = "io"
    port: int
    size: int
    count: int
    write: bool
    data: bytes


@attrs.define(unsafe_hash=True)
class Hypercall(Exit):
    """KVM_EXIT_HYPERCALL; `args` holds the first three arguments."""

    kernel_name: ClassVar[str] = "hypercall"
    number: int
    args: tuple[int, ...]


@attrs.define(unsafe_hash=True)
class Debug(Exit):
    """KVM_EXIT_DEBUG: a breakpoint or single step."""

    kernel_name: ClassVar[str] = "debug"
    exception: int
    pc: int
    dr6: int
    dr7: int


@attrs.define(unsafe_hash=True)
class Hlt(Exit):
    """KVM_EXIT_HLT: HLT without an in-kernel irqchip."""

    kernel_name: ClassVar[str] = "hlt"


@attrs.define(unsafe_hash=True)
class Mmio(Exit):
    """KVM_EXIT_MMIO: an access to guest-physical memory that no slot backs, or a write to a read-only one."""

    kernel_name: ClassVar[str] = "mmio"
    address: int
    size: int
    write: bool
    data: bytes


@attrs.define(unsafe_hash=True)
class IrqWindowOpen(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: an interrupt can be injected now."""

    kernel_name: ClassVar[str] = "irq_window_open"


@attrs.define(unsafe_hash=True)
class ShutdownExit(Exit):
    """KVM_EXIT_SHUTDOWN: a triple fault."""

    kernel_name: ClassVar[str] = "shutdown"


@attrs.define(unsafe_hash=True)
class FailEntry(Exit):
    """KVM_EXIT_FAIL_ENTRY: the hardware refused to enter the guest."""

    kernel_name: ClassVar[str] = "fail_entry"
    hardware_entry_failure_reason: int
    cpu: int


@attrs.define(unsafe_hash=True)
class Interrupted(Exit):
    """KVM_EXIT_INTR: a signal came in the guest."""

    kernel_name: ClassVar[str] = "intr"


@attrs.define(unsafe_hash=True)
class SetTpr(Exit):
    """KVM_EXIT_SET_TPR: the guest wrote CR8."""

    kernel_name: ClassVar[str] = "set_tpr"
    cr8: int


@attrs.define(unsafe_hash=True)
class TprAccess(Exit):
    """KVM_EXIT_TPR_ACCESS, after KVM_TPR_ACCESS_REPORTING."""

    kernel_name: ClassVar[str] = "tpr_access"
    pc: int
    write: bool


@attrs.define(unsafe_hash=True)
class Nmi(Exit):
    """KVM_EXIT_NMI."""

    kernel_name: ClassVar[str] = "nmi"


@attrs.define(unsafe_hash=True)
class InternalError(Exit):
    """KVM_EXIT_INTERNAL_ERROR. `suberror` 1: KVM can't emulate an instruction; its bytes are in `instruction`."""

    kernel_name: ClassVar[str] = "internal_error"
    suberror: int
    instruction: bytes


@attrs.define(unsafe_hash=True)
class SystemEvent(Exit):
    """KVM_EXIT_SYSTEM_EVENT: shutdown (1), reset (2), crash (3) and others asked for by the guest."""

    kernel_name: ClassVar[str] = "system_event"
    type: int
    data: tuple[int, ...]


@attrs.define(unsafe_hash=True)
class IoapicEoi(Exit):
    """KVM_EXIT_IOAPIC_EOI: end of a level-triggered interrupt, with a split irqchip."""

    kernel_name: ClassVar[str] = "ioapic_eoi"
    vector: int


@attrs.define(unsafe_hash=True)
class Hyperv(Exit):
    """KVM_EXIT_HYPERV."""

    kernel_name: ClassVar[str] = "hyperv"
    type: int


@attrs.define(unsafe_hash=True)
class Rdmsr(Exit):
    """KVM_EXIT_X86_RDMSR, after KVM_CAP_X86_USER_SPACE_MSR."""

    kernel_name: ClassVar[str] = "x86_rdmsr"
    index: int
    reason: int


@attrs.define(unsafe_hash=True)
class Wrmsr(Exit):
    """KVM_EXIT_X86_WRMSR, after KVM_CAP_X86_USER_SPACE_MSR."""

    kernel_name: ClassVar[str] = "x86_wrmsr"
    index: int
    reason: int
    value: int


@attrs.define(unsafe_hash=True)
class DirtyRingFull(Exit):
    """KVM_EXIT_DIRTY_RING_FULL."""

    kernel_name: ClassVar[str] = "dirty_ring_full"


@attrs.define(unsafe_hash=True)
class BusLock(Exit):
    """KVM_EXIT_X86_BUS_LOCK: a bus lock, and nothing else that needed user space at the same time.

    Subscribing to `BusLock` gives every exit that reports one, so also the `Mmio` that a split lock on MMIO comes as
    on Intel: as many exits as locks were counted.
    """

    kernel_name: ClassVar[str] = "x86_bus_lock"


@attrs.define(unsafe_hash=True)
class Xen(Exit):
    """KVM_EXIT_XEN."""

    kernel_name: ClassVar[str] = "xen"
    type: int


@attrs.define(unsafe_hash=True)
class Notify(Exit):
    """KVM_EXIT_NOTIFY: no event window opened in the guest for the time set; bit 0 of `flags`: its context is bad."""

    kernel_name: ClassVar[str] = "notify"
    flags: int


@attrs.define(unsafe_hash=True)
class MemoryFault(Exit):
    """KVM_EXIT_MEMORY_FAULT: guest memory that could not be resolved. KVM_RUN fails with EFAULT along with it."""

    kernel_name: ClassVar[str] = "memory_fault"
    flags: int
    address: int
    size: int
