"""Which CPU a guest finds: the one place that makes CPUID, and the MSRs that tell what a CPU is.

    KVM_GET_SUPPORTED_CPUID
      → offer       what orchestra can show a guest at all: it is a guest; no power management, no counters
      → template    features by name, then bits (`model/cpu`), in `masks`
      → topology    one CPU for each vCPU, in cores and packages
      → the core    writes the APIC id of each vCPU, and the TSC's rate (`native/build.c`)

Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Linux, Documentation/virt/kvm/api.rst,
KVM_GET_SUPPORTED_CPUID (TSC_DEADLINE), and cpuid.rst (leaves of KVM); VMware, "Mechanisms to determine if software is
running in a VMware virtual machine" (0x40000010).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import attrs

from ...model.cpu import CPU_TEMPLATES, MSRS, CpuTemplate
from ...model.cpufeatures import REGISTERS, Register
from ...model.topology import ONE_SOCKET, Topology
from .cpuid import INDEXED, CpuidEntry
from .masks import features_of, has_features, templated

__all__ = ["lacking", "make_cpuid", "msr_values", "tells_threads"]

KVM_LEAVES: Final = 0x4000_0000
RATES: Final = 0x4000_0010
"""EAX: kHz of the TSC, which the core fills in for each vCPU. EBX: kHz of the local APIC's timer."""
APIC_TIMER_KHZ: Final = 1_000_000  # KVM counts in nanoseconds (arch/x86/kvm/lapic.h, APIC_BUS_CYCLE_NS)

TOPOLOGY_LEAVES: Final = (0xB, 0x1F, 0x8000_0026)
ARCH_CAPABILITIES: Final = 0x10A
HOST: Final = CPU_TEMPLATES["host"]


# ---- what is made of it


def make_cpuid(
    supported: Iterable[CpuidEntry],
    vcpus: int,
    local_apics: bool,
    template: CpuTemplate = HOST,
    topology: Topology = ONE_SOCKET,
) -> list[CpuidEntry]:
    """What CPUID tells a guest with so many vCPUs: what KVM supports and the template shows, but for what is not so in
    a VM.


    - It is a guest, and may look for its hypervisor's leaves. The local APIC's timer has deadlines if there is one.
    - What the host's own topology is, it would read from leaves that KVM copies from the CPU that happens to answer.
    - Where the TSC runs at one rate, a leaf with that rate, so that a kernel need not measure it.
    - No power management: turbo, energy bias and UMWAIT (which would keep a core asleep that others wait for) are the
      host's. No performance counters and no debug store, as no state of them is kept.
    - AMD's CPUs have no IA32_ARCH_CAPABILITIES. KVM offers it for them as well, and some versions take it away again.

    The APIC ids are those of vCPU 0: `Cpuid.with_apic_id` and the core patch them for each.

    Parameters:
        supported: what KVM_GET_SUPPORTED_CPUID says.
        local_apics: it has an in-kernel irqchip.
        template: what the host can give (`lacking`).
        topology: which fits the number of vCPUs.
    """
    entries = [one for one in supported if one.function not in (*TOPOLOGY_LEAVES, RATES)]
    made = templated(_offer(entries, local_apics), template)
    rates = local_apics and any(one.function == 0x8000_0007 and one.edx >> 8 & 1 for one in made)  # invariant TSC
    has_topology = any(one.function == 0 and one.eax >= 0xB for one in made)
    made = [_grouped(one, vcpus, topology) for one in made]
    if rates:
        made = [attrs.evolve(one, eax=max(one.eax, RATES)) if one.function == KVM_LEAVES else one for one in made]
        made.append(CpuidEntry(function=RATES, ebx=APIC_TIMER_KHZ))
    return made + (_levels(0xB, vcpus, topology) if has_topology else [])


def _offer(supported: Iterable[CpuidEntry], local_apics: bool) -> list[CpuidEntry]:
    table = list(supported)
    amd = _is_amd(table)
    return [_offered(one, local_apics, amd) for one in table]


def _offered(entry: CpuidEntry, local_apics: bool, amd: bool) -> CpuidEntry:
    match entry.function:
        case 0x1:
            return attrs.evolve(
                entry,
                ecx=_bits(entry.ecx, {31: True, 24: local_apics, 15: False}),  # hypervisor, TSC deadline, PDCM
                edx=_bits(entry.edx, {21: False}),  # debug store
            )
        case 0x6:  # turbo, energy bias
            return attrs.evolve(entry, eax=_bits(entry.eax, {1: False}), ecx=_bits(entry.ecx, {3: False}))
        case 0x7 if entry.index == 0:  # UMWAIT, arch_capabilities
            edx = _bits(entry.edx, {29: False}) if amd else entry.edx
            return attrs.evolve(entry, ecx=_bits(entry.ecx, {5: False}), edx=edx)
        case 0xA:
            return attrs.evolve(entry, eax=0, ebx=0, ecx=0, edx=0)
    return entry


