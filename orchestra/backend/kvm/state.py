"""The parts of a vCPU's and a VM's state that KVM gives out and takes back: one object for each, all used alike.

    registers = vcpu.read(REGISTERS)
    vcpu.write(REGISTERS, attrs.evolve(registers, rip=0x1000))

A part knows its two ioctls, its structure and the capability that it needs. Parts that nobody looks into are bytes, as
the kernel lays them out on this host; a structure of another size is refused. Adding a part is one line here.

What depends on what, for whoever saves and restores a machine (Linux, Documentation/virt/kvm/api.rst):

    read    MP_STATE first: KVM accepts a pending INIT or SIPI there, which changes registers
    write   TSC_KHZ before everything that counts time; CPUID before MSRs; SPECIAL before LAPIC (it has the APIC base),
            XCRS and NESTED; LAPIC before MSRs (the TSC deadline arms its timer); REGISTERS before EVENTS (setting
            registers drops a pending exception)
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, Final

import attrs

from ...model.errors import KvmError, KvmUnsupported, SpecError
from ...native import ffi, lib
from ..registers import DebugRegisters, MpState, Registers, SpecialRegisters, SpecialRegisters2, new_struct
from .cpuid import Cpuid, CpuidEntry
from .ioctl import call
from .part import Owner, Part, StructPart, copy_exactly, opaque

__all__ = [
    "CLOCK",
    "CPUID",
    "DEBUG",
    "EVENTS",
    "FPU",
    "IOAPIC",
    "LAPIC",
    "MP_STATE",
    "NESTED",
    "PIC_MASTER",
    "PIC_SLAVE",
    "PIT",
    "REGISTERS",
    "SPECIAL",
    "SPECIAL2",
    "TSC_KHZ",
    "TSC_OFFSET",
    "XCRS",
    "XSAVE",
    "Clock",
]

# ---- of a vCPU

REGISTERS: Final[Part[Registers]] = StructPart("REGS", "kvm_regs", Registers.from_struct, Registers.to_struct)
SPECIAL: Final[Part[SpecialRegisters]] = StructPart(
    "SREGS", "kvm_sregs", SpecialRegisters.from_struct, SpecialRegisters.to_struct
)
SPECIAL2: Final[Part[SpecialRegisters2]] = StructPart(
    "SREGS2", "kvm_sregs2", SpecialRegisters2.from_struct, SpecialRegisters2.to_struct, "KVM_CAP_SREGS2"
)
"""The special registers with the four page-directory pointers that a 32-bit PAE guest has loaded, and which its memory
may no longer hold. Without the pending interrupt, which `EVENTS` has as well."""

DEBUG: Final[Part[DebugRegisters]] = StructPart(
    "DEBUGREGS", "kvm_debugregs", DebugRegisters.from_struct, DebugRegisters.to_struct
)
MP_STATE: Final[Part[MpState]] = StructPart(
    "MP_STATE",
    "kvm_mp_state",
    lambda struct: MpState(struct.mp_state),
    lambda state: new_struct("struct kvm_mp_state *", {"mp_state": int(state)}),
)
"""Whether it runs. All but RUNNABLE need an in-kernel irqchip (KvmError, EINVAL)."""

FPU: Final = opaque("FPU", "kvm_fpu")
"""x87 and SSE. `XSAVE` has all of it and more."""

EVENTS: Final = opaque("VCPU_EVENTS", "kvm_vcpu_events")
"""Exceptions, interrupts, NMIs and SMIs that are pending."""

LAPIC: Final = opaque("LAPIC", "kvm_lapic_state", "KVM_CAP_IRQCHIP")
"""The local APIC's registers, at their offsets. Needs an in-kernel irqchip (KvmError, EINVAL)."""


