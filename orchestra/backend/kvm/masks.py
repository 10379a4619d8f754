"""CPU features in a CPUID table: which it has, and the table with those alone that a template shows.

Leaves that describe a hidden feature go with it, and so do its state in XSAVE's area and AMD's copies of its bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from ...model.cpu import CpuidBits, CpuTemplate
from ...model.cpufeatures import PLACES, REGISTER_NAMES, REGISTERS, Register
from .cpuid import INDEXED, CpuidEntry

__all__ = ["HYPERVISOR_LEAVES", "features_of", "has_features", "missing_features", "templated"]

HYPERVISOR_LEAVES: Final = range(0x4000_0000, 0x8000_0000)

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


def has_features(register: Register) -> bool:
    """Whether a register has feature bits, and no numbers. All of leaf 7 has, but for the number of its subleaves."""
    return register in REGISTERS or (register[0] == 7 and register != (7, 0, "eax"))


def templated(entries: list[CpuidEntry], template: CpuTemplate) -> list[CpuidEntry]:
    """What a template shows of a table."""
    rules = template.rules()
    offered = features_of(entries)
    shown = rules.shown(offered) | (offered & {"hypervisor"})
    only = rules.others == "hidden"
    gone = offered - shown

    def stays(one: CpuidEntry) -> bool:
        owner = _OWNERS.get(one.function)
        if owner in gone or (one.function == 0xD and "xsave" in gone):
            return False
        return not only or owner in shown or one.function in _KEPT or one.function in HYPERVISOR_LEAVES

    kept = _states([_masked(one, shown, gone, only) for one in entries if stays(one)], gone, shown if only else None)
    for bits in template.cpuid:
        kept = _with_bits(kept, bits)
    return kept


def _masked(entry: CpuidEntry, shown: frozenset[str], gone: frozenset[str], only: bool) -> CpuidEntry:
    """Without the feature bits that are gone. `only`: with those that are shown, and no bit besides."""
    changed = {}
    for name in REGISTER_NAMES:
        register = entry.function, entry.index, name
        if has_features(register):
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