def _bits(value: int, bits: Mapping[int, bool]) -> int:
    for number, on in bits.items():
        value = value | 1 << number if on else value & ~(1 << number)
    return value


def tells_threads(made: Iterable[CpuidEntry]) -> bool:
    """Whether a guest can read from this table which vCPUs are threads of one core. On AMD it looks only if there is
    topoext (Linux, arch/x86/kernel/cpu/topology_amd.c; before 6.9, cpu/amd.c, amd_get_topology)."""
    table = list(made)
    return not _is_amd(table) or "topoext" in features_of(table)


def _is_amd(table: Sequence[CpuidEntry]) -> bool:
    vendors = [struct.pack("<III", one.ebx, one.edx, one.ecx) for one in table if one.function == 0]
    return bool({b"AuthenticAMD", b"HygonGenuine"}.intersection(vendors))


# ---- against a template


def lacking(
    supported: Sequence[CpuidEntry], msrs: Mapping[int, int], template: CpuTemplate, local_apics: bool
) -> list[str]:
    """What the template shows and this host can't give, by name; bits without a name by their place.

    Parameters:
        supported: what KVM_GET_SUPPORTED_CPUID says.
        msrs: the values that KVM gives the MSRs of templates; those that it has.
    """
    offered = _offer(supported, local_apics)
    missing = sorted(template.rules().features - features_of(offered))
    found = {(one.function, one.index): one for one in offered}
    for one in template.cpuid:
        entry = found.get((one.leaf, one.subleaf), CpuidEntry(function=one.leaf))
        for name, (_, value) in one.registers():
            if has_features((one.leaf, one.subleaf, name)):
                missing += _named_bits((one.leaf, one.subleaf, name), value & ~getattr(entry, name))
    for msr in template.msrs:
        _, value = msr.parsed()
        if msr.number not in msrs:
            missing.append(f"MSR {msr.number:#x}")
        elif msr.number == ARCH_CAPABILITIES:
            lost = value & ~msrs[msr.number]
            missing += [f"{MSRS[msr.number]} bit {bit}" for bit in range(64) if lost >> bit & 1]
    return list(dict.fromkeys(missing))


def _named_bits(register: Register, bits: int) -> Iterator[str]:
    leaf, subleaf, name = register
    names = REGISTERS.get(register, ())
    for bit in range(32):
        if bits >> bit & 1:
            known = names[bit] if bit < len(names) else "-"
            yield f"CPUID {leaf:#x}/{subleaf:#x}/{name} bit {bit}" if known == "-" else known


def msr_values(msrs: Mapping[int, int], template: CpuTemplate) -> tuple[tuple[int, int], ...]:
    """The MSRs that the template has, with their values."""
    values = []
    for one in template.msrs:
        mask, value = one.parsed()
        values.append((one.number, msrs[one.number] & ~mask | value))
    return tuple(values)


# ---- the topology


def _width(count: int) -> int:
    """Bits of the APIC id that number so many processors."""
    return (count - 1).bit_length()


def _grouped(entry: CpuidEntry, vcpus: int, topology: Topology) -> CpuidEntry:
    threads, package = topology.threads, topology.per_socket(vcpus)
    match entry.function:
        case 0x1:
            most = min(1 << _width(package), 255)  # of 8 bits
            edx = _bits(entry.edx, {28: package > 1})  # several processors
            return attrs.evolve(entry, ebx=entry.ebx & 0xFF00FFFF | most << 16, edx=edx)
        case (0x4 | 0x8000_001D) as leaf if entry.eax & 0x1F:  # a cache: who shares it, and cores in the package
            shared = min((package if entry.eax >> 5 & 7 >= 3 else threads) - 1, 0xFFF)
            cores = min(package // threads - 1, 63) if leaf == 0x4 else 0
            return attrs.evolve(entry, eax=entry.eax & 0x3FFF | shared << 14 | cores << 26)
        case 0x8000_0008:  # AMD: processors less one, and the width of their numbers; Intel keeps these bits clear
            counts = min(package - 1, 255) | _width(package) << 12
            return attrs.evolve(entry, ecx=entry.ecx & ~0xF0FF | counts if entry.ecx & 0xF0FF else entry.ecx)
        case 0x8000_001E:  # AMD: threads of a core, one node. The core writes which core
            return attrs.evolve(entry, ebx=entry.ebx & ~0xFFFF | threads - 1 << 8, ecx=entry.ecx & ~0x7FF)
    return entry


def _levels(function: int, vcpus: int, topology: Topology) -> list[CpuidEntry]:
    """The levels of processors: threads of a core, processors of the package, and no more. KVM tells the first alone
    since Linux 6.2."""
    thread, core, none = 1, 2, 0
    threads, package = topology.threads, topology.per_socket(vcpus)
    levels = [(thread, _width(threads), threads), (core, _width(package), package), (none, 0, 0)]
    return [
        CpuidEntry(function=function, index=index, flags=INDEXED, eax=width, ebx=count, ecx=kind << 8 | index)
        for index, (kind, width, count) in enumerate(levels)
    ]
