"""Descriptors and page tables of guests that start in protected or long mode.

Sources: Intel SDM vol. 3, 3.4.5 (segment descriptors), 4.5 (4-level paging).
"""

from __future__ import annotations

import functools
import struct
from typing import Final

from ...backend.entry import segment_of
from ...model.memory import PAGE, GiB, MiB

__all__ = ["CODE32", "CODE64", "DATA", "GDT", "MAPPED", "TABLE_PAGES", "page_tables"]

# Null, 32-bit code, 64-bit code, data: flat, present, ring 0, accessed. Linux wants 64-bit code as 0x10, data as 0x18.
_DESCRIPTORS: Final = (0, 0x00CF9B000000FFFF, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
GDT: Final = struct.pack("<4Q", *_DESCRIPTORS)
CODE32, CODE64, DATA = (segment_of(_DESCRIPTORS[number], number * 8) for number in (1, 2, 3))
MAPPED: Final = 4 * GiB
TABLE_PAGES: Final = 2 + MAPPED // GiB

PTE_PRESENT, PTE_WRITE, PTE_LARGE = 1 << 0, 1 << 1, 1 << 7


@functools.lru_cache(maxsize=16)  # building takes longer than the rest of a launch; a fleet has few sizes
def page_tables(base: int) -> bytes:
    """The first 4 GiB one to one, in 2 MiB pages: a PML4, a page-directory pointer table, four page directories."""
    directories = base + 2 * PAGE
    pml4 = struct.pack("<Q", (base + PAGE) | PTE_PRESENT | PTE_WRITE).ljust(PAGE, b"\0")
    count = MAPPED // GiB
    pointers = struct.pack(f"<{count}Q", *(directories + i * PAGE | PTE_PRESENT | PTE_WRITE for i in range(count)))
    entries = MAPPED // (2 * MiB)
    pages = struct.pack(f"<{entries}Q", *(i * 2 * MiB | PTE_PRESENT | PTE_WRITE | PTE_LARGE for i in range(entries)))
    return pml4 + pointers.ljust(PAGE, b"\0") + pages
