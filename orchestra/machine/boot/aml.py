"""A builder of AML, the bytes of an ACPI definition block: one function for each term that the tables need.

    device("PWRB", name("_HID", eisa_id("PNP0C0C")), name("_UID", integer(0)))

Terms are bytes, and terms that contain others take them as arguments, so a table reads like its ASL. The test compiles
each term's ASL with `iasl` and compares the bytes.

Source: ACPI specification 6.5, 20.2 (grammar and opcodes), 6.4 (resource descriptors), 6.1.5 (compressed EISA ids).
"""

from __future__ import annotations

import re
import struct
from typing import Final

__all__ = [
    "ARG0",
    "LOCAL0",
    "bit_and",
    "buffer",
    "bus_numbers",
    "device",
    "eisa_id",
    "field",
    "if_",
    "integer",
    "interrupt",
    "io_ports",
    "io_window",
    "memory",
    "memory_window",
    "method",
    "name",
    "named",
    "notify",
    "operation_region",
    "package",
    "resources",
    "return_",
    "scope",
    "store",
    "string",
]

SYSTEM_IO: Final = 1
ARG0: Final = b"\x68"
LOCAL0: Final = b"\x60"

_SEGMENT: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")


# ---- names and lengths


def named(path: str) -> bytes:
    """A name string: ``PCI0``, ``\\_S5_``, ``\\_SB_.PCI0``. Segments that are shorter than four characters are padded.

    Raises:
        ValueError: a segment is no ACPI name.
    """
    root, rest = (b"\\", path[1:]) if path.startswith("\\") else (b"", path)
    segments = rest.split(".")
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(f"path={path!r}: {segment!r} is no ACPI name: 1 to 4 of A-Z, 0-9 and _, no digit first")
    padded = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    prefixes = {1: b"", 2: b"\x2e"}  # a name of two segments has a prefix of its own, longer ones say how many
    return root + prefixes.get(len(segments), b"\x2f" + bytes([len(segments)])) + padded


def _sized(content: bytes) -> bytes:
    """`content` behind its PkgLength, which counts itself: 6 bits in a byte, or 4 bits and one to three more bytes."""
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    for more in (1, 2, 3):
        size = len(content) + 1 + more
        if size < 1 << (4 + 8 * more):
            return bytes([more << 6 | size & 0xF]) + (size >> 4).to_bytes(more, "little") + content
    raise ValueError(f"content of {len(content)} bytes: a package of AML has room for less than 256 MiB")


# ---- data


def integer(value: int) -> bytes:
    """The shortest form of a number of up to 64 bits.

    Raises:
        ValueError: it is negative or longer.
    """
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"value={value}: must be a number from 0 to 2**64 - 1")


def string(text: str) -> bytes:
    """ASCII text.

    Raises:
        ValueError: a character is not in 1-127.
    """
    if not text.isascii() or "\0" in text:
        raise ValueError(f"text={text!r}: must be ASCII, without NUL")
    return b"\x0d" + text.encode() + b"\0"


def eisa_id(identity: str) -> bytes:
    """An EISA id such as PNP0A08, as the number that stands for it.

    Raises:
        ValueError: it is not three letters and four hexadecimal digits.
    """
    if not re.fullmatch(r"[A-Z]{3}[0-9A-F]{4}", identity):
        raise ValueError(f"identity={identity!r}: must be three capital letters and four hexadecimal digits")
    letters = 0
    for letter in identity[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + struct.pack(
        ">HH", letters, int(identity[3:], 16)
    )  # the one number in AML with its high byte first


def buffer(content: bytes) -> bytes:
    return b"\x11" + _sized(integer(len(content)) + content)


def package(*elements: bytes) -> bytes:
    """Raises ValueError: there are more than 255 elements."""
    if len(elements) > 255:
        raise ValueError(f"{len(elements)} elements: a package has at most 255")
    return b"\x12" + _sized(bytes([len(elements)]) + b"".join(elements))


# ---- objects


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + named(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return b"\x10" + _sized(named(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    return b"\x5b\x82" + _sized(named(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Raises ValueError: not 0 to 7 arguments."""
    if not 0 <= arguments <= 7:
        raise ValueError(f"arguments={arguments}: a method has 0 to 7")
    return b"\x14" + _sized(named(path) + bytes([arguments | serialized << 3]) + b"".join(terms))


def operation_region(path: str, space: int, address: int, size: int) -> bytes:
    return b"\x5b\x80" + named(path) + bytes([space]) + integer(address) + integer(size)


def field(region: str, width: int, fields: dict[str, int]) -> bytes:
    """A ``Field`` of a region: consecutive fields by name, with their bits.

    Parameters:
        width: bytes of an access: 1, 2 or 4. Nothing is locked, and bits that are not written stay as they are.
    """
    access = {1: 1, 2: 2, 4: 3}[width]
    listed = b"".join(named(one).ljust(4, b"_") + _bits(bits) for one, bits in fields.items())
    return b"\x5b\x81" + _sized(named(region) + bytes([access]) + listed)


def _bits(bits: int) -> bytes:
    """A field's size has the form of a PkgLength, but doesn't count itself."""
    if bits < 1 << 6:
        return bytes([bits])
    return bytes([1 << 6 | bits & 0xF, bits >> 4])


# ---- statements


def return_(value: bytes) -> bytes:
    return b"\xa4" + value


def store(value: bytes, target: bytes) -> bytes:
    return b"\x70" + value + target


def notify(path: str, value: int) -> bytes:
    return b"\x86" + named(path) + integer(value)


def bit_and(left: bytes, right: bytes) -> bytes:
    """``And`` with no target: the value alone."""
    return b"\x7b" + left + right + b"\0"


def if_(condition: bytes, *terms: bytes) -> bytes:
    return b"\xa0" + _sized(condition + b"".join(terms))


# ---- resource descriptors

_CONSUMER: Final = 1
_FIXED: Final = 1 << 2 | 1 << 3  # its first and its last address can't change


def resources(*descriptors: bytes) -> bytes:
    """A ``ResourceTemplate``: descriptors and an end tag, whose checksum of 0 says that it is right."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def memory(span: range) -> bytes:
    """``Memory32Fixed``, read and written."""
    return struct.pack("<BHBII", 0x86, 9, 1, span.start, len(span))


def io_ports(span: range) -> bytes:
    """``IO`` with 16-bit decoding, at this address alone."""
    return struct.pack("<BBHHBB", 0x47, 1, span.start, span.start, 1, len(span))


def interrupt(gsi: int, *, edge: bool) -> bytes:
    """``Interrupt``: of a device that consumes it, active high, not shared."""
    return struct.pack("<BHBBI", 0x89, 6, _CONSUMER | edge << 1, 1, gsi)


def _window(tag: int, form: str, kind: int, flags: int, span: range) -> bytes:
    """An address space descriptor: a range that a bridge hands down (a producer)."""
    fields = struct.pack(f"<BBB5{form}", kind, _FIXED, flags, 0, span.start, span.stop - 1, 0, len(span))
    return struct.pack("<BH", tag, len(fields)) + fields


def bus_numbers(span: range) -> bytes:
    """``WordBusNumber``."""
    return _window(0x88, "H", 2, 0, span)


def io_window(span: range) -> bytes:
    """``WordIO`` with the entire range, ISA and other addresses."""
    return _window(0x88, "H", 1, 3, span)


def memory_window(span: range) -> bytes:
    """``DWordMemory`` below 4 GiB, else ``QWordMemory``: not cached, read and written."""
    wide = span.stop > 1 << 32
    return _window(0x8A if wide else 0x87, "Q" if wide else "I", 0, 1, span)
