"""Linux kernels in guest memory: what each format becomes, where everything lies, and what is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

import orchestra as orc
from orchestra.backend.entry import APPLICATION_PROCESSOR, EntryState
from orchestra.backend.kvm.machine import KvmBackend
from orchestra.backend.memory import GuestMemory
from orchestra.machine import boot as boots
from orchestra.machine.boot import e820
from orchestra.machine.boot.linux import MSRS
from orchestra.model import platform
from orchestra.model.memory import PAGE

LOAD = 16 * orc.MiB
RAM = 64 * orc.MiB
PVH_ENTRY = LOAD + 0x40
GDT_CODE_64, GDT_DATA = 0x10, 0x18  # as boot.rst wants them


def bzimage(code: bytes = b"\x90" * 0x300, **fields: int) -> bytes:
    """A bzImage with a setup of one sector."""
    image = bytearray(2 * 512 + 512) + code
    values = {
        "setup_sects": 2,
        "jump": 0x6A,  # the header ends at 0x202 + this
        "version": 0x20F,
        "loadflags": 1,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 0x20_0000,
        "xloadflags": 1,
        "cmdline_size": 2047,
        "payload_offset": 0x210,
        "payload_length": 0x10,
        "pref_address": LOAD,
        "init_size": 8 * orc.MiB,
        **fields,
    }
    places = {
        "setup_sects": ("B", 0x1F1),
        "jump": ("B", 0x201),
        "version": ("H", 0x206),
        "loadflags": ("B", 0x211),
        "initrd_addr_max": ("I", 0x22C),
        "kernel_alignment": ("I", 0x230),
        "xloadflags": ("H", 0x236),
        "cmdline_size": ("I", 0x238),
        "payload_offset": ("I", 0x248),
        "payload_length": ("I", 0x24C),
        "pref_address": ("Q", 0x258),
        "init_size": ("I", 0x260),
    }
    image[0x202:0x206] = b"HdrS"
    for name, value in values.items():
        layout, offset = places[name]
        struct.pack_into("<" + layout, image, offset, value)
    return bytes(image)


def note(name: bytes, kind: int, description: bytes) -> bytes:
    padded = [part + bytes(-len(part) % 4) for part in (name, description)]
    return struct.pack("<III", len(name), len(description), kind) + b"".join(padded)


def segment(kind: int, offset: int, address: int, size: int, room: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 5, offset, 0xFFFF_FFFF_8100_0000, address, size, room, PAGE)


def elf(
    *segments: bytes,
    notes: bytes = b"",
    machine: int = 62,
    bits: int = 2,
    kind: int = 2,
    entry: int = LOAD + 0x10,
    entry_size: int = 56,
    content: bytes = b"\x90" * 0x400,
) -> bytes:
    """An ELF file with its content at 0x1000 and its notes behind that. By default one segment has the content."""
    table = [*(segments or [segment(1, 0x1000, LOAD, len(content), 0x800)])]
    if notes:
        table.append(segment(4, 0x1000 + len(content), 0, len(notes), len(notes)))
    identity = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", identity, kind, machine, 1, entry, 64, 0, 0, 64, entry_size, len(table), 0, 0, 0
    )
    return (header + b"".join(table)).ljust(0x1000, b"\0") + content + notes


PVH = elf(notes=note(b"GNU\0", 3, b"id!") + note(b"Xen\0", 18, struct.pack("<I", PVH_ENTRY)))


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    return tmp_path / "vmlinuz"


def spec_of(kernel: Path, vcpus: int = 1, memory: int | orc.Memory = RAM, **boot: object) -> orc.VmSpec:
    return orc.VmSpec(
        name="vm", boot=orc.LinuxBoot(kernel=kernel, **boot), memory=memory, vcpus=vcpus, devices=(orc.Serial(),)
    )


@contextmanager
def loaded(spec: orc.VmSpec) -> Iterator[tuple[GuestMemory, list[EntryState]]]:
    memory = GuestMemory(spec)
    try:
        yield memory, boots.load(spec, memory)
    finally:
        memory.close()


def at(memory: GuestMemory, layout: str, address: int) -> int:
    (value,) = struct.unpack("<" + layout, memory.read(address, struct.calcsize("<" + layout)))
    return int(value)


# ---- three formats


def test_bzimage_lies_at_the_address_it_prefers_and_is_entered_behind_its_32_bit_code(kernel):
    code = bytes(range(256)) * 4
    kernel.write_bytes(bzimage(code))
    with loaded(spec_of(kernel)) as (memory, [state]):
        assert memory.read(LOAD, len(code)) == code
        assert (state.mode.bits, state.registers.rip) == (64, LOAD + 0x200)
        assert state.registers.rsi == platform.BOOT_PARAMS.start
        assert state.registers.rflags == 2  # interrupts off
        special = state.mode.special
        assert (special.cs.selector, special.ds.selector) == (GDT_CODE_64, GDT_DATA)
        assert special.gdt.base == platform.GDT
        assert state.msrs == MSRS


def test_boot_params_have_the_kernels_own_header_and_what_a_loader_fills_in(kernel, tmp_path):
    kernel.write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(b"070701 content")
    with loaded(spec_of(kernel, initrd=tmp_path / "initrd")) as (memory, _):
        page = platform.BOOT_PARAMS.start
        head = bzimage()
        assert memory.read(page + 0x22C, 0x40) == head[0x22C:0x26C]
        assert memory.read(page + 0x26C, 4) == bytes(4)  # the header ended before
        assert memory.read(page, 0x70) == bytes(0x70)  # what is no header does not come from the file
        assert at(memory, "B", page + 0x210) == 0xFF
        assert at(memory, "Q", page + 0x70) == platform.ACPI_TABLES.start
        assert memory.read(platform.ACPI_TABLES.start, 8) == b"RSD PTR "
        assert memory.read(at(memory, "I", page + 0x228), 23) == b"console=ttyS0 reboot=a\0"
        start, size = at(memory, "I", page + 0x218), at(memory, "I", page + 0x21C)
        assert memory.read(start, size) == b"070701 content"
        assert start == RAM - PAGE


def test_elf_without_a_note_is_entered_in_64_bit_mode_with_boot_params(kernel):
    kernel.write_bytes(elf(content=b"\xf4" * 0x400))
    with loaded(spec_of(kernel)) as (memory, [state]):
        assert (state.mode.bits, state.registers.rip) == (64, LOAD + 0x10)
        assert memory.read(LOAD, 0x401) == b"\xf4" * 0x400 + b"\0"
        assert memory.read(platform.BOOT_PARAMS.start + 0x202, 4) == b"HdrS"
        assert at(memory, "I", platform.BOOT_PARAMS.start + 0x230) == 0x100_0000


def test_elf_with_a_pvh_note_is_entered_by_it_with_start_info(kernel, tmp_path):
    kernel.write_bytes(PVH)
    (tmp_path / "initrd").write_bytes(b"x" * (PAGE + 1))
    with loaded(spec_of(kernel, initrd=tmp_path / "initrd", cmdline="quiet")) as (memory, [state]):
        assert (state.mode.bits, state.registers.rip) == (32, PVH_ENTRY)
        assert state.mode.special.cr0 & (1 << 31 | 1) == 1  # protected, not paged
        info = state.registers.rbx
        magic, version, flags, modules, list_at, line, rsdp, map_at, entries, _ = struct.unpack(
            "<IIIIQQQQII", memory.read(info, 56)
        )
        assert (magic, version, flags, modules) == (0x336EC578, 1, 0, 1)
        assert memory.read(line, 29) == b"console=ttyS0 reboot=a quiet\0"
        assert rsdp == platform.ACPI_TABLES.start
        start, size, *_ = struct.unpack("<QQQQ", memory.read(list_at, 32))
        assert (start, size) == (RAM - 2 * PAGE, PAGE + 1)
        assert memory.read(start, size) == b"x" * size
        found = [struct.unpack("<QQII", memory.read(map_at + 24 * index, 24)) for index in range(entries)]
        assert (1 << 20, RAM - (1 << 20), 1, 0) in found
        assert platform.BOOT_PARAMS.start == info + PAGE
        assert memory.read(platform.BOOT_PARAMS.start, PAGE) == bytes(PAGE)


def test_room_behind_a_segment_is_zeros_also_where_memory_is_a_file(kernel, tmp_path):
    (tmp_path / "ram").write_bytes(b"\xaa" * (32 * orc.MiB))
    kernel.write_bytes(elf(content=b"\xf4" * 0x400))
    with loaded(spec_of(kernel, memory=orc.Memory(32 * orc.MiB, backing="file", path=str(tmp_path / "ram")))) as (
        memory,
        _,
    ):
        assert memory.read(LOAD + 0x3FF, 0x402) == b"\xf4" + bytes(0x400) + b"\xaa"


def test_first_vcpu_boots_and_the_others_wait_with_the_same_msrs(kernel):
    kernel.write_bytes(bzimage())
    with loaded(spec_of(kernel, vcpus=3)) as (_, states):
        assert [state.waits for state in states] == [False, True, True]
        assert states[1] == attrs.evolve(APPLICATION_PROCESSOR, msrs=MSRS)
        assert dict(MSRS)[0x2FF] == 0x806  # or each locked access counts as one to uncached memory


# ---- memory


def ranges(spec: orc.VmSpec) -> list[tuple[int, int, int]]:
    return [(one.span.start, one.span.stop, one.kind) for one in e820.memory_map(spec.layout)]


def test_memory_map_has_ram_around_what_a_pc_keeps_and_around_the_hole(kernel):
    low, top = 3 << 30, 4 << 30
    assert ranges(spec_of(kernel, memory=4 << 30)) == [
        (0, 0x9FC00, e820.RAM),
        (0x9FC00, 0x100000, e820.RESERVED),  # the ACPI tables among it
        (0x100000, low, e820.RAM),
        (0xE0000000, 0xE0100000, e820.RESERVED),  # ECAM
        (top, top + (1 << 30), e820.RAM),
    ]


def test_regions_beside_the_ram_are_reserved(kernel):
    spec = attrs.evolve(spec_of(kernel), regions=(orc.MemoryRegion(address=0xD000_0000, size=PAGE),))
    assert (0xD000_0000, 0xD000_1000, e820.RESERVED) in ranges(spec)


def test_more_regions_than_a_kernel_can_be_told_of_are_refused(kernel):
    regions = [orc.MemoryRegion(address=0xD000_0000 + 2 * PAGE * index, size=PAGE) for index in range(125)]
    assert len(ranges(attrs.evolve(spec_of(kernel), regions=regions[:124]))) == e820.MOST_ENTRIES
    with pytest.raises(orc.SpecError, match="regions='<125>': must be 124 at most"):
        ranges(attrs.evolve(spec_of(kernel), regions=regions))


def test_initrd_ends_where_the_kernel_wants_it_to(kernel, tmp_path):
    kernel.write_bytes(bzimage(initrd_addr_max=0x2FF_FFFF))
    (tmp_path / "initrd").write_bytes(b"i" * 5000)
    with loaded(spec_of(kernel, initrd=tmp_path / "initrd")) as (memory, _):
        assert at(memory, "I", platform.BOOT_PARAMS.start + 0x218) == 0x300_0000 - 2 * PAGE


def test_what_the_user_says_of_console_and_reset_is_all_that_is_said_and_the_second_port_is_the_second_tty(kernel):
    boot = orc.LinuxBoot(kernel="k", cmdline="quiet console=hvc0 reboot=t")
    spec = attrs.evolve(spec_of(kernel), boot=boot)
    assert boot.command_line(spec.layout) == "quiet console=hvc0 reboot=t"
    second = attrs.evolve(spec_of(kernel), devices=(orc.Serial(port=0x2F8, irq=3),))
    assert orc.LinuxBoot(kernel="k").command_line(second.layout) == "console=ttyS1 reboot=a"
    third = attrs.evolve(spec, devices=(orc.Console(),))
    assert orc.LinuxBoot(kernel="k").command_line(third.layout) == "console=hvc0 reboot=a"
    both = attrs.evolve(spec, devices=(orc.Console(), orc.Serial()))
    assert orc.LinuxBoot(kernel="k").command_line(both.layout) == "console=ttyS0 reboot=a"
    none = attrs.evolve(spec_of(kernel), devices=())
    assert orc.LinuxBoot(kernel="k").command_line(none.layout) == "reboot=a"


# ---- refused


REFUSED = {
    "old": (bzimage(version=0x20B), "protocol 2.11.*Linux 3.8"),
    "32 bits": (bzimage(xloadflags=0), "32-bit kernel.*CONFIG_X86_64"),
    "cut in its code": (bzimage()[:0x700], r"has 1792 bytes, and by its own header 2049.*not complete"),
    "cut in its payload": (bzimage(payload_length=0x1000), "by its own header 6160.*not complete"),
    "cut in its header": (bzimage()[:0x240], "no kernel"),
    "low": (bzimage(pref_address=0x8000), "0x8000, below 1 MiB"),
    "arm64": (b"MZ".ljust(0x38) + b"ARM\x64" + bytes(1000), "for arm64.*x86-64"),
    "riscv": (b"MZ".ljust(0x38) + b"RSC\x05" + bytes(1000), "for RISC-V"),
    "gzip": (b"\x1f\x8b" + bytes(2000), "compressed with gzip"),
    "cpio": (b"070701" + bytes(2000), "cpio archive"),
    "EFI": (b"MZ" + bytes(2000), "EFI program"),
    "text": (b"#!/bin/sh\n", r"is no kernel: name a bzImage \(vmlinuz\)"),
    "elf for arm64": (elf(machine=183), "ELF file for arm64.*x86-64"),
    "elf of 32 bits": (elf(machine=3, bits=1), "ELF file for 32-bit x86"),
    "x32": (elf(bits=1), "32-bit or big-endian x86-64"),
    "elf cut in its header": (elf()[:40], "by its own header 64"),
    "elf cut in its table": (elf()[:70], "by its own header 120"),
    "elf cut in a segment": (elf()[:0x1100], "by its own header 5120"),
    "elf cut in its notes": (PVH[:-20], "by its own header"),
    "module": (elf(kind=1), "such as a module"),
    "program": (elf(entry=0x401000), "starts at 0x401000, where none of its segments is"),
    "elf low": (elf(segment(1, 0x1000, 0x7000, 16, 16)), "segment for 0x7000, below 1 MiB"),
    "elf overlaps": (elf(segment(1, 0x1000, LOAD, 16, 64), segment(1, 0x1000, LOAD + 63, 1, 1)), "two segments"),
    "elf room": (elf(segment(1, 0x1000, LOAD, 16, 8)), "16 bytes in a room of 8"),
    "elf empty": (elf(segment(4, 0x1000, 0, 0, 0)), "no segment to load"),
    "elf table": (elf(entry_size=32), "program headers of 32 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_file_that_is_no_kernel_for_this_is_refused_by_name_with_what_it_is(kernel, name):
    content, words = REFUSED[name]
    kernel.write_bytes(content)
    with pytest.raises(orc.FileError, match=rf"^{kernel}: kernel: .*{words}"), loaded(spec_of(kernel)):
        pass


def test_files_that_can_not_be_read_are_refused_by_field_and_name(kernel, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "empty").touch()
    for path, words in ((kernel, "can't be opened: No such file"), (tmp_path, "directory"), (fifo, "no regular file")):
        with pytest.raises(orc.FileError, match=rf"^{path}: kernel: .*{words}"), loaded(spec_of(path)):
            pass
    kernel.write_bytes(bzimage())
    for path, words in ((tmp_path / "none", "No such file"), (tmp_path / "empty", "is empty")):
        with pytest.raises(orc.FileError, match=rf"^{path}: initrd: .*{words}"), loaded(spec_of(kernel, initrd=path)):
            pass


def test_what_does_not_fit_is_refused_with_what_would(kernel, tmp_path):
    kernel.write_bytes(bzimage(init_size=60 * orc.MiB))
    with pytest.raises(orc.SpecError, match=r"needs 0x1000000-0x4bfffff, .* give it 76 MiB"), loaded(spec_of(kernel)):
        pass
    kernel.write_bytes(bzimage(pref_address=0xC000_0000))
    with pytest.raises(orc.SpecError, match="above the 3 GiB"), loaded(spec_of(kernel)):
        pass
    kernel.write_bytes(bzimage())
    with open(tmp_path / "initrd", "wb") as file:
        file.truncate(40 * orc.MiB + 1)
    with (
        pytest.raises(orc.SpecError, match=r"initrd .* does not fit .* 0x1800000 and 0x4000000: give the VM more"),
        loaded(spec_of(kernel, initrd=tmp_path / "initrd")),
    ):
        pass
    kernel.write_bytes(bzimage(cmdline_size=29))
    with (
        pytest.raises(orc.SpecError, match=r"^cmdline=.*has 30 bytes with orchestra's words, and this kernel takes 29"),
        loaded(spec_of(kernel, cmdline="1234567")),
    ):
        pass


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kernel": ""}, "kernel=''.*name of a file"),
        ({"kernel": 5}, "kernel=5"),
        ({"kernel": "a\0b"}, "kernel=.*zero bytes"),
        ({"kernel": "k", "initrd": ""}, "initrd=''"),
        ({"kernel": "k", "cmdline": "a\0"}, "cmdline=.*zero bytes"),
        ({"kernel": "k", "cmdline": None}, "cmdline=None"),
    ],
)
def test_boot_spec_checks_its_fields(fields, words):
    with pytest.raises(orc.SpecError, match=words):
        orc.LinuxBoot(**fields)


def test_linux_has_interrupt_controllers_and_its_platform_unless_the_spec_says_otherwise(kernel):
    spec = spec_of(kernel)
    assert (spec.irqchip, spec.irqchip_kind) == (None, "full")
    names = [type(device).__name__ for device in spec.machine_devices]
    assert names == ["PciHostBridge", "AcpiRegisters", "Rtc", "I8042", "PanicPort", "Serial"]
    assert [type(device).__name__ for device in spec.devices] == ["Serial"]
    flat = orc.VmSpec(name="f", boot=orc.FlatImage(code=b"\xf4"))
    assert (flat.irqchip_kind, flat.machine_devices) == ("none", ())
    for irqchip in (False, "split"):
        with pytest.raises(orc.SpecError, match=r"irqchip=.*for Linux"):
            attrs.evolve(spec, irqchip=irqchip)
    with pytest.raises(orc.SpecError, match=r"memory=1048576: must be at least 33554432 for Linux"):
        spec_of(kernel, memory=orc.MiB)
    with pytest.raises(orc.SpecError, match="cpu='fast': must be one of host, "):
        attrs.evolve(spec, cpu="fast")


@pytest.mark.kvm
def test_host_whose_kvm_lacks_what_linux_needs_refuses_it_by_name(kernel, monkeypatch):
    backend = KvmBackend.open()
    try:
        assert backend.refusal(spec_of(kernel)) is None
        without = [
            attrs.evolve(one, edx=one.edx & ~(1 << 26)) if one.function == 1 else one for one in backend._supported
        ]
        monkeypatch.setattr(backend, "_supported", without)
        with pytest.raises(orc.SpecError, match=r"^vm 'vm': boot: .* CPU features .* does not give: sse2; use a host"):
            backend.check(spec_of(kernel))
        backend.check(orc.VmSpec(name="flat", boot=orc.FlatImage(code=b"\xf4")))  # which needs nothing of the kind
    finally:
        backend.close()


# ---- hostile files

MUTATIONS = st.lists(st.tuples(st.integers(0, 0x600), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])), max_size=6)


def try_to_load(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        with loaded(spec_of(path, memory=32 * orc.MiB)) as (memory, [state]):
            # What the loader wrote for the kernel is whole: the file had no say in it.
            assert memory.read(platform.COMMAND_LINE.start, 23) == b"console=ttyS0 reboot=a\0"
            assert memory.read(platform.ACPI_TABLES.start, 8) == b"RSD PTR "
            assert platform.HIGH_MEMORY <= state.registers.rip < 32 * orc.MiB
    except (orc.FileError, orc.SpecError):
        pass  # whatever else it raises fails the test


fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)


@fuzzed
@given(content=st.binary(min_size=1, max_size=2000), magic=st.sampled_from([b"", b"\x7fELF\x02\x01\x01", b"MZ"]))
def test_any_file_is_loaded_or_refused_by_name(kernel, content, magic):
    try_to_load(kernel, magic + content)


@fuzzed
@given(changes=MUTATIONS, end=st.integers(1, 0x1000), whole=st.booleans())
@example(changes=[(0x25F, 0xFF)], end=1, whole=True)  # prefers an address beyond all memory
def test_changed_and_cut_bzimage_is_loaded_or_refused_by_name(kernel, changes, end, whole):
    content = bytearray(bzimage(init_size=orc.MiB))
    for offset, value in changes:
        content[offset % len(content)] = value
    try_to_load(kernel, bytes(content if whole else content[:end]))


@fuzzed
@given(changes=MUTATIONS, end=st.integers(1, 0x1500), whole=st.booleans())
@example(changes=[(64 + 39, 0xFF)], end=1, whole=True)  # a segment of more than all memory
def test_changed_and_cut_elf_is_loaded_or_refused_by_name(kernel, changes, end, whole):
    content = bytearray(PVH)
    for offset, value in changes:
        content[offset if offset < 0x100 else 0x1300 + offset % 0x100 if offset < 0x300 else offset] = value
    try_to_load(kernel, bytes(content if whole else content[:end]))
