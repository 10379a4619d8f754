"""Entry by PVH: 32-bit protected mode without paging, and one structure with all that the kernel must know.

Source: Xen, docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from ...backend.entry import EntryState, protected_mode
from ...backend.memory import GuestMemory
from ...backend.registers import DescriptorTable, Registers
from ...model import platform
from .e820 import MOST_ENTRIES, Entry
from .tables import CODE32, DATA, GDT

__all__ = ["enter"]

_START_INFO: Final = struct.Struct("<IIIIQQQQII")
_MODULE: Final = struct.Struct("<QQQQ")
_ENTRY: Final = struct.Struct("<QQII")
MAGIC, VERSION = 0x336E_C578, 1
_MODULES_AT: Final = platform.START_INFO.start + _START_INFO.size + 8
_MAP_AT: Final = platform.START_INFO.start + 0x100
assert _MAP_AT + MOST_ENTRIES * _ENTRY.size <= platform.START_INFO.stop


def enter(
    memory: GuestMemory, entry: int, memory_map: Sequence[Entry], initrd: range | None, command_line: int, rsdp: int
) -> EntryState:
    """Write the structure, and return the state of the vCPU that boots."""
    if initrd is not None:
        memory.write(_MODULES_AT, _MODULE.pack(initrd.start, len(initrd), 0, 0))
    memory.write(_MAP_AT, b"".join(_ENTRY.pack(one.span.start, len(one.span), one.kind, 0) for one in memory_map))
    modules = (0, 0) if initrd is None else (1, _MODULES_AT)
    info = _START_INFO.pack(MAGIC, VERSION, 0, *modules, command_line, rsdp, _MAP_AT, len(memory_map), 0)
    memory.write(platform.START_INFO.start, info)
    gdt = DescriptorTable(base=platform.GDT, limit=len(GDT) - 1)
    return EntryState(
        mode=protected_mode(gdt, CODE32, DATA), registers=Registers(rip=entry, rbx=platform.START_INFO.start)
    )
