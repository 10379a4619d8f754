"""The ACPI tables of a PC without fixed hardware: RSDP → XSDT → FADT (→ DSDT), MADT, MCFG.

    RSDP       where the kernel begins, at the start of `platform.ACPI_TABLES`
    FADT       hardware-reduced: sleep and reset are registers, events come by a generic event device
    MADT       one local APIC for each vCPU, and the I/O APIC
    MCFG       where PCI configuration space is
    DSDT       the devices that can't be found by asking: host bridge, power button, clock, serial port, ...

Source: ACPI specification 6.5: 5.2 (tables), 4.1 (hardware-reduced), 5.6.9 (generic event device), 4.8.3.7 (sleep
registers); PCI firmware specification 3.3, 4.1.2 (MCFG); Microsoft, "Virtual Machine Generation ID".
"""

from __future__ import annotations

import struct
from typing import Final

from ...backend.memory import GuestMemory
from ...model import platform
from ...model.boot import Layout
from ...model.devices import Serial
from ...model.linux import check_apic_ids
from . import aml

__all__ = ["build", "write_tables"]

HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
OEM: Final = b"ORCHES"
CREATOR: Final = b"ORCH"
# FADT flags (table 5.10). In hardware-reduced mode a set button flag means that there is no fixed button.
_WBINVD, _NO_FIXED_POWER_BUTTON, _NO_FIXED_SLEEP_BUTTON, _RESET_REGISTER, _HW_REDUCED = 0, 4, 5, 10, 20
_FLAGS: Final = sum(
    1 << bit for bit in (_WBINVD, _NO_FIXED_POWER_BUTTON, _NO_FIXED_SLEEP_BUTTON, _RESET_REGISTER, _HW_REDUCED)
)
_NO_VGA: Final = 1 << 2
"""IAPC_BOOT_ARCH (table 5.11). Bit 1 would announce a keyboard controller, for which the kernel would look for long."""

PRESSED, CHANGED = 0x80, 0x80
"""What a device is notified of: tables 5.184 (button), and Microsoft's paper for the generation id."""


def build(layout: Layout) -> dict[int, bytes]:
    """The tables of a VM, by guest-physical address.

    Raises:
        SpecError: it has more vCPUs than the tables have room for.
    """
    check_apic_ids(layout.vcpus)
    placed: dict[int, bytes] = {}
    next_address = platform.ACPI_TABLES.start + 64  # behind the RSDP

    def place(table: bytes) -> int:
        nonlocal next_address
        address = next_address
        placed[address] = table
        next_address = (address + len(table) + 15) & ~15
        return address

    dsdt = place(_table(b"DSDT", 2, _dsdt(layout)))
    tables = [place(_fadt(dsdt)), place(_madt(layout.vcpus)), place(_mcfg())]
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    placed[platform.ACPI_TABLES.start] = _rsdp(xsdt)
    assert next_address <= platform.ACPI_TABLES.stop  # 255 vCPUs take 2 KiB
    return placed


def write_tables(layout: Layout, memory: GuestMemory, generation: bytes) -> int:
    """Write the tables, and the VM generation id, into guest memory. Returns the address of the RSDP.

    Parameters:
        generation: 16 bytes that no other VM has.

    Raises:
        SpecError: as `build`.
    """
    for address, table in build(layout).items():
        memory.write(address, table)
    memory.write(platform.GENERATION_ID.start, generation)
    return platform.ACPI_TABLES.start


def _checked(table: bytes, at: int, length: int | None = None) -> bytes:
    """With the byte at `at` such that the first `length` bytes add up to 0."""
    sum_of = sum(table[:length]) & 0xFF
    return table[:at] + bytes([(table[at] - sum_of) & 0xFF]) + table[at + 1 :]


def _table(signature: bytes, revision: int, content: bytes) -> bytes:
    identity = b"ORCH" + signature
    header = HEADER.pack(signature, HEADER.size + len(content), revision, 0, OEM, identity, 1, CREATOR, 1)
    return _checked(header + content, at=9)


def _rsdp(xsdt: int) -> bytes:
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM, 2, 0)  # no RSDT: it has 32-bit addresses
    whole = first + struct.pack("<IQB3x", 36, xsdt, 0)
    return _checked(_checked(whole, at=8, length=20), at=32)


def _register(port: int) -> bytes:
    """A generic address: 8 bits of I/O space, accessed as a byte."""
    return struct.pack("<BBBBQ", aml.SYSTEM_IO, 8, 0, 1, port)


def _fadt(dsdt: int) -> bytes:
    content = bytearray(276 - HEADER.size)

    def put(offset: int, value: bytes) -> None:  # offsets as the specification counts them, from the header on
        content[offset - HEADER.size : offset - HEADER.size + len(value)] = value

    put(109, struct.pack("<H", _NO_VGA))
    put(112, struct.pack("<I", _FLAGS))
    put(116, _register(platform.ACPI_RESET))
    put(128, bytes([1]))  # what is written there
    put(131, bytes([5]))  # minor revision
    put(140, struct.pack("<Q", dsdt))
    put(244, _register(platform.ACPI_SLEEP_CONTROL))
    put(256, _register(platform.ACPI_SLEEP_STATUS))
    put(268, CREATOR.ljust(8))  # hypervisor vendor
    return _table(b"FACP", 6, bytes(content))


