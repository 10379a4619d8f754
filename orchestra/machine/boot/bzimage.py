"""The bzImage, which distributions install as vmlinuz: real-mode code with a header, then the compressed kernel.

The 64-bit boot protocol skips the real-mode code: the rest of the file goes to the address that the header prefers, and
is entered 0x200 bytes behind it.

Source: Linux, Documentation/arch/x86/boot.rst (protocol 2.12).
"""

from __future__ import annotations

import struct
from typing import Final

from ...model import platform
from .files import BootFile
from .image import HEADER_AT, Image, Piece

__all__ = ["HEAD", "parse"]

HEAD: Final = 0x1000
"""Bytes from the start of a file in which its header lies, whichever format it has."""
SECTOR: Final = 512
ENTRY_64: Final = 0x200
LOWEST_VERSION: Final = 0x20C
XLF_KERNEL_64: Final = 1 << 0
FIRST_OF_EDD: Final = 0x290
"""In boot_params something else begins there, which bounds the length that a header may claim to have."""


def parse(file: BootFile, head: bytes) -> Image:
    """A bzImage, whose first bytes are `head`.

    Raises:
        FileError: it is none, or is not complete, or can't be entered in 64-bit mode.
    """
    if head[0x202:0x206] != b"HdrS" or len(head) < FIRST_OF_EDD:
        raise file.error(_what(head), "name a bzImage (vmlinuz) or an ELF kernel (vmlinux) for x86-64")

    def field(layout: str, offset: int) -> int:
        (value,) = struct.unpack_from("<" + layout, head, offset)
        return int(value)

    if (version := field("H", 0x206)) < LOWEST_VERSION:
        raise file.error(
            f"has boot protocol {version >> 8}.{version & 0xFF:02}, and 2.12 is needed", "use Linux 3.8 or newer"
        )
    if not field("H", 0x236) & XLF_KERNEL_64:
        raise file.error("is a 32-bit kernel (XLF_KERNEL_64 is not set)", "use one for x86-64 (CONFIG_X86_64)")
    setup = ((field("B", HEADER_AT) or 4) + 1) * SECTOR
    if setup + ENTRY_64 >= file.size:
        raise file.truncated(setup + ENTRY_64 + 1)
    payload_end = setup + field("I", 0x248) + field("I", 0x24C)  # the compressed kernel in it
    if payload_end > file.size:
        raise file.truncated(payload_end)
    load, size = field("Q", 0x258), file.size - setup
    if load < platform.HIGH_MEMORY:
        raise file.error(
            f"wants to be loaded at {load:#x}, below 1 MiB (pref_address)", "copy it again, its header is damaged"
        )
    return Image(
        protocol="linux64",
        entry=load + ENTRY_64,
        pieces=(Piece(address=load, offset=setup, size=size, room=size),),
        span=range(load, load + max(size, field("I", 0x260))),  # init_size: where it decompresses itself
        header=head[HEADER_AT : min(0x202 + field("B", 0x201), FIRST_OF_EDD)],
        initrd_stop=min(field("I", 0x22C) + 1, platform.BARS.start),
        command_line_most=field("I", 0x238),
    )


def _what(head: bytes) -> str:
    """What the file is instead, as far as its first bytes say."""
    for offset, magic, what in (
        (0x38, b"ARM\x64", "is a kernel for arm64"),
        (0x38, b"RSC\x05", "is a kernel for RISC-V"),
        (0, b"\x1f\x8b", "is compressed with gzip"),
        (0, b"\xfd7zXZ\0", "is compressed with xz"),
        (0, b"\x28\xb5\x2f\xfd", "is compressed with zstd"),
        (0, b"070701", "is a cpio archive, such as an initrd"),
        (0, b"MZ", "is a Windows or EFI program, and no kernel"),
    ):
        if head[offset : offset + len(magic)] == magic:
            return what
    return "is no kernel"
