"""Where things are in a PC as orchestra makes it: the one place that has these numbers.

Loaders, ACPI tables and devices read them here. RAM is where `memory.ram_ranges` says, around the hole.
"""

from __future__ import annotations

from typing import Final

from .memory import MMIO_HOLE, KiB, MiB

__all__ = [
    "ACPI_EVENTS",
    "ACPI_PORTS",
    "ACPI_RESET",
    "ACPI_SLEEP_CONTROL",
    "ACPI_SLEEP_STATUS",
    "ACPI_TABLES",
    "BARS",
    "ECAM",
    "EVENT_GSI",
    "GENERATION_ID",
    "I8042_PORTS",
    "IO_APIC",
    "LOCAL_APIC",
    "NEW_GENERATION",
    "PANIC_PORTS",
    "PCI_PORTS",
    "POWER_BUTTON",
    "RTC_PORTS",
]

# ---- memory

ACPI_TABLES: Final = range(0xE_0000, 0xF_F000)
"""Reserved in the memory map. A guest without the boot protocol's pointer looks for the RSDP from 0xe0000 on."""
GENERATION_ID: Final = range(0xF_F000, 0xF_F010)
"""In a page of its own, as Microsoft's "Virtual Machine Generation ID" wants it."""
BARS: Final = range(MMIO_HOLE.start, MMIO_HOLE.start + 512 * MiB)
ECAM: Final = range(0xE000_0000, 0xE000_0000 + 1 * MiB)
"""PCI configuration space: 4 KiB for each of the 8 functions of each of the 32 devices of bus 0, the only one."""
IO_APIC: Final = 0xFEC0_0000
LOCAL_APIC: Final = 0xFEE0_0000

# ---- ports

I8042_PORTS: Final = range(0x64, 0x65)
RTC_PORTS: Final = range(0x70, 0x72)
PANIC_PORTS: Final = range(0x505, 0x506)
PCI_PORTS: Final = range(0xCF8, 0xD00)
"""PCI configuration mechanism 1: an address, and data."""
ACPI_PORTS: Final = range(0x600, 0x610)
ACPI_SLEEP_CONTROL: Final = 0x600
ACPI_SLEEP_STATUS: Final = 0x601
ACPI_RESET: Final = 0x602
ACPI_EVENTS: Final = 0x604
"""4 bytes: what happened since the last read, as these bits."""
POWER_BUTTON: Final = 1 << 0
NEW_GENERATION: Final = 1 << 1

# ---- interrupt lines

EVENT_GSI: Final = 5
"""Of the generic event device. 4 is the serial port's."""

assert ECAM.start >= BARS.stop
assert ACPI_TABLES.stop <= GENERATION_ID.start < 1024 * KiB
