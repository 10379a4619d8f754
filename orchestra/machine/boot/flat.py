"""Flat images: the guest's memory and first CPU state in 16, 32 and 64-bit mode.

Sources: Intel SDM vol. 3, 3.4.5 (segment descriptors), 4.5 (4-level paging), 9.8.5 (IA-32e initialisation).
"""

from __future__ import annotations

import functools
import struct
from typing import Final

from ...backend import EntryState
from ...backend.memory import GuestMemory
from ...model.spec import STACKS, GiB, MiB, VmSpec

__all__ = ["load"]

PAGE: Final = 4096
# Null, 32-bit code, 64-bit code, data: flat, present, ring 0, accessed.
_GDT: Final = struct.pack("<4Q", 0, 0x00CF9B000000FFFF, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
CODE32: Final = 1 * 8
CODE64: Final = 2 * 8
DATA: Final = 3 * 8
MAPPED: Final = 4 * GiB

CR0_PE, CR0_ET, CR0_NE, CR0_PG = 1 << 0, 1 << 4, 1 << 5, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
PTE_PRESENT, PTE_WRITE, PTE_LARGE = 1 << 0, 1 << 1, 1 << 7


@functools.lru_cache(maxsize=16)  # building them takes longer than the rest of a launch; fleets are of a few sizes
def _page_tables(base: int) -> bytes:
    """The first 4 GiB one to one, in 2 MiB pages: a PML4, a page-directory pointer table, four page directories."""
    directories = base + 2 * PAGE
    pml4 = struct.pack("<Q", (base + PAGE) | PTE_PRESENT | PTE_WRITE).ljust(PAGE, b"\0")
    count = MAPPED // GiB
    pointers = struct.pack(f"<{count}Q", *(directories + i * PAGE | PTE_PRESENT | PTE_WRITE for i in range(count)))
    entries = MAPPED // (2 * MiB)
    pages = struct.pack(f"<{entries}Q", *(i * 2 * MiB | PTE_PRESENT | PTE_WRITE | PTE_LARGE for i in range(entries)))
    return pml4 + pointers.ljust(PAGE, b"\0") + pages


def load(spec: VmSpec, memory: GuestMemory) -> list[EntryState]:
    """Write the image, and the tables that its mode needs; return where each vCPU starts."""
    image = spec.boot
    memory.write(image.load, image.code)
    if image.mode == 16:
        return [EntryState(mode=16, rip=image.start, rdi=index) for index in range(spec.vcpus)]

    tables = spec.tables
    gdt = tables.stop - PAGE
    memory.write(gdt, _GDT)
    cr0 = CR0_PE | CR0_ET | CR0_NE
    cr3 = cr4 = efer = 0
    if image.mode == 64:
        memory.write(tables.start, _page_tables(tables.start))
        cr0, cr3, cr4, efer = cr0 | CR0_PG, tables.start, CR4_PAE, EFER_LME | EFER_LMA
    return [
        EntryState(
            mode=image.mode,
            rip=image.start,
            rsp=spec.stacks.stop - index * PAGE if index < STACKS else 0,
            rdi=index,
            cr0=cr0,
            cr3=cr3,
            cr4=cr4,
            efer=efer,
            gdt=(gdt, len(_GDT) - 1),
            code_selector=CODE64 if image.mode == 64 else CODE32,
            data_selector=DATA,
        )
        for index in range(spec.vcpus)
    ]
