"""The ACPI tables: their checksums and addresses, and what ACPICA's disassembler and compiler say of them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import orchestra as orc
from orchestra.backend.memory import GuestMemory
from orchestra.machine.boot import acpi
from orchestra.model import platform

SIGNATURES = {b"DSDT", b"FACP", b"APIC", b"MCFG", b"XSDT"}


def spec_of(vcpus: int = 1, devices: tuple[orc.DeviceSpec, ...] = (orc.Serial(),)) -> orc.VmSpec:
    boot = orc.FlatImage(code=b"\xf4")
    return orc.VmSpec(name="pc", boot=boot, memory=2 * orc.MiB, vcpus=vcpus, irqchip=True, devices=devices)


def table_named(signature: bytes, spec: orc.VmSpec | None = None) -> bytes:
    return next(table for table in acpi.build((spec or spec_of()).layout).values() if table[:4] == signature)


def test_all_tables_add_up_to_zero_and_have_the_length_that_they_say():
    placed = acpi.build(spec_of(vcpus=4).layout)
    rsdp = placed.pop(platform.ACPI_TABLES.start)
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
    assert {table[:4] for table in placed.values()} == SIGNATURES
    for table in placed.values():
        assert sum(table) % 256 == 0
        assert struct.unpack_from("<I", table, 4) == (len(table),)


def test_each_pointer_leads_to_the_table_that_it_should():
    placed = acpi.build(spec_of().layout)
    rsdp = placed[platform.ACPI_TABLES.start]
    assert rsdp.startswith(b"RSD PTR ")
    (xsdt,) = struct.unpack_from("<Q", rsdp, 24)
    pointers = [pointer for (pointer,) in struct.iter_unpack("<Q", placed[xsdt][36:])]
    assert [placed[pointer][:4] for pointer in pointers] == [b"FACP", b"APIC", b"MCFG"]
    (dsdt,) = struct.unpack_from("<Q", placed[pointers[0]], 140)
    assert placed[dsdt][:4] == b"DSDT"


def test_tables_of_the_largest_vm_stay_within_their_place_and_do_not_overlap():
    end = platform.ACPI_TABLES.start
    for address, table in sorted(acpi.build(spec_of(vcpus=platform.MOST_XAPIC).layout).items()):
        assert address >= end
        assert address % 16 == 0
        end = address + len(table)
    assert end <= platform.ACPI_TABLES.stop


def test_more_vcpus_than_apic_ids_of_8_bits_are_refused():
    with pytest.raises(orc.SpecError, match=r"vcpus=256: .* at most 255"):
        acpi.build(spec_of(vcpus=256).layout)


def test_each_vcpu_has_a_local_apic_with_its_number():
    madt = table_named(b"APIC", spec_of(vcpus=3))
    assert struct.unpack_from("<I", madt, 36) == (platform.LOCAL_APIC,)
    assert [madt[44 + 8 * index :][:8] for index in range(3)] == [
        bytes([0, 8, index, index, 1, 0, 0, 0]) for index in range(3)
    ]
    assert madt[44 + 24 :] == struct.pack("<BBBBII", 1, 12, 0, 0, platform.IO_APIC, 0)


def test_writing_puts_the_tables_and_the_generation_id_into_memory():
    spec = spec_of()
    memory = GuestMemory(spec)
    try:
        generation = bytes(range(16))
        assert acpi.write_tables(spec.layout, memory, generation) == platform.ACPI_TABLES.start
        for address, table in acpi.build(spec.layout).items():
            assert memory.read(address, len(table)) == table
        assert memory.read(platform.GENERATION_ID.start, 16) == generation
    finally:
        memory.close()


@pytest.fixture
def disassembled(tmp_path: Path):
    """Disassembles a table by `iasl`, and compiles the result again: no error, warning or remark may come of it."""
    if not shutil.which("iasl"):
        pytest.skip("iasl is missing: install acpica-tools")

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(["iasl", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def disassemble(table: bytes) -> str:
        name = table[:4].decode().lower()
        source = tmp_path / f"{name}.aml"
        source.write_bytes(table)
        said = run("-d", "-p", tmp_path / f"{name}", source)
        assert "rror" not in said.replace("error(s)", "").replace("0 Errors", "")
        assert "arning" not in said
        compiled = run("-p", tmp_path / f"{name}-again", tmp_path / f"{name}.dsl")
        assert "0 Errors, 0 Warnings, 0 Remarks" in compiled or (table[:4] != b"DSDT" and "rror" not in compiled)
        return (tmp_path / f"{name}.dsl").read_text()

    return disassemble


@pytest.mark.parametrize("signature", sorted(SIGNATURES))
def test_iasl_has_no_objection(disassembled, signature: bytes):
    assert signature.decode() in disassembled(table_named(signature))


def test_the_dsdt_says_what_is_there(disassembled):
    source = disassembled(table_named(b"DSDT"))
    for device in ("PCI0", "MBRD", "PWRB", "VGEN", "GED0", "RTC0", "PANC", "COM1"):
        assert f"Device ({device})" in source
    assert "Notify (PWRB, 0x80)" in source
    assert "Name (\\_S5, Package (0x02)" in source


def test_a_vm_without_a_serial_port_has_none_in_its_tables(disassembled):
    assert "COM1" not in disassembled(table_named(b"DSDT", spec_of(devices=())))
