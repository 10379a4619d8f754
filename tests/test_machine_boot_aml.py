"""Each term of the AML builder gives the bytes that `iasl` makes of its ASL."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from orchestra.machine.boot import aml

HEADER = 36
"""Bytes of a table's header, before the first term."""


@pytest.fixture
def compiled(tmp_path: Path):
    """Compiles terms of ASL, and returns their AML."""
    if not shutil.which("iasl"):
        pytest.skip("iasl is missing: install acpica-tools")

    def compile_asl(text: str) -> bytes:
        source = tmp_path / "t.asl"
        source.write_text(f'DefinitionBlock ("", "DSDT", 2, "ORCH", "TEST", 1) {{ {text} }}')
        # -oa: no optimisation, which would shorten paths and fold constants
        done = subprocess.run(["iasl", "-oa", "-p", tmp_path / "t", source], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return (tmp_path / "t.aml").read_bytes()[HEADER:]

    return compile_asl


WIDE = range(0x40_0000_0000, 0x80_0000_0000)
TERMS = {
    "scope": ("Scope (\\_SB) { }", aml.scope("\\_SB")),
    "device": ("Device (PWRB) { }", aml.device("PWRB")),
    "name of zero": ("Name (AAAA, Zero)", aml.name("AAAA", aml.integer(0))),
    "name of one": ("Name (AAAA, One)", aml.name("AAAA", aml.integer(1))),
    "byte": ("Name (AAAA, 0x12)", aml.name("AAAA", aml.integer(0x12))),
    "word": ("Name (AAAA, 0x1234)", aml.name("AAAA", aml.integer(0x1234))),
    "double word": ("Name (AAAA, 0x12345678)", aml.name("AAAA", aml.integer(0x12345678))),
    "quad word": ("Name (AAAA, 0x123456789abcdef0)", aml.name("AAAA", aml.integer(0x1234_5678_9ABC_DEF0))),
    "short name": ("Name (\\AB, Zero)", aml.name("\\AB", aml.integer(0))),
    "path of two": ("Device (\\_SB.DEV0) { }", aml.device("\\_SB.DEV0")),
    "path of three": (
        "Device (\\_SB.DEV0) { } Scope (\\_SB.DEV0) { Device (\\_SB.DEV0.SUB0) { } }",
        aml.device("\\_SB.DEV0") + aml.scope("\\_SB.DEV0", aml.device("\\_SB.DEV0.SUB0")),
    ),
    "string": ('Name (AAAA, "VM_Gen_Counter")', aml.name("AAAA", aml.string("VM_Gen_Counter"))),
    "EISA id": ('Name (_HID, EisaId ("PNP0A08"))', aml.name("_HID", aml.eisa_id("PNP0A08"))),
    "buffer": ("Name (AAAA, Buffer () {1, 2, 3})", aml.name("AAAA", aml.buffer(b"\1\2\3"))),
    "package": (
        "Name (AAAA, Package () {0x05, Zero})",
        aml.name("AAAA", aml.package(aml.integer(5), aml.integer(0))),
    ),
    "long package": (
        f"Name (AAAA, Package () {{{', '.join(['0x1234'] * 60)}}})",
        aml.name("AAAA", aml.package(*[aml.integer(0x1234)] * 60)),
    ),
    "very long buffer": (
        f"Name (AAAA, Buffer () {{{', '.join(['7'] * 5000)}}})",
        aml.name("AAAA", aml.buffer(b"\7" * 5000)),
    ),
    "method": ("Method (AAAA, 2, Serialized) { }", aml.method("AAAA", 2, serialized=True)),
    "return": ("Method (AAAA, 0) { Return (0x05) }", aml.method("AAAA", 0, aml.return_(aml.integer(5)))),
    "store, and, if, notify": (
        "Device (DEV0) { } Method (AAAA, 1) { Store (Arg0, Local0) If (And (Local0, 0x02)) { Notify (DEV0, 0x80) } }",
        aml.device("DEV0")
        + aml.method(
            "AAAA",
            1,
            aml.store(aml.ARG0, aml.LOCAL0),
            aml.if_(aml.bit_and(aml.LOCAL0, aml.integer(2)), aml.notify("DEV0", 0x80)),
        ),
    ),
    "operation region and field": (
        "OperationRegion (REG0, SystemIO, 0x0604, 0x04) Field (REG0, DWordAcc, NoLock, Preserve) { AAAA, 32 }",
        aml.operation_region("REG0", aml.SYSTEM_IO, 0x604, 4) + aml.field("REG0", 4, {"AAAA": 32}),
    ),
    "long field": (
        "OperationRegion (REG0, SystemIO, 0x0604, 0x20) Field (REG0, ByteAcc, NoLock, Preserve) { AAAA, 8, BBBB, 200 }",
        aml.operation_region("REG0", aml.SYSTEM_IO, 0x604, 0x20) + aml.field("REG0", 1, {"AAAA": 8, "BBBB": 200}),
    ),
    "memory": (
        "Name (_CRS, ResourceTemplate () { Memory32Fixed (ReadWrite, 0xE0000000, 0x00100000) })",
        aml.name("_CRS", aml.resources(aml.memory(range(0xE000_0000, 0xE010_0000)))),
    ),
    "I/O ports": (
        "Name (_CRS, ResourceTemplate () { IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08) })",
        aml.name("_CRS", aml.resources(aml.io_ports(range(0x3F8, 0x400)))),
    ),
    "edge-triggered interrupt": (
        "Name (_CRS, ResourceTemplate () { Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { 5 } })",
        aml.name("_CRS", aml.resources(aml.interrupt(5, edge=True))),
    ),
    "level-triggered interrupt": (
        "Name (_CRS, ResourceTemplate () { Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { 4 } })",
        aml.name("_CRS", aml.resources(aml.interrupt(4, edge=False))),
    ),
    "bus numbers": (
        "Name (_CRS, ResourceTemplate () { WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, "
        "0, 0, 0, 0, 1) })",
        aml.name("_CRS", aml.resources(aml.bus_numbers(range(1)))),
    ),
    "I/O window": (
        "Name (_CRS, ResourceTemplate () { WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, "
        "0, 0x0D00, 0xFFFF, 0, 0xF300) })",
        aml.name("_CRS", aml.resources(aml.io_window(range(0xD00, 0x1_0000)))),
    ),
    "memory window": (
        "Name (_CRS, ResourceTemplate () { DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, "
        "ReadWrite, 0, 0xC0000000, 0xDFFFFFFF, 0, 0x20000000) })",
        aml.name("_CRS", aml.resources(aml.memory_window(range(0xC000_0000, 0xE000_0000)))),
    ),
    "wide memory window": (
        "Name (_CRS, ResourceTemplate () { QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, "
        f"ReadWrite, 0, {WIDE.start:#x}, {WIDE.stop - 1:#x}, 0, {len(WIDE):#x}) }})",
        aml.name("_CRS", aml.resources(aml.memory_window(WIDE))),
    ),
}


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_what_iasl_makes_of_its_asl(compiled, term: str):
    source, built = TERMS[term]
    assert built == compiled(source)


@pytest.mark.parametrize("path", ["", "1ABC", "TOOLONG", "low", "A.B.", "\\_SB..X", "Ä"])
def test_what_is_no_acpi_name_is_refused(path: str):
    with pytest.raises(ValueError, match="no ACPI name"):
        aml.named(path)


@pytest.mark.parametrize("text", ["ü", "a\0b"])
def test_text_that_a_string_cannot_hold_is_refused(text: str):
    with pytest.raises(ValueError, match="ASCII"):
        aml.string(text)


@pytest.mark.parametrize("identity", ["PNP0A0", "pnp0a08", "PNPX000", "PN10000"])
def test_what_is_no_eisa_id_is_refused(identity: str):
    with pytest.raises(ValueError, match="three capital letters"):
        aml.eisa_id(identity)


def test_a_number_of_more_than_64_bits_is_refused():
    for value in (-1, 1 << 64):
        with pytest.raises(ValueError, match=r"from 0 to 2\*\*64 - 1"):
            aml.integer(value)


def test_limits_of_packages_and_methods_are_told():
    with pytest.raises(ValueError, match="at most 255"):
        aml.package(*[aml.integer(0)] * 256)
    with pytest.raises(ValueError, match="0 to 7"):
        aml.method("AAAA", 8)


def length_of(data: bytes) -> tuple[int, int]:
    """The PkgLength at the start of `data`, and how many bytes it has (20.2.4)."""
    more = data[0] >> 6
    if not more:
        return data[0], 1
    return data[0] & 0xF | int.from_bytes(data[1 : 1 + more], "little") << 4, 1 + more


@given(st.integers(0, 1 << 13))
def test_a_package_is_as_long_as_it_says(size: int):
    scope = aml.scope("AAAA", b"\xa3" * size)  # Noop
    length, itself = length_of(scope[1:])
    assert length == len(scope) - 1
    assert length == itself + 4 + size


def test_the_longest_packages_are_as_long_as_they_say():
    for size in (1 << 20, (1 << 20) + 1):
        scope = aml.scope("AAAA", bytes(size))
        assert length_of(scope[1:])[0] == len(scope) - 1
