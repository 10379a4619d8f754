"""Which CPU a guest finds: the one place that makes CPUID, and the MSRs that tell what a CPU is.

    KVM_GET_SUPPORTED_CPUID
      → offer       what orchestra can show a guest at all: it is a guest; no power management, no counters
      → template    features by name, then bits (`model/cpu`); leaves and XSAVE areas of hidden features go with them
      → topology    one CPU for each vCPU, in cores and packages
      → the core    writes the APIC id of each vCPU, and the TSC's rate (`native/build.c`)

Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Linux, Documentation/virt/kvm/api.rst,
KVM_GET_SUPPORTED_CPUID (TSC_DEADLINE), and cpuid.rst (leaves of KVM); VMware, "Mechanisms to determine if software is
running in a VMware virtual machine" (0x40000010).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import attrs

from ...model.cpu import CPU_TEMPLATES, MSRS, CpuidBits, CpuTemplate
from ...model.cpufeatures import PLACES, REGISTER_NAMES, REGISTERS, Register
from ...model.topology import ONE_SOCKET, Topology
from .cpuid import INDEXED, CpuidEntry

__all__ = ["features_of", "lacking", "make_cpuid", "missing_features", "msr_values"]

KVM_LEAVES: Final = 0x4000_0000
RATES: Final = 0x4000_0010
"""EAX: kHz of the TSC, which the core fills in for each vCPU. EBX: kHz of the local APIC's timer."""
APIC_TIMER_KHZ: Final = 1_000_000  # KVM counts in nanoseconds (arch/x86/kvm/lapic.h, APIC_BUS_CYCLE_NS)

TOPOLOGY_LEAVES: Final = (0xB, 0x1F, 0x8000_0026)
ARCH_CAPABILITIES: Final = 0x10A
HOST: Final = CPU_TEMPLATES["host"]

_OWNERS: Final[Mapping[int, str]] = {
    0xF: "cqm",
    0x10: "rdt_a",
    0x12: "sgx",
    0x14: "intel_pt",
    0x19: "kl",
    0x1C: "arch_lbr",
    0x1D: "amx_tile",
    0x1E: "amx_tile",
    0x24: "avx10",
    0x8000_000A: "svm",
    0x8000_001B: "ibs",
}
"""Leaves that describe one feature."""
_AMD: Final = (*range(0x8000_0000, 0x8000_0009), 0x8000_001D, 0x8000_001E, 0x8000_0021)
_KEPT: Final = frozenset({0, 1, 2, 4, 6, 7, 0xD, *_AMD})
"""Leaves that a guest finds besides, if features that no list names are hidden."""
_STATES: Final[Mapping[int, str]] = {
    2: "avx",
    **dict.fromkeys((3, 4), "mpx"),
    **dict.fromkeys((5, 6, 7), "avx512f"),
    9: "pku",
    **dict.fromkeys((11, 12), "shstk"),
    14: "uintr",
    15: "arch_lbr",
    **dict.fromkeys((17, 18), "amx_tile"),
}
"""State components of XSAVE, by the feature that has them."""
_LEGACY_AREA: Final = 576  # bytes: FXSAVE's and the header
_AMD_COPIES: Final = 0x0183_F3FF
"""Bits of leaf 1, EDX that AMD repeats in EDX of leaf 0x80000001."""


# ---- what there is


def features_of(entries: Iterable[CpuidEntry]) -> frozenset[str]:
    """The features that a table has, by the names in /proc/cpuinfo."""
    found = dict.fromkeys(REGISTERS, 0)
    for one in entries:
        for name in REGISTER_NAMES:
            register = one.function, one.index, name
            if register in found:
                found[register] |= getattr(one, name)
    return frozenset(
        name for name, places in PLACES.items() if any(found[register] >> bit & 1 for register, bit in places)
    )


