"""From the core's exit records to the named types of `orchestra.model.exits`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from ..model import exits
from . import ffi, lib
from .core import REASON_NUMBERS

__all__ = [
    "EVENT_BUS_LOCK",
    "KINDS",
    "RECORD_SIZE",
    "Fields",
    "build",
    "decode",
    "decode_all",
    "event_mask",
    "unpack",
]

# time rip wait arg[5] id reason flags has_rip data_size data[32] vm vcpu; a test compares it with the C struct.
_LAYOUT: Final = struct.Struct("=8QI2H2B32s2x2I12x")
RECORD_SIZE: Final = _LAYOUT.size
assert ffi.sizeof("struct orc_record") == RECORD_SIZE

SMM: Final = int(lib.KVM_RUN_X86_SMM)
BUS_LOCK: Final = int(lib.KVM_RUN_X86_BUS_LOCK)
GUEST_MODE: Final = int(lib.KVM_RUN_X86_GUEST_MODE)
OTHER_REASON: Final = int(lib.ORC_REASONS) - 1
EVENT_OTHERS: Final = 1 << (OTHER_REASON - 1)
EVENT_BUS_LOCK: Final = 1 << int(lib.ORC_EVENT_BUS_LOCK)

Fields: TypeAlias = tuple[Any, ...]
"""A record as `_LAYOUT` unpacks it."""
VM_FIELD, VCPU_FIELD = 14, 15
"""Where in it the numbers of the VM and of the vCPU are."""
Decoder: TypeAlias = Callable[[Any, tuple[int, int, int, int, int], bytes], exits.Exit]

# From (the common fields, arg[5], data) to the object, by reason: the order that describe() in kvm.c writes.
_make: Any = exits  # mypy takes whatever follows a starred argument for too many
_DECODERS: Final[dict[str, Decoder]] = {
    "unknown": lambda c, a, d: _make.UnknownExit(*c, a[0]),
    "exception": lambda c, a, d: _make.ExceptionExit(*c, a[0], a[1], a[2]),
    "io": lambda c, a, d: _make.Io(*c, a[0], a[1], a[2], a[3] == 1, d),
    "hypercall": lambda c, a, d: _make.Hypercall(*c, a[0], a[1:4]),
    "debug": lambda c, a, d: _make.Debug(*c, a[0], a[1], a[2], a[3]),
    "hlt": lambda c, a, d: _make.Hlt(*c),
    "mmio": lambda c, a, d: _make.Mmio(*c, a[0], a[1], a[2] == 1, d),
    "irq_window_open": lambda c, a, d: _make.IrqWindowOpen(*c),
    "shutdown": lambda c, a, d: _make.ShutdownExit(*c),
    "fail_entry": lambda c, a, d: _make.FailEntry(*c, a[0], a[1]),
    "intr": lambda c, a, d: _make.Interrupted(*c),
    "set_tpr": lambda c, a, d: _make.SetTpr(*c, a[0]),
    "tpr_access": lambda c, a, d: _make.TprAccess(*c, a[0], a[1] == 1),
    "nmi": lambda c, a, d: _make.Nmi(*c),
    "internal_error": lambda c, a, d: _make.InternalError(*c, a[0], d),
    "system_event": lambda c, a, d: _make.SystemEvent(*c, a[0], a[2 : 2 + min(a[1], 3)]),
    "ioapic_eoi": lambda c, a, d: _make.IoapicEoi(*c, a[0]),
    "hyperv": lambda c, a, d: _make.Hyperv(*c, a[0]),
    "x86_rdmsr": lambda c, a, d: _make.Rdmsr(*c, a[0], a[1]),
    "x86_wrmsr": lambda c, a, d: _make.Wrmsr(*c, a[0], a[1], a[2]),
    "dirty_ring_full": lambda c, a, d: _make.DirtyRingFull(*c),
    "x86_bus_lock": lambda c, a, d: _make.BusLock(*c),
    "xen": lambda c, a, d: _make.Xen(*c, a[0]),
    "notify": lambda c, a, d: _make.Notify(*c, a[0]),
    "memory_fault": lambda c, a, d: _make.MemoryFault(*c, a[0], a[1], a[2]),
}
_BY_NUMBER: Final = {REASON_NUMBERS[name]: decoder for name, decoder in _DECODERS.items()}
_KINDS: Final[dict[str, type[exits.Exit]]] = {
    kind.kernel_name: kind for kind in vars(exits).values() if isinstance(kind, type) and issubclass(kind, exits.Exit)
}
KINDS: Final[Mapping[int, type[exits.Exit]]] = MappingProxyType(
    {REASON_NUMBERS[name]: _KINDS[name] for name in _DECODERS}
)
"""The kernel's number of an exit reason → its type. What is not here is an `OtherExit`."""


def event_mask(kinds: tuple[type[exits.Exit], ...]) -> int:
    """The mask of `VcpuCore.subscribe` for subscribers of `kinds`."""
    mask = 0
    for kind in kinds:
        if issubclass(exits.BusLock, kind):
            mask |= EVENT_BUS_LOCK
        if issubclass(exits.OtherExit, kind):
            mask |= ((1 << OTHER_REASON) - 1) & ~sum(1 << number for number in REASON_NUMBERS.values())
            mask |= EVENT_OTHERS
        for name, number in REASON_NUMBERS.items():
            if issubclass(_KINDS[name], kind):
                mask |= 1 << number
    return mask


def unpack(record: Any) -> Fields:
    """The fields of one `struct orc_record *`, for `decode`."""
    return _LAYOUT.unpack(ffi.buffer(record, _LAYOUT.size))


def decode(fields: Fields, vm: str, vcpu: int) -> exits.Exit:
    """One record's fields as an exit of the named vCPU."""
    time, rip, wait, a0, a1, a2, a3, a4, _, reason, flags, has_rip, size, data, _, _ = fields
    common = (
        vm,
        vcpu,
        time,
        rip if has_rip else None,
        wait,
        flags & BUS_LOCK != 0,
        flags & GUEST_MODE != 0,
        flags & SMM != 0,
    )
    decoder = _BY_NUMBER.get(reason)
    if decoder is None:
        return exits.OtherExit(*common, reason)
    return decoder(common, (a0, a1, a2, a3, a4), data[:size])


def decode_all(records: bytes, names: Mapping[int, str]) -> list[exits.Exit]:
    """Records in a row as exits, given the names of VMs by the numbers in the records."""
    return [decode(fields, names[fields[VM_FIELD]], fields[VCPU_FIELD]) for fields in _LAYOUT.iter_unpack(records)]


def build(
    reason: str | int, *, flags: int = 0, rip: int | None = None, args: tuple[int, ...] = (), data: bytes = b""
) -> Any:
    """A `struct orc_record *` for an exit that no kernel made: what the scripted backend plays."""
    record = ffi.new("struct orc_record *")
    record.reason = REASON_NUMBERS[reason] if isinstance(reason, str) else reason
    record.flags = flags
    if rip is not None:
        record.rip, record.has_rip = rip, 1
    for index, value in enumerate(args):
        record.arg[index] = value
    record.data_size = min(len(data), len(record.data))
    ffi.memmove(record.data, data, record.data_size)
    return record
