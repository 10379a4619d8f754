"""Flat images: the guest's memory and first CPU state in 16, 32 and 64-bit mode."""

from __future__ import annotations

from ...backend.entry import APPLICATION_PROCESSOR, REAL, EntryState, Mode, long_mode, protected_mode
from ...backend.memory import GuestMemory
from ...backend.registers import DescriptorTable, Registers
from ...model.boot import STACKS, FlatImage, Layout
from ...model.memory import PAGE
from .tables import CODE32, CODE64, DATA, GDT, page_tables

__all__ = ["load"]


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
    gdt = DescriptorTable(base=tables.stop - PAGE, limit=len(GDT) - 1)
    memory.write(gdt.base, GDT)
    if image.mode == 32:
        return protected_mode(gdt, CODE32, DATA)
    memory.write(tables.start, page_tables(tables.start))
    return long_mode(gdt, CODE64, DATA, tables.start)