def missing_features(supported: Iterable[CpuidEntry], needed: Iterable[str]) -> list[str]:
    """Which of the features the host's KVM does not give. Unknown names are missing."""
    found = {(one.function, one.index): one for one in supported}

    def has(name: str) -> bool:
        places = [
            (found.get((leaf, subleaf)), register, bit) for (leaf, subleaf, register), bit in PLACES.get(name, ())
        ]
        return any(entry is not None and getattr(entry, register) >> bit & 1 for entry, register, bit in places)

    return [name for name in needed if not has(name)]


def lacking(
    supported: Sequence[CpuidEntry], msrs: Mapping[int, int], template: CpuTemplate, local_apics: bool
) -> list[str]:
    """What the template shows and this host can't give, by name; bits without a name by their place.

    Parameters:
        supported: what KVM_GET_SUPPORTED_CPUID says.
        msrs: the values that KVM gives the MSRs of templates; those that it has.
    """
    offered = [_offered(one, local_apics) for one in supported]
    missing = sorted(template.rules().features - features_of(offered))
    found = {(one.function, one.index): one for one in offered}
    for one in template.cpuid:
        entry = found.get((one.leaf, one.subleaf), CpuidEntry(function=one.leaf))
        for name, (_, value) in one.registers():
            if _has_features((one.leaf, one.subleaf, name)):
                missing += _named_bits((one.leaf, one.subleaf, name), value & ~getattr(entry, name))
    for msr in template.msrs:
        _, value = msr.parsed()
        if msr.number not in msrs:
            missing.append(f"MSR {msr.number:#x}")
        elif msr.number == ARCH_CAPABILITIES:
            lost = value & ~msrs[msr.number]
            missing += [f"{MSRS[msr.number]} bit {bit}" for bit in range(64) if lost >> bit & 1]
    return list(dict.fromkeys(missing))


