"""The registers of an x86 vCPU as plain frozen data, shaped like the kernel's structures.

Field by field these are ``struct kvm_regs``, ``kvm_sregs``, ``kvm_segment``, ``kvm_dtable`` and ``kvm_debugregs`` of
Linux' ``arch/x86/include/uapi/asm/kvm.h``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import attrs

from ..model.errors import SpecError
from ..native import ffi, lib

__all__ = ["DebugRegisters", "DescriptorTable", "MpState", "Registers", "Segment", "SpecialRegisters"]


class MpState(IntEnum):
    """Whether a vCPU runs (KVM_GET_MP_STATE); the states past RUNNABLE need an in-kernel irqchip."""

    RUNNABLE = lib.KVM_MP_STATE_RUNNABLE
    UNINITIALIZED = lib.KVM_MP_STATE_UNINITIALIZED
    INIT_RECEIVED = lib.KVM_MP_STATE_INIT_RECEIVED
    HALTED = lib.KVM_MP_STATE_HALTED
    SIPI_RECEIVED = lib.KVM_MP_STATE_SIPI_RECEIVED


def new_struct(kind: str, values: Any) -> Any:
    """A kernel structure, such as ``"struct kvm_regs *"``, with `values`; SpecError names a value that does not fit."""
    try:
        return ffi.new(kind, values)
    except (OverflowError, TypeError, ValueError, IndexError) as error:
        what = repr(values)
        for name, value in values.items() if isinstance(values, Mapping) else ():
            try:
                ffi.new(kind, {name: value})
            except (OverflowError, TypeError, ValueError, IndexError):
                what = f"{name}={value!r}"
                break
        raise SpecError(f"{what}: must fit {kind.removesuffix(' *')} ({error})") from None


@attrs.frozen(kw_only=True)
class Registers:
    """The general registers (KVM_GET_REGS). The default is a CPU's after reset, but for `rip`."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2

    def as_dict(self) -> dict[str, int]:
        """By the registers' names, in this order."""
        return {name: getattr(self, name) for name in _REGISTERS}

    def to_struct(self) -> Any:
        """As a new ``struct kvm_regs *``. Raises SpecError for a value that is no unsigned 64-bit number."""
        return new_struct("struct kvm_regs *", self.as_dict())

    @classmethod
    def from_struct(cls, struct: Any) -> Registers:
        return cls(**{name: getattr(struct, name) for name in _REGISTERS})


_REGISTERS = tuple(field.name for field in attrs.fields(Registers))


@attrs.frozen(kw_only=True)
class Segment:
    """A segment register with its hidden part; `limit` in bytes, whatever `g` says."""

    base: int = 0
    limit: int = 0xFFFF
    selector: int = 0
    type: int = 3
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741  # the kernel's name
    g: int = 0
    avl: int = 0
    unusable: int = 0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _SEGMENT}

    @classmethod
    def from_struct(cls, struct: Any) -> Segment:
        return cls(**{name: getattr(struct, name) for name in _SEGMENT})


_SEGMENT = tuple(field.name for field in attrs.fields(Segment))


@attrs.frozen(kw_only=True)
class DescriptorTable:
    """GDTR or IDTR; `limit` is the table's size in bytes less one."""

    base: int = 0
    limit: int = 0xFFFF

    def as_dict(self) -> dict[str, int]:
        return {"base": self.base, "limit": self.limit}

    @classmethod
    def from_struct(cls, struct: Any) -> DescriptorTable:
        return cls(base=struct.base, limit=struct.limit)


@attrs.frozen(kw_only=True)
class SpecialRegisters:
    """Segments, descriptor tables and control registers (KVM_GET_SREGS). Change one with ``attrs.evolve``.

    `interrupt_bitmap` has the bit of an external interrupt that is injected and not yet delivered: 4 words of 64 bits.
    """

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable
    idt: DescriptorTable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: tuple[int, ...] = (0, 0, 0, 0)

    def to_struct(self) -> Any:
        """As a new ``struct kvm_sregs *``. Raises SpecError for a value that does not fit its field."""
        values: dict[str, Any] = {name: getattr(self, name).as_dict() for name in (*_SEGMENTS, *_TABLES)}
        values |= {name: getattr(self, name) for name in _CONTROL}
        return new_struct("struct kvm_sregs *", values | {"interrupt_bitmap": self.interrupt_bitmap})

    @classmethod
    def from_struct(cls, struct: Any) -> SpecialRegisters:
        values: dict[str, Any] = {name: Segment.from_struct(getattr(struct, name)) for name in _SEGMENTS}
        values |= {name: DescriptorTable.from_struct(getattr(struct, name)) for name in _TABLES}
        values |= {name: getattr(struct, name) for name in _CONTROL}
        return cls(**values, interrupt_bitmap=tuple(struct.interrupt_bitmap))


_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_TABLES = ("gdt", "idt")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


@attrs.frozen(kw_only=True)
class DebugRegisters:
    """DR0 to DR3, DR6 and DR7 as the guest sees them (KVM_GET_DEBUGREGS)."""

    db: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF0FF0
    dr7: int = 0x400
    flags: int = 0

    def to_struct(self) -> Any:
        """As a new ``struct kvm_debugregs *``. Raises SpecError for a value that does not fit its field."""
        values = {"db": self.db, "dr6": self.dr6, "dr7": self.dr7, "flags": self.flags}
        return new_struct("struct kvm_debugregs *", values)

    @classmethod
    def from_struct(cls, struct: Any) -> DebugRegisters:
        db0, db1, db2, db3 = struct.db
        return cls(db=(db0, db1, db2, db3), dr6=struct.dr6, dr7=struct.dr7, flags=struct.flags)
