"""Flat images: the guest's memory and first CPU state in 16, 32 and 64-bit mode.

Sources: Intel SDM vol. 3, 3.4.5 (segment descriptors), 4.5 (4-level paging).
"""

from __future__ import annotations

import functools
import struct
from typing import Final

from ...backend.entry import APPLICATION_PROCESSOR, REAL, EntryState, Mode, long_mode, protected_mode, segment_of
from ...backend.memory import GuestMemory
from ...backend.registers import DescriptorTable, Registers
from ...model.boot import STACKS, FlatImage, Layout
from ...model.memory import PAGE, GiB, MiB

__all__ = ["load"]

# Null, 32-bit code, 64-bit code, data: flat, present, ring 0, accessed.
_DESCRIPTORS: Final = (0, 0x00CF9B000000FFFF, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
_GDT: Final = struct.pack("<4Q", *_DESCRIPTORS)
CODE32, CODE64, DATA = (segment_of(_DESCRIPTORS[number], number * 8) for number in (1, 2, 3))
MAPPED: Final = 4 * GiB

PTE_PRESENT, PTE_WRITE, PTE_LARGE = 1 << 0, 1 << 1, 1 << 7


@functools.lru_cache(maxsize=16)  # building takes longer than the rest of a launch; a fleet has few sizes
def _page_tables(base: int) -> bytes:
    """The first 4 GiB one to one, in 2 MiB pages: a PML4, a page-directory pointer table, four page directories."""
    directories = base + 2 * PAGE
    pml4 = struct.pack("<Q", (base + PAGE) | PTE_PRESENT | PTE_WRITE).ljust(PAGE, b"\0")
    count = MAPPED // GiB
    pointers = struct.pack(f"<{count}Q", *(directories + i * PAGE | PTE_PRESENT | PTE_WRITE for i in range(count)))
    entries = MAPPED // (2 * MiB)
    pages = struct.pack(f"<{entries}Q", *(i * 2 * MiB | PTE_PRESENT | PTE_WRITE | PTE_LARGE for i in range(entries)))
    return pml4 + pointers.ljust(PAGE, b"\0") + pages


def load(image: FlatImage, layout: Layout, memory: GuestMemory) -> list[EntryState]:
    """Write the image and the tables that its mode needs; return the entry state of each vCPU."""
    memory.write(image.load, image.code)
    mode, stack = REAL, 0
    if image.mode != 16:
        mode, stack = _write_tables(image, layout, memory), image.stacks(layout).stop
    started = layout.vcpus if image.starts == "all" else 1
    return [
        EntryState(
            mode=mode,
            registers=Registers(
                rip=image.start, rdi=index, rsp=stack - index * PAGE if stack and index < STACKS else 0
            ),
        )
        for index in range(started)
    ] + [APPLICATION_PROCESSOR] * (layout.vcpus - started)


def _write_tables(image: FlatImage, layout: Layout, memory: GuestMemory) -> Mode:
    tables = image.tables(layout)
    gdt = DescriptorTable(base=tables.stop - PAGE, limit=len(_GDT) - 1)
    memory.write(gdt.base, _GDT)
    if image.mode == 32:
        return protected_mode(gdt, CODE32, DATA)
    memory.write(tables.start, _page_tables(tables.start))
    return long_mode(gdt, CODE64, DATA, tables.start)
