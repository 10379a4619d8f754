"""What CPUID tells a guest: the kernel's table in the kernel's own memory layout, ready to be set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from ...model.errors import SpecError
from ...native import ffi, lib
from ..registers import new_struct

__all__ = ["Cpuid", "CpuidEntry", "make_cpuid", "missing_features"]

INDEXED: Final = int(lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
KVM_LEAVES: Final = 0x4000_0000
RATES: Final = 0x4000_0010
"""EAX: kHz of the TSC, which the core fills in for each vCPU. EBX: kHz of the local APIC's timer."""
APIC_TIMER_KHZ: Final = 1_000_000  # KVM counts in nanoseconds (arch/x86/kvm/lapic.h, APIC_BUS_CYCLE_NS)

FEATURES: Final[Mapping[str, tuple[int, str, int]]] = {
    "fpu": (1, "edx", 0),
    "msr": (1, "edx", 5),
    "pae": (1, "edx", 6),
    "cx8": (1, "edx", 8),
    "cmov": (1, "edx", 15),
    "fxsr": (1, "edx", 24),
    "sse": (1, "edx", 25),
    "sse2": (1, "edx", 26),
    "lm": (0x8000_0001, "edx", 29),
}
"""CPU features by the names in /proc/cpuinfo: leaf, register and bit."""


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


# ---- made from what the host's KVM can give


def missing_features(supported: Iterable[CpuidEntry], needed: Iterable[str]) -> list[str]:
    """Which of the features, by the names in /proc/cpuinfo, the host's KVM does not give. Unknown names are missing."""
    found = {(one.function, register): getattr(one, register) for one in supported for register in ("ecx", "edx")}
    missing = []
    for name in needed:
        function, register, bit = FEATURES.get(name, (0, "ecx", 32))
        if not found.get((function, register), 0) >> bit & 1:
            missing.append(name)
    return missing


def make_cpuid(supported: Iterable[CpuidEntry], vcpus: int, local_apics: bool) -> list[CpuidEntry]:
    """What CPUID tells a guest with so many vCPUs. All that KVM supports, but for what is not so in a VM:

    - It is a guest, and may look for its hypervisor's leaves. The local APIC's timer has deadlines if there is one.
    - One package of as many cores as it has vCPUs, each of one thread. What the host's own topology is, a guest would
      read from leaves that KVM copies from the CPU that happens to answer.
    - No detection of bus locks and split locks by the guest: it would take its own measures against locks that the
      fleet counts and limits, and warn of each.
    - Where the TSC runs at one rate, a leaf with that rate, so that a kernel need not measure it.
    - No power management: turbo, energy bias and UMWAIT (which would keep a core asleep that others wait for) are the
      host's. No performance counters and no debug store, as no state of them is kept.

    The APIC ids are those of vCPU 0: `Cpuid.with_apic_id` and the core patch them for each.

    Parameters:
        supported: what KVM_GET_SUPPORTED_CPUID says.
        local_apics: it has an in-kernel irqchip.

    Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Linux, Documentation/virt/kvm/api.rst,
    KVM_GET_SUPPORTED_CPUID (TSC_DEADLINE), and cpuid.rst (leaves of KVM); VMware, "Mechanisms to determine if software
    is running in a VMware virtual machine" (0x40000010).
    """
    entries = [one for one in supported if one.function not in (0xB, 0x1F, RATES)]
    rates = local_apics and any(one.function == 0x80000007 and one.edx >> 8 & 1 for one in entries)  # invariant TSC
    has_topology = any(one.function == 0 and one.eax >= 0xB for one in entries)
    made = [_made(one, vcpus, local_apics) for one in entries]
    if rates:
        made = [attrs.evolve(one, eax=max(one.eax, RATES)) if one.function == KVM_LEAVES else one for one in made]
        made.append(CpuidEntry(function=RATES, ebx=APIC_TIMER_KHZ))
    return made + (_topology(0xB, vcpus) if has_topology else [])


def _width(vcpus: int) -> int:
    """Bits of the APIC id that number a package's processors."""
    return (vcpus - 1).bit_length()


def _made(entry: CpuidEntry, vcpus: int, local_apics: bool) -> CpuidEntry:
    many = vcpus > 1
    match entry.function:
        case 0x1:
            most = min(1 << _width(vcpus), 255)  # of 8 bits
            return attrs.evolve(
                entry,
                ebx=entry.ebx & 0xFF00FFFF | most << 16,
                ecx=_bits(entry.ecx, {31: True, 24: local_apics, 15: False}),  # hypervisor, TSC deadline, PDCM
                edx=_bits(entry.edx, {28: many, 21: False}),  # several processors, debug store
            )
        case 0x4 if entry.eax & 0x1F:  # a cache: who shares it, and cores in the package
            shared = vcpus - 1 if entry.eax >> 5 & 7 >= 3 else 0
            return attrs.evolve(entry, eax=entry.eax & 0x3FFF | min(shared, 0xFFF) << 14 | min(vcpus - 1, 63) << 26)
        case 0x6:  # turbo, energy bias
            return attrs.evolve(entry, eax=_bits(entry.eax, {1: False}), ecx=_bits(entry.ecx, {3: False}))
        case 0x7 if entry.index == 0:  # UMWAIT, bus-lock detection; IA32_CORE_CAPABILITIES, for split locks
            return attrs.evolve(entry, ecx=_bits(entry.ecx, {5: False, 24: False}), edx=_bits(entry.edx, {30: False}))
        case 0xA:
            return attrs.evolve(entry, eax=0, ebx=0, ecx=0, edx=0)
        case 0x80000008:  # AMD: cores less one, and the width of their numbers; Intel keeps these bits clear
            counts = min(vcpus - 1, 255) | _width(vcpus) << 12
            return attrs.evolve(entry, ecx=entry.ecx & ~0xF0FF | counts if entry.ecx & 0xF0FF else entry.ecx)
        case 0x8000001E:  # AMD: one thread to a core, one node
            return attrs.evolve(entry, ebx=entry.ebx & ~0xFFFF, ecx=entry.ecx & ~0x7FF)
    return entry


def _bits(value: int, bits: Mapping[int, bool]) -> int:
    for number, on in bits.items():
        value = value | 1 << number if on else value & ~(1 << number)
    return value


def _topology(function: int, vcpus: int) -> list[CpuidEntry]:
    """The levels of processors: threads of a core, cores of the package, and no more. KVM tells the first alone since
    Linux 6.2."""
    thread, core, none = 1, 2, 0
    levels = [(thread, 0, 1), (core, _width(vcpus), vcpus), (none, 0, 0)]
    return [
        CpuidEntry(function=function, index=index, flags=INDEXED, eax=width, ebx=count, ecx=kind << 8 | index)
        for index, (kind, width, count) in enumerate(levels)
    ]
