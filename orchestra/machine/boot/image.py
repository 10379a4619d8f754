"""What the parsers of kernel files have in common: an image that is checked, and not yet in guest memory."""

from __future__ import annotations

from typing import Final, Literal

import attrs

from ...model import platform

__all__ = ["COMMAND_LINE_MOST", "HEADER_AT", "Image", "Piece"]

HEADER_AT: Final = 0x1F1
"""Where the setup header begins, in a bzImage and in boot_params."""
COMMAND_LINE_MOST: Final = 2047
"""What Linux on x86 takes where the file does not say (COMMAND_LINE_SIZE, less the zero byte)."""


@attrs.frozen
class Piece:
    """A part of the file: `size` bytes from `offset` on go to `address`, and zeros after them up to `room` bytes."""

    address: int
    offset: int
    size: int
    room: int

    @property
    def span(self) -> range:
        return range(self.address, self.address + self.room)


@attrs.frozen
class Image:
    """A kernel's file, as its parser has understood it.

    Attributes:
        protocol: how it is entered.
        entry: guest-physical address of its first instruction.
        pieces: what goes into memory.
        span: memory that is the kernel's own until it has set itself up. Nothing else may lie there.
        header: its setup header, from `HEADER_AT` on.
        initrd_stop: where an initrd must end.
        command_line_most: bytes of a command line that it takes.
    """

    protocol: Literal["linux64", "pvh"]
    entry: int
    pieces: tuple[Piece, ...]
    span: range
    header: bytes = b""
    initrd_stop: int = platform.BARS.start
    command_line_most: int = COMMAND_LINE_MOST