def _has_features(register: Register) -> bool:
    """Whether a register has feature bits, and no numbers. All of leaf 7 has, but for the number of its subleaves."""
    return register in REGISTERS or (register[0] == 7 and register != (7, 0, "eax"))


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

    The APIC ids are those of vCPU 0: `Cpuid.with_apic_id` and the core patch them for each.

    Parameters:
        supported: what KVM_GET_SUPPORTED_CPUID says.
        local_apics: it has an in-kernel irqchip.
        template: what the host can give (`lacking`).
        topology: which fits the number of vCPUs.
    """
    entries = [_offered(one, local_apics) for one in supported if one.function not in (*TOPOLOGY_LEAVES, RATES)]
    made = _templated(entries, template)
    rates = local_apics and any(one.function == 0x8000_0007 and one.edx >> 8 & 1 for one in made)  # invariant TSC
    has_topology = any(one.function == 0 and one.eax >= 0xB for one in made)
    made = [_grouped(one, vcpus, topology) for one in made]
    if rates:
        made = [attrs.evolve(one, eax=max(one.eax, RATES)) if one.function == KVM_LEAVES else one for one in made]
        made.append(CpuidEntry(function=RATES, ebx=APIC_TIMER_KHZ))
    return made + (_levels(0xB, vcpus, topology) if has_topology else [])


def _offered(entry: CpuidEntry, local_apics: bool) -> CpuidEntry:
    match entry.function:
        case 0x1:
            return attrs.evolve(
                entry,
                ecx=_bits(entry.ecx, {31: True, 24: local_apics, 15: False}),  # hypervisor, TSC deadline, PDCM
                edx=_bits(entry.edx, {21: False}),  # debug store
            )
        case 0x6:  # turbo, energy bias
            return attrs.evolve(entry, eax=_bits(entry.eax, {1: False}), ecx=_bits(entry.ecx, {3: False}))
        case 0x7 if entry.index == 0:  # UMWAIT
            return attrs.evolve(entry, ecx=_bits(entry.ecx, {5: False}))
        case 0xA:
            return attrs.evolve(entry, eax=0, ebx=0, ecx=0, edx=0)
    return entry


def _bits(value: int, bits: Mapping[int, bool]) -> int:
    for number, on in bits.items():
        value = value | 1 << number if on else value & ~(1 << number)
    return value


# ---- the template


def _templated(entries: list[CpuidEntry], template: CpuTemplate) -> list[CpuidEntry]:
    rules = template.rules()
    offered = features_of(entries)
    shown = rules.shown(offered) | (offered & {"hypervisor"})
    only = rules.others == "hidden"
    gone = offered - shown

    def stays(one: CpuidEntry) -> bool:
        owner = _OWNERS.get(one.function)
        if owner in gone or (one.function == 0xD and "xsave" in gone):
            return False
        return not only or owner in shown or one.function in _KEPT or KVM_LEAVES <= one.function < 0x8000_0000

    kept = _states([_masked(one, shown, gone, only) for one in entries if stays(one)], gone, shown if only else None)
    for bits in template.cpuid:
        kept = _with_bits(kept, bits)
    return kept


def _masked(entry: CpuidEntry, shown: frozenset[str], gone: frozenset[str], only: bool) -> CpuidEntry:
    """Without the feature bits that are gone. `only`: with those that are shown, and no bit besides."""
    changed = {}
    for name in REGISTER_NAMES:
        register = entry.function, entry.index, name
        if _has_features(register):
            stays, goes = _mask(register, shown), _mask(register, gone)
            changed[name] = getattr(entry, name) & (stays if only else stays | ~goes)
    return attrs.evolve(entry, **changed) if changed else entry


def _mask(register: Register, features: frozenset[str]) -> int:
    """The bits of a register that these features have, by any of their names."""
    mask = sum(1 << bit for bit in {bit for one in features for where, bit in PLACES[one] if where == register})
    if register == (0x8000_0001, 0, "edx"):
        mask |= _mask((0x1, 0, "edx"), features) & _AMD_COPIES
    return mask


def _states(entries: list[CpuidEntry], gone: frozenset[str], shown: frozenset[str] | None) -> list[CpuidEntry]:
    """Without the XSAVE states of hidden features, and with the sizes of the rest. `shown`: nothing else is."""
    hidden = {state for state, feature in _STATES.items() if feature in gone}
    if shown is not None:
        hidden |= {state for state in range(2, 64) if _STATES.get(state) not in shown}
    if not hidden:
        return entries
    mask = sum(1 << state for state in hidden)
    sizes = [one.ebx + one.eax for one in entries if _is_state(one, hidden) is False and not one.ecx & 1]
    made = []
    for one in entries:
        if one.function == 0xD and one.index == 0:
            one = attrs.evolve(one, eax=one.eax & ~mask, edx=one.edx & ~(mask >> 32), ecx=max([_LEGACY_AREA, *sizes]))
        elif one.function == 0xD and one.index == 1:
            one = attrs.evolve(one, ecx=one.ecx & ~mask, edx=one.edx & ~(mask >> 32))
        if _is_state(one, hidden) is not True:
            made.append(one)
    return made


def _is_state(entry: CpuidEntry, hidden: set[int]) -> bool | None:
    """Whether an entry describes a hidden state of XSAVE; None: it describes none."""
    return entry.index in hidden if entry.function == 0xD and entry.index >= 2 else None


def _with_bits(entries: list[CpuidEntry], bits: CpuidBits) -> list[CpuidEntry]:
    leaf, place = bits.leaf, (bits.leaf, bits.subleaf)
    if not any((one.function, one.index) == place for one in entries):
        entries = [*entries, CpuidEntry(function=leaf, index=bits.subleaf)]
    indexed = bits.subleaf > 0 or any(one.function == leaf and one.flags & INDEXED for one in entries)
    made = []
    for one in entries:
        if one.function == leaf:
            changed = {} if one.index != bits.subleaf else dict(bits.registers())
            values = {name: getattr(one, name) & ~mask | value for name, (mask, value) in changed.items()}
            one = attrs.evolve(one, flags=one.flags | INDEXED if indexed else one.flags, **values)
        made.append(one)
    return made


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
