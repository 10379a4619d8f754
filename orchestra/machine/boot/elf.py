"""An ELF kernel (vmlinux): segments that go to their physical addresses, and perhaps a PVH note.

A reader of its own, and not pyelftools: of an ELF file a boot needs the header, the program headers and one note. Each
number in them is checked against the file and the others before it is used.

Sources: System V ABI, chapters 4 and 5; Xen, xen/include/public/elfnote.h (XEN_ELFNOTE_PHYS32_ENTRY).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Final, Literal

import attrs

from ...model import platform
from .files import BootFile
from .image import HEADER_AT, Image, Piece

__all__ = ["MAGIC", "parse"]

MAGIC: Final = b"\x7fELF"
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_NOTE: Final = struct.Struct("<III")
CLASS_64, LITTLE_ENDIAN, X86_64 = 2, 1, 62
EXECUTABLES: Final = (2, 3)  # ET_EXEC, ET_DYN
PT_LOAD, PT_NOTE = 1, 4
PHYS32_ENTRY: Final = 18
MOST_HEADERS: Final = 256
MOST_NOTES: Final = 1 << 20
ALIGNMENT: Final = 0x0100_0000
_MACHINES: Final = {3: "32-bit x86", 40: "32-bit ARM", 62: "x86-64", 183: "arm64", 243: "RISC-V"}


@attrs.frozen
class _Segment:
    kind: int
    flags: int
    offset: int
    virtual: int
    address: int
    size: int
    room: int
    alignment: int


def parse(file: BootFile, head: bytes) -> Image:
    """An ELF file, whose first bytes are `head`.

    Raises:
        FileError: it is no kernel for x86-64, or is not complete, or contradicts itself.
    """
    segments = _segments(file, head)
    pieces = tuple(_pieces(file, segments))
    first = min(piece.address for piece in pieces)
    entry, protocol = _HEADER.unpack_from(head)[4], "linux64"
    if (pvh := _pvh_entry(file, segments)) is not None:
        entry, protocol = pvh, "pvh"
    if not any(entry in piece.span for piece in pieces):
        raise file.error(
            f"starts at {entry:#x}, where none of its segments is", "name a kernel (vmlinux), and no other program"
        )
    return _image(protocol, entry, pieces, range(first, max(piece.span.stop for piece in pieces)))  # type: ignore[arg-type]


def _image(protocol: Literal["linux64", "pvh"], entry: int, pieces: tuple[Piece, ...], span: range) -> Image:
    # Linux needs its alignment, and has the rest of this header in the part of the bzImage that is not here.
    header = bytearray(0x234 - HEADER_AT)
    struct.pack_into("<I", header, 0x230 - HEADER_AT, ALIGNMENT)
    return Image(protocol=protocol, entry=entry, pieces=pieces, span=span, header=bytes(header))


def _segments(file: BootFile, head: bytes) -> list[_Segment]:
    if len(head) < _HEADER.size:
        raise file.truncated(_HEADER.size)
    identity, kind, machine, _, _, table, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(head)
    if identity[4] != CLASS_64 or identity[5] != LITTLE_ENDIAN or machine != X86_64:
        what = _MACHINES.get(machine, f"machine {machine}") if machine != X86_64 else "32-bit or big-endian x86-64"
        raise file.error(f"is an ELF file for {what}", "use a kernel for x86-64")
    if kind not in EXECUTABLES or not count:
        raise file.error("is an ELF file that can't be started, such as a module", "name the kernel (vmlinux)")
    if entry_size != _PROGRAM_HEADER.size or count > MOST_HEADERS:
        raise file.error(
            f"has {count} program headers of {entry_size} bytes; up to {MOST_HEADERS} of {_PROGRAM_HEADER.size} are "
            "possible",
            "copy it again, it is damaged",
        )
    raw = file.read(table, count * entry_size) if table < file.size else b""
    if len(raw) < count * entry_size:
        raise file.truncated(table + count * entry_size)
    return [_Segment(*fields) for fields in _PROGRAM_HEADER.iter_unpack(raw)]


def _pieces(file: BootFile, segments: list[_Segment]) -> Iterator[Piece]:
    loaded = sorted((one for one in segments if one.kind == PT_LOAD and one.room), key=lambda one: one.address)
    if not loaded:
        raise file.error("has no segment to load", "name the kernel (vmlinux)")
    for one in loaded:
        if one.size > one.room:
            raise file.error(
                f"has a segment of {one.size} bytes in a room of {one.room}", "copy it again, it is damaged"
            )
        if one.offset + one.size > file.size:
            raise file.truncated(one.offset + one.size)
        if one.address < platform.HIGH_MEMORY:
            raise file.error(
                f"has a segment for {one.address:#x}, below 1 MiB, where boot information is",
                "use a kernel that is linked for 1 MiB or above",
            )
    pieces = [Piece(address=one.address, offset=one.offset, size=one.size, room=one.room) for one in loaded]
    for low, high in itertools.pairwise(pieces):
        if high.address < low.span.stop:
            raise file.error(f"has two segments for {high.address:#x}", "copy it again, it is damaged")
    yield from pieces


def _pvh_entry(file: BootFile, segments: list[_Segment]) -> int | None:
    """Where a PVH note says that 32-bit execution starts; None: there is no such note."""
    for one in segments:
        if one.kind != PT_NOTE:
            continue
        if one.size > MOST_NOTES or one.offset + one.size > file.size:
            raise file.truncated(one.offset + one.size)
        for name, kind, description in _notes(file.read(one.offset, one.size)):
            if name == b"Xen\0" and kind == PHYS32_ENTRY and len(description) in (4, 8):
                return int.from_bytes(description, "little")
    return None


def _notes(raw: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, type and description of each note, up to the first that is not complete."""
    at = 0
    while at + _NOTE.size <= len(raw):
        name_size, size, kind = _NOTE.unpack_from(raw, at)
        name = at + _NOTE.size
        description = name + (name_size + 3 & ~3)
        if description + size > len(raw):
            return
        yield raw[name : name + name_size], kind, raw[description : description + size]
        at = description + (size + 3 & ~3)
