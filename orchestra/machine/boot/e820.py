"""The memory map that a kernel gets: what is RAM, and what it must leave alone.

Source: ACPI specification 6.5, chapter 15.
"""

from __future__ import annotations

from typing import Final

import attrs

from ...model import platform
from ...model.boot import Layout
from ...model.checks import fail

__all__ = ["MOST_ENTRIES", "RAM", "RESERVED", "Entry", "memory_map"]

RAM, RESERVED = 1, 2
MOST_ENTRIES: Final = 128
"""What boot_params has room for (E820_MAX_ENTRIES_ZEROPAGE)."""
_FIRMWARE: Final = range(platform.LOW_MEMORY.stop, platform.HIGH_MEMORY)


@attrs.frozen
class Entry:
    """A range of one kind."""

    span: range
    kind: int


def memory_map(layout: Layout) -> list[Entry]:
    """All ranges, by address. What no entry has is a hole, for BARs and interrupt controllers.

    What a PC has between 639 KiB and 1 MiB is reserved, the ACPI tables with it. So is ECAM, without which Linux does
    not use it (arch/x86/pci/mmconfig-shared.c). So are regions beside the RAM, which the kernel knows nothing about.

    Raises:
        SpecError: the VM has more regions than a kernel can be told of.
    """
    entries = [Entry(platform.LOW_MEMORY, RAM), Entry(_FIRMWARE, RESERVED), Entry(platform.ECAM, RESERVED)]
    for span in layout.ram:
        entries.append(Entry(range(max(span.start, platform.HIGH_MEMORY), span.stop), RAM))
    entries += [Entry(span, RESERVED) for span in layout.memory if span not in layout.ram]
    entries = sorted((one for one in entries if one.span), key=lambda one: one.span.start)
    if len(entries) > MOST_ENTRIES:
        regions = len(layout.memory) - len(layout.ram)
        raise fail("regions", f"<{regions}>", f"must be {MOST_ENTRIES - len(entries) + regions} at most for Linux")
    return entries
