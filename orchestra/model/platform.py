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
    "BOOT_PARAMS",
    "BOOT_STACK",
    "COMMAND_LINE",
    "ECAM",
    "EVENT_GSI",
    "GDT",
    "GENERATION_ID",
    "HIGH_MEMORY",
    "I8042_PORTS",
    "IO_APIC",
    "LOCAL_APIC",
    "LOW_MEMORY",
    "MOST_XAPIC",
    "NEW_GENERATION",
    "PAGE_TABLES",
    "PANIC_PORTS",
    "PCI_PORTS",
    "POWER_BUTTON",
    "RTC_PORTS",
    "START_INFO",
]

# ---- memory

GDT: Final = 0x500
"""Behind the BIOS data area, which a kernel may still read."""
START_INFO: Final = range(0x6000, 0x7000)
"""A kernel that is entered by PVH finds its boot information here, and any other in BOOT_PARAMS."""
BOOT_PARAMS: Final = range(0x7000, 0x8000)
BOOT_STACK: Final = 0x8FF0
PAGE_TABLES: Final = range(0x9000, 0xF000)
COMMAND_LINE: Final = range(0x2_0000, 0x3_0000)
LOW_MEMORY: Final = range(0x9_FC00)
"""What is free for all use below 640 KiB. A PC has its extended BIOS data area behind it."""
HIGH_MEMORY: Final = 1 * MiB
"""Where RAM goes on behind what a PC has for its video memory and firmware."""
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

MOST_XAPIC: Final = 255
"""vCPUs that the 8-bit APIC ids of the MADT's short entries and of the I/O APIC reach: 255 is everybody."""
