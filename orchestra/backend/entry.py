"""The entry state of a vCPU: all of its registers, as the boot spec needs them.

    REAL                          real mode, as after reset, with all segments at 0
    protected_mode(gdt, ...)      32-bit code in flat segments, no paging
    long_mode(gdt, cr3, ...)      64-bit code

Sources: Intel SDM vol. 3, 3.4.5 (segment descriptors), 9.8.5 (IA-32e initialisation), table 9-1 (after reset).
"""

from __future__ import annotations

import functools
from typing import Final, Literal

import attrs

from ..model.errors import SpecError
from .registers import DescriptorTable, Registers, Segment, SpecialRegisters

__all__ = [
    "APPLICATION_PROCESSOR",
    "REAL",
    "EntryState",
    "Mode",
    "long_mode",
    "protected_mode",
    "segment_of",
]

CR0_PE, CR0_ET, CR0_NE, CR0_NW, CR0_CD, CR0_PG = 1 << 0, 1 << 4, 1 << 5, 1 << 29, 1 << 30, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10


@attrs.frozen(kw_only=True, cache_hash=True)
class Mode:
    """The CPU mode in which a vCPU starts: the special registers, and the width of an address.

    All vCPUs and VMs that start alike share one `Mode`; modes are compared by their fields.
    """

    bits: Literal[16, 32, 64]
    special: SpecialRegisters


_START: Final = Registers()


@attrs.frozen(kw_only=True)
class EntryState:
    """One vCPU's registers.

    Attributes:
        mode: segments, tables and control registers. Its APIC base is ignored: the kernel knows which vCPU this is, and
            which vCPU is the boot processor.
        registers: the general registers, RIP and RFLAGS.
        msrs: model-specific registers that do not start as after reset: numbers with their values, in the order in
            which they are to be set.
        waits: the vCPU starts when another vCPU sends INIT and SIPI. Then only `msrs` counts of all these fields. Needs
            an irqchip.

    The FPU is not part of it: KVM makes vCPUs with FCW 0x37f and MXCSR 0x1f80, which is what kernels expect of a boot
    loader. (KVM_SET_FPU would not set MXCSR: arch/x86/kvm/x86.c leaves it out.)
    """

    mode: Mode
    registers: Registers = _START
    msrs: tuple[tuple[int, int], ...] = ()
    waits: bool = False


def segment_of(descriptor: int, selector: int) -> Segment:
    """The segment register that a CPU loads from that 64-bit descriptor.

    Raises:
        SpecError: the descriptor is not present, or of a system segment of 64-bit mode, which has 128 bits.
    """
    if not descriptor >> 47 & 1:
        raise SpecError(f"descriptor={descriptor:#x}: is not present: no CPU loads it")
    limit = (descriptor & 0xFFFF) | (descriptor >> 48 & 0xF) << 16
    granular = descriptor >> 55 & 1
    return Segment(
        base=(descriptor >> 16 & 0xFF_FFFF) | (descriptor >> 56 & 0xFF) << 24,
        limit=limit << 12 | 0xFFF if granular else limit,
        selector=selector,
        type=descriptor >> 40 & 0xF,
        present=1,
        dpl=descriptor >> 45 & 3,
        db=descriptor >> 54 & 1,
        s=descriptor >> 44 & 1,
        l=descriptor >> 53 & 1,
        g=granular,
        avl=descriptor >> 52 & 1,
    )


_DATA: Final = Segment()
_RESET: Final = SpecialRegisters(
    cs=Segment(type=0xB),
    ds=_DATA,
    es=_DATA,
    fs=_DATA,
    gs=_DATA,
    ss=_DATA,
    tr=Segment(type=0xB, s=0),  # a busy 32-bit TSS: the one type that VM entry takes in every mode
    ldt=Segment(type=2, s=0),
    gdt=DescriptorTable(),
    idt=DescriptorTable(),
    cr0=CR0_CD | CR0_NW | CR0_ET,
    cr2=0,
    cr3=0,
    cr4=0,
    cr8=0,
    efer=0,
    apic_base=0,
)

REAL: Final = Mode(bits=16, special=_RESET)
APPLICATION_PROCESSOR: Final = EntryState(mode=REAL, waits=True)
"""A vCPU that waits for INIT and SIPI, as on a PC."""


def _flat(gdt: DescriptorTable, code: Segment, data: Segment) -> SpecialRegisters:
    cr0 = CR0_PE | CR0_ET | CR0_NE
    return attrs.evolve(_RESET, cs=code, ds=data, es=data, fs=data, gs=data, ss=data, gdt=gdt, cr0=cr0)


@functools.lru_cache(maxsize=64)  # making a mode takes 30 us, a tenth of a launch; a fleet has few kinds of VMs
def protected_mode(gdt: DescriptorTable, code: Segment, data: Segment) -> Mode:
    """32-bit code without paging. `code` and `data` must be what `gdt` has (`segment_of`): guests load them again."""
    return Mode(bits=32, special=_flat(gdt, code, data))


@functools.lru_cache(maxsize=64)
def long_mode(gdt: DescriptorTable, code: Segment, data: Segment, cr3: int) -> Mode:
    """64-bit code, with page tables of four levels at `cr3`."""
    special = _flat(gdt, code, data)
    paged = attrs.evolve(special, cr0=special.cr0 | CR0_PG, cr3=cr3, cr4=CR4_PAE, efer=EFER_LME | EFER_LMA)
    return Mode(bits=64, special=paged)