class _Xsave(Part[bytes]):
    """As large as this host's KVM says, at least 4096 bytes."""

    SMALLEST: Final = 4096  # what KVM_GET_XSAVE writes; it fails if the guest's state is larger

    def _new(self, owner: Owner) -> tuple[Any, int]:
        size = max(self.SMALLEST, owner.extension(lib.KVM_CAP_XSAVE2))
        return ffi.new("uint64_t[]", (size + 7) // 8), size

    def read(self, owner: Owner) -> bytes:
        area, size = self._new(owner)
        call(owner.fd, "KVM_GET_XSAVE2" if size > self.SMALLEST else self.get, area)
        return bytes(ffi.buffer(area)[:size])

    def write(self, owner: Owner, value: bytes) -> None:
        area, size = self._new(owner)
        copy_exactly(self.name, memoryview(ffi.buffer(area))[:size], value)
        call(owner.fd, self.set, area)


XSAVE: Final[Part[bytes]] = _Xsave("XSAVE")
"""The extended state (x87, SSE, AVX and on) in the CPU's XSAVE format."""


def _xcrs_from(struct: Any) -> dict[int, int]:
    return {struct.xcrs[i].xcr: struct.xcrs[i].value for i in range(struct.nr_xcrs)}


def _xcrs_to(values: Mapping[int, int]) -> Any:
    entries = [{"xcr": number, "value": value} for number, value in values.items()]
    return new_struct("struct kvm_xcrs *", {"nr_xcrs": len(entries), "xcrs": entries})


XCRS: Final[Part[Mapping[int, int]]] = StructPart("XCRS", "kvm_xcrs", _xcrs_from, _xcrs_to, "KVM_CAP_XCRS")
"""The extended control registers by number: XCR0 under 0."""


class _Cpuid(Part[list[CpuidEntry]]):
    """Read: what was set, with what KVM keeps up to date in it. Written once, before the first KVM_RUN."""

    ROOM: Final = 256  # KVM_MAX_CPUID_ENTRIES (arch/x86/include/asm/kvm_host.h), the most that a vCPU can have

    def read(self, owner: Owner) -> list[CpuidEntry]:
        buffer = ffi.new("struct kvm_cpuid2 *", {"nent": self.ROOM, "entries": self.ROOM})
        call(owner.fd, self.get, buffer)
        return Cpuid(buffer).entries()

    def write(self, owner: Owner, value: list[CpuidEntry]) -> None:
        call(owner.fd, self.set, Cpuid.from_entries(value).buffer)


CPUID: Final[Part[list[CpuidEntry]]] = _Cpuid("CPUID2")


class _TscKhz(Part[int]):
    """The number itself is the ioctl's argument, and its value."""

    def read(self, owner: Owner) -> int:
        return self.call(owner, self.get)

    def write(self, owner: Owner, value: int) -> None:
        if self.read(owner) == value:
            return  # so that a host without KVM_CAP_TSC_CONTROL takes what it has anyway
        if not owner.extension(lib.KVM_CAP_TSC_CONTROL):
            raise KvmUnsupported(
                errno.EOPNOTSUPP,
                f"{self.name}: this host's CPU can't scale a guest's clock to {value} kHz (KVM_CAP_TSC_CONTROL): use a "
                "host whose clock runs as fast",
            )
        call(owner.fd, self.set, value)


TSC_KHZ: Final[Part[int]] = _TscKhz("TSC_KHZ", "KVM_CAP_GET_TSC_KHZ")
"""How fast the guest's time stamp counter runs."""


class _TscOffset(Part[int]):
    """An attribute of the vCPU: what is added to the host's counter, modulo 2^64 (Linux 5.16)."""

    def read(self, owner: Owner) -> int:
        value = ffi.new("uint64_t *")
        self._access(owner, "KVM_GET_DEVICE_ATTR", value)
        return int(value[0])

    def write(self, owner: Owner, value: int) -> None:
        self._access(owner, "KVM_SET_DEVICE_ATTR", new_struct("uint64_t *", value))
        if self.read(owner) != value:  # a KVM without hardware was seen to take it and to do nothing
            raise KvmUnsupported(errno.EOPNOTSUPP, f"{self.name}: this host's KVM takes an offset and does not use it")

    def supported(self, owner: Owner) -> bool:
        if not super().supported(owner):
            return False
        try:
            call(owner.fd, "KVM_HAS_DEVICE_ATTR", self._attribute(0))
        except KvmError as error:
            if error.errno != errno.ENXIO:  # "the attribute is not supported" (api.rst, KVM_HAS_DEVICE_ATTR)
                raise
            return False
        return True

    def _access(self, owner: Owner, name: str, pointer: Any) -> None:
        self.call(owner, name, self._attribute(int(ffi.cast("uintptr_t", pointer))))

    @staticmethod
    def _attribute(address: int) -> Any:
        values = {"group": lib.KVM_VCPU_TSC_CTRL, "attr": lib.KVM_VCPU_TSC_OFFSET, "addr": address}
        return ffi.new("struct kvm_device_attr *", values)


TSC_OFFSET: Final[Part[int]] = _TscOffset("VCPU_TSC_OFFSET", "KVM_CAP_VCPU_ATTRIBUTES")


class _Nested(Part[bytes]):
    """As long as the guest's own guest needs. The structure begins with flags, a format and its size."""

    def read(self, owner: Owner) -> bytes:
        self.require(owner)
        room = owner.extension(lib.KVM_CAP_NESTED_STATE)
        area = ffi.new("uint64_t[]", (room + 7) // 8)
        header = ffi.cast("struct kvm_nested_state *", area)
        header.size = room
        call(owner.fd, self.get, header)
        return bytes(ffi.buffer(area)[: header.size])

    def write(self, owner: Owner, value: bytes) -> None:
        self.require(owner)
        least = ffi.sizeof("struct kvm_nested_state")
        if len(value) < least:
            raise SpecError(f"{self.name}: {len(value)} bytes, must be at least {least}")
        area = ffi.new("uint64_t[]", (len(value) + 7) // 8)
        ffi.buffer(area)[: len(value)] = value
        header = ffi.cast("struct kvm_nested_state *", area)
        if header.size > len(value):  # the kernel would read on behind it
            raise SpecError(f"{self.name}: says that it has {header.size} bytes and has {len(value)}: it was cut short")
        call(owner.fd, self.set, header)


NESTED: Final[Part[bytes]] = _Nested("NESTED_STATE", "KVM_CAP_NESTED_STATE")
"""A guest's own guest (L2). Of hosts whose KVM can nest."""


# ---- of a VM


@attrs.frozen
class Clock:
    """A VM's kvmclock.

    Attributes:
        clock: nanoseconds that the guest reads.
        realtime: the host's time of day at that moment, in nanoseconds; None: this KVM does not tell (before 5.16).
            Written: the guest's clock goes on by the time of day that has passed since; None: it goes on from `clock`.
        host_tsc: the host's time stamp counter at that moment; None: it does not tell.
    """

    clock: int
    realtime: int | None = None
    host_tsc: int | None = None

    @classmethod
    def from_struct(cls, struct: Any) -> Clock:
        flags = struct.flags
        return cls(
            clock=struct.clock,
            realtime=struct.realtime if flags & lib.KVM_CLOCK_REALTIME else None,
            host_tsc=struct.host_tsc if flags & lib.KVM_CLOCK_HOST_TSC else None,
        )

    def to_struct(self) -> Any:
        flags = 0 if self.realtime is None else lib.KVM_CLOCK_REALTIME  # the kernel takes no other flag
        values = {"clock": self.clock, "flags": flags, "realtime": self.realtime or 0}
        return new_struct("struct orc_kvm_clock *", values)


CLOCK: Final[Part[Clock]] = StructPart(
    "CLOCK", "orc_kvm_clock", Clock.from_struct, Clock.to_struct, "KVM_CAP_ADJUST_CLOCK"
)
PIT: Final = opaque("PIT2", "kvm_pit_state2", "KVM_CAP_PIT_STATE2")
"""The in-kernel i8254. Needs `KvmVm.create_pit` (KvmError, ENXIO)."""

_CHIP: Final = ("kvm_irqchip", "KVM_CAP_IRQCHIP", "IRQCHIP")
PIC_MASTER: Final = opaque("PIC_MASTER", *_CHIP, chip_id=lib.KVM_IRQCHIP_PIC_MASTER)
PIC_SLAVE: Final = opaque("PIC_SLAVE", *_CHIP, chip_id=lib.KVM_IRQCHIP_PIC_SLAVE)
IOAPIC: Final = opaque("IOAPIC", *_CHIP, chip_id=lib.KVM_IRQCHIP_IOAPIC)
"""The three chips of an in-kernel irqchip (KvmError, ENXIO without). What is written must have been read before: a
structure of zeros breaks the routing of interrupts."""
