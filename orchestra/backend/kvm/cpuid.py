"""What CPUID tells a guest: the kernel's table in the kernel's own memory layout, ready to be set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import attrs

from ...model.errors import SpecError
from ...native import ffi, lib
from ..registers import new_struct

__all__ = ["INDEXED", "Cpuid", "CpuidEntry"]

INDEXED: Final = int(lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
"""A flag of entries whose subleaf counts."""


@attrs.frozen(kw_only=True)
class CpuidEntry:
    """One leaf (``struct kvm_cpuid_entry2``); `index` (the subleaf) counts only if `flags` says so."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


_ENTRY = tuple(field.name for field in attrs.fields(CpuidEntry))


class Cpuid:
    """A CPUID table in a ``struct kvm_cpuid2`` of its own.

    One table serves a whole fleet: `with_apic_id` patches it in place for the vCPU at hand, which takes a microsecond
    where building a table takes a hundred. So it belongs to one thread.

    Parameters:
        buffer: a ``struct kvm_cpuid2 *`` as KVM_GET_SUPPORTED_CPUID fills it; kept.

    Attributes:
        buffer: that pointer.
    """

    __slots__ = ("buffer",)

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __len__(self) -> int:
        return int(self.buffer.nent)

    @classmethod
    def from_entries(cls, entries: Iterable[CpuidEntry]) -> Cpuid:
        """A table of `entries`. Raises SpecError for a value that is no unsigned 32-bit number."""
        structs = [
            new_struct("struct kvm_cpuid_entry2 *", {name: getattr(entry, name) for name in _ENTRY})[0]
            for entry in entries
        ]
        return cls(ffi.new("struct kvm_cpuid2 *", {"nent": len(structs), "entries": structs}))

    def entries(self) -> list[CpuidEntry]:
        """A copy as plain data, to look at or to change and give to `from_entries`."""
        buffer = self.buffer
        return [CpuidEntry(**{name: getattr(buffer.entries[i], name) for name in _ENTRY}) for i in range(buffer.nent)]

    def find(self, function: int, index: int = 0) -> CpuidEntry | None:
        """The leaf, or None if the table has none such."""
        for entry in self.entries():
            indexed = entry.flags & lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            if entry.function == function and (not indexed or entry.index == index):
                return entry
        return None

    def with_apic_id(self, index: int) -> Any:
        """Patch the table in place for the vCPU number `index` and return its buffer.

        KVM gives a vCPU its number as APIC id; a guest that reads another one from CPUID starts the wrong CPUs.
        """
        if not 0 <= index <= 0xFFFF_FFFF:
            raise SpecError(f"index={index!r}: must be a vCPU number, from 0")
        lib.orc_cpuid_set_apic_id(self.buffer, index)
        return self.buffer