def _madt(vcpus: int) -> bytes:
    local_apic, enabled, io_apic = 0, 1, 1
    entries = [struct.pack("<BBBBI", local_apic, 8, index, index, enabled) for index in range(vcpus)]
    entries.append(struct.pack("<BBBBII", io_apic, 12, 0, 0, platform.IO_APIC, 0))
    return _table(b"APIC", 5, struct.pack("<II", platform.LOCAL_APIC, 0) + b"".join(entries))


def _mcfg() -> bytes:
    last_bus = len(platform.ECAM) // (1 << 20) - 1
    return _table(b"MCFG", 1, bytes(8) + struct.pack("<QHBBI", platform.ECAM.start, 0, 0, last_bus, 0))


# ---- the DSDT


def _dsdt(layout: Layout) -> bytes:
    serial = next((one for one in layout.devices if isinstance(one, Serial)), None)
    devices = [_host_bridge(), _reserved(), _power_button(), _generation_id(), _events(), _clock(), _panic()]
    if serial is not None:
        devices.append(_serial(serial))
    sleep_type_of_s5 = aml.integer(5)
    return aml.scope("\\_SB", *devices) + aml.name("\\_S5", aml.package(sleep_type_of_s5, aml.integer(0)))


def _numbered(hid: bytes, *terms: bytes) -> tuple[bytes, ...]:
    return (aml.name("_HID", hid), aml.name("_UID", aml.integer(0)), *terms)


def _found_at(*descriptors: bytes) -> bytes:
    return aml.name("_CRS", aml.resources(*descriptors))


def _host_bridge() -> bytes:
    address_ports = range(0xCF8, 0xD00)
    return aml.device(
        "PCI0",
        *_numbered(aml.eisa_id("PNP0A08"), aml.name("_CID", aml.eisa_id("PNP0A03"))),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        _found_at(
            aml.bus_numbers(range(1)),
            aml.io_ports(address_ports),
            aml.io_window(range(address_ports.start)),
            aml.io_window(range(address_ports.stop, 1 << 16)),
            aml.memory_window(platform.BARS),
        ),
    )


def _reserved() -> bytes:
    """A motherboard resource. Linux takes no ECAM that is neither one nor in the memory map (pci/mmconfig-shared.c)."""
    return aml.device("MBRD", *_numbered(aml.eisa_id("PNP0C02"), _found_at(aml.memory(platform.ECAM))))


def _power_button() -> bytes:
    return aml.device("PWRB", *_numbered(aml.eisa_id("PNP0C0C")))


def _generation_id() -> bytes:
    low, high = platform.GENERATION_ID.start & 0xFFFF_FFFF, platform.GENERATION_ID.start >> 32
    return aml.device(
        "VGEN",
        *_numbered(aml.string("ORCH0001"), aml.name("_CID", aml.string("VM_Gen_Counter"))),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(low), aml.integer(high))),
    )


def _events() -> bytes:
    """The generic event device: its interrupt has the guest read, and so clear, the register of what happened."""
    return aml.device(
        "GED0",
        *_numbered(aml.string("ACPI0013"), _found_at(aml.interrupt(platform.EVENT_GSI, edge=True))),
        aml.operation_region("EREG", aml.SYSTEM_IO, platform.ACPI_EVENTS, 4),
        aml.field("EREG", 4, {"ESEL": 32}),
        aml.method(
            "_EVT",
            1,
            aml.store(aml.named("ESEL"), aml.LOCAL0),
            _if_happened(platform.POWER_BUTTON, aml.notify("PWRB", PRESSED)),
            _if_happened(platform.NEW_GENERATION, aml.notify("VGEN", CHANGED)),
            serialized=True,
        ),
    )


def _if_happened(event: int, then: bytes) -> bytes:
    return aml.if_(aml.bit_and(aml.LOCAL0, aml.integer(event)), then)


def _clock() -> bytes:
    return aml.device("RTC0", *_numbered(aml.eisa_id("PNP0B00"), _found_at(aml.io_ports(platform.RTC_PORTS))))


def _panic() -> bytes:
    """QEMU's pvpanic, as Linux's drivers/misc/pvpanic/pvpanic-mmio.c finds it."""
    return aml.device("PANC", *_numbered(aml.string("QEMU0001"), _found_at(aml.io_ports(platform.PANIC_PORTS))))


def _serial(serial: Serial) -> bytes:
    ports = serial.wiring().ports
    assert ports is not None
    lines = [] if serial.irq is None else [aml.interrupt(serial.irq, edge=True)]
    return aml.device("COM1", *_numbered(aml.eisa_id("PNP0501"), _found_at(aml.io_ports(ports), *lines)))
