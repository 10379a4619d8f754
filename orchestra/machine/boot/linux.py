"""Linux: chooses the parser by the kernel's file, lays memory out, and makes the entry states.

    kernel file → elf.parse | bzimage.parse → Image (pieces, entry, protocol)
    Image + initrd + command line → guest memory
    e820.memory_map, acpi.write_tables → boot_params (64-bit entry) or start_info (pvh.enter) → EntryState

Nothing is kept from one launch to the next: a page of the file is parsed, and the rest goes from the host's page cache
to guest memory in one copy.

Source: Linux, Documentation/arch/x86/boot.rst, zero-page.rst.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Final

import attrs

from ...backend.entry import APPLICATION_PROCESSOR, EntryState, long_mode
from ...backend.memory import GuestMemory
from ...backend.registers import DescriptorTable, Registers
from ...model import platform
from ...model.boot import Layout
from ...model.checks import fail
from ...model.errors import SpecError
from ...model.linux import LinuxBoot
from ...model.memory import PAGE, MiB
from . import bzimage, elf, pvh
from .acpi import write_tables
from .e820 import Entry, memory_map
from .files import BootFile
from .image import HEADER_AT, Image
from .tables import CODE64, DATA, GDT, page_tables

__all__ = ["MSRS", "load"]

IA32_MISC_ENABLE, IA32_MTRR_DEF_TYPE = 0x1A0, 0x2FF
MSRS: Final = (
    (IA32_MISC_ENABLE, 1),  # fast strings, as firmware leaves it
    (IA32_MTRR_DEF_TYPE, 0x806),  # MTRRs on, write-back: after reset all memory is uncached, and each lock a bus lock
)
# boot_params (arch/x86/include/uapi/asm/bootparam.h)
_RSDP, _ENTRIES, _MAP = 0x70, 0x1E8, 0x2D0
_BOOT_FLAG, _MAGIC, _LOADER, _INITRD, _COMMAND_LINE = 0x1FE, 0x202, 0x210, 0x218, 0x228  # the setup header
_MAP_ENTRY: Final = struct.Struct("<QQI")
UNREGISTERED_LOADER: Final = 0xFF


def load(boot: LinuxBoot, layout: Layout, memory: GuestMemory) -> list[EntryState]:
    """Write all that the kernel needs; return the entry state of each vCPU: the first boots, the others wait.

    Raises:
        FileError: kernel or initrd can't be read, or are not what they should be.
        SpecError: they do not fit the memory, the command line does not fit the kernel, or there are too many regions.
    """
    with BootFile("kernel", boot.kernel, memory.open_file) as kernel:
        head = kernel.read(0, bzimage.HEAD)
        image = (elf if head.startswith(elf.MAGIC) else bzimage).parse(kernel, head)
        _check_kernel(kernel, image, layout)
        for piece in image.pieces:
            kernel.read_to(memory, piece.address, piece.offset, piece.size)
            memory.zero(piece.address + piece.size, piece.room - piece.size)
    initrd = None if boot.initrd is None else _load_initrd(boot.initrd, image, layout, memory)
    command_line = _command_line(boot, image, layout)
    memory.write(platform.COMMAND_LINE.start, command_line + b"\0")
    memory.write(platform.GDT, GDT)
    rsdp = write_tables(layout, memory, os.urandom(16))
    found = memory_map(layout)
    if image.protocol == "pvh":
        first = pvh.enter(memory, image.entry, found, initrd, platform.COMMAND_LINE.start, rsdp)
    else:
        memory.write(platform.BOOT_PARAMS.start, _boot_params(image, found, initrd, rsdp))
        first = _enter(image.entry, memory)
    return [attrs.evolve(first, msrs=MSRS)] + [attrs.evolve(APPLICATION_PROCESSOR, msrs=MSRS)] * (layout.vcpus - 1)


def _check_kernel(kernel: BootFile, image: Image, layout: Layout) -> None:
    """The kernel must be in the first RAM, and in the memory that is mapped when it starts."""
    if image.span.stop <= layout.ram[0].stop:
        return
    wanted = f"boot: the kernel {kernel.path} needs {image.span.start:#x}-{image.span.stop - 1:#x}"
    if image.span.stop > platform.BARS.start:
        raise SpecError(f"{wanted}, above the 3 GiB where RAM ends at first: use a kernel that is linked lower")
    raise SpecError(
        f"{wanted}, and the guest's memory has {layout.size:#x} bytes: give it {-(-image.span.stop // MiB)} MiB or more"
    )


def _load_initrd(path: str, image: Image, layout: Layout, memory: GuestMemory) -> range:
    """As high as the kernel takes it, where nothing is in the way of the memory that it gives out first."""
    with BootFile("initrd", path, memory.open_file) as file:
        stop = min(image.initrd_stop, layout.ram[0].stop)
        start = (stop - file.size) // PAGE * PAGE
        if start < image.span.stop:
            raise SpecError(
                f"boot: the initrd {path} of {file.size} bytes does not fit between the kernel's end at "
                f"{image.span.stop:#x} and {stop:#x}: give the VM more memory, or a smaller initrd"
            )
        file.read_to(memory, start, 0, file.size)
        return range(start, start + file.size)


def _command_line(boot: LinuxBoot, image: Image, layout: Layout) -> bytes:
    text = boot.command_line(layout)
    line, most = text.encode(), min(image.command_line_most, len(platform.COMMAND_LINE) - 1)
    if len(line) > most:
        raise fail("cmdline", text, f"has {len(line)} bytes with orchestra's words, and this kernel takes {most}")
    return line


def _boot_params(image: Image, found: Sequence[Entry], initrd: range | None, rsdp: int) -> bytes:
    page = bytearray(PAGE)
    page[HEADER_AT : HEADER_AT + len(image.header)] = image.header
    struct.pack_into("<Q", page, _RSDP, rsdp)
    struct.pack_into("<H", page, _BOOT_FLAG, 0xAA55)
    page[_MAGIC : _MAGIC + 4] = b"HdrS"
    page[_LOADER] = UNREGISTERED_LOADER  # without one, Linux ignores the initrd
    if initrd is not None:
        struct.pack_into("<II", page, _INITRD, initrd.start, len(initrd))
    struct.pack_into("<I", page, _COMMAND_LINE, platform.COMMAND_LINE.start)
    page[_ENTRIES] = len(found)
    for index, one in enumerate(found):
        _MAP_ENTRY.pack_into(page, _MAP + index * _MAP_ENTRY.size, one.span.start, len(one.span), one.kind)
    return bytes(page)


def _enter(entry: int, memory: GuestMemory) -> EntryState:
    memory.write(platform.PAGE_TABLES.start, page_tables(platform.PAGE_TABLES.start))
    gdt = DescriptorTable(base=platform.GDT, limit=len(GDT) - 1)
    return EntryState(
        mode=long_mode(gdt, CODE64, DATA, platform.PAGE_TABLES.start),
        registers=Registers(
            rip=entry, rsi=platform.BOOT_PARAMS.start, rsp=platform.BOOT_STACK, rbp=platform.BOOT_STACK
        ),
    )
