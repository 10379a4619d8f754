"""The messages of vhost-user as bytes, both ways: what a back-end answers is checked word for word. Pure.

Source: QEMU's docs/interop/vhost-user.rst. The kernel's headers have nothing of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Final

import attrs

from ....model.errors import VhostUserError

__all__ = [
    "HEADER",
    "PROTOCOL_FEATURES",
    "Protocol",
    "RamRegion",
    "Request",
    "descriptor",
    "header",
    "parse_config",
    "parse_header",
    "parse_number",
    "parse_vring",
    "request",
    "table",
    "vring",
    "vring_addresses",
]

HEADER: Final = struct.Struct("<III")
"""Request, flags, bytes of the payload."""
NUMBER: Final = struct.Struct("<Q")
VRING: Final = struct.Struct("<II")
ADDRESSES: Final = struct.Struct("<IIQQQQ")
CONFIG: Final = struct.Struct("<III")
REGIONS: Final = struct.Struct("<II")
REGION: Final = struct.Struct("<QQQQ")

VERSION: Final = 1
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3
NO_DESCRIPTOR: Final = 1 << 8
"""Beside a queue's index: there is none."""
MOST_REGIONS: Final = 8
PROTOCOL_FEATURES: Final = 30
"""The bit of GET_FEATURES which says that there are `Protocol` features. No feature of the device."""


class Request(IntEnum):
    """What a front-end asks of a back-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_STATUS = 39


class Protocol(IntFlag):
    """Features of the protocol that this front-end uses."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9
    STATUS = 1 << 16


@attrs.frozen
class RamRegion:
    """A part of guest memory that the back-end maps.

    Attributes:
        address, size: guest-physical.
        offset: where it begins in its descriptor.
    """

    address: int
    size: int
    offset: int


# ---- to the back-end


def header(kind: Request, size: int, *, acknowledged: bool) -> bytes:
    return HEADER.pack(kind, VERSION | NEED_REPLY * acknowledged, size)


def request(kind: Request, payload: bytes = b"", *, acknowledged: bool = False) -> bytes:
    """A whole message. `acknowledged`: the back-end is to answer whether it did it, which it does not by itself."""
    return header(kind, len(payload), acknowledged=acknowledged) + payload


def table(regions: Sequence[RamRegion]) -> bytes:
    """The payload of SET_MEM_TABLE. The back-end knows each region by its guest-physical address: no address of this
    process is told."""
    if not 1 <= len(regions) <= MOST_REGIONS:
        raise VhostUserError(f"{len(regions)} regions of memory: a back-end takes from 1 to {MOST_REGIONS}")
    parts = [REGION.pack(region.address, region.size, region.address, region.offset) for region in regions]
    return REGIONS.pack(len(regions), 0) + b"".join(parts)


def vring(index: int, value: int) -> bytes:
    """The payload of SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE, GET_VRING_BASE."""
    return VRING.pack(index, value)


def vring_addresses(index: int, descriptors: int, driver: int, device: int) -> bytes:
    """The payload of SET_VRING_ADDR: guest-physical addresses, as in `table`. Nothing is logged."""
    return ADDRESSES.pack(index, 0, descriptors, device, driver, 0)


def descriptor(index: int, *, given: bool) -> bytes:
    """The payload of SET_VRING_KICK and SET_VRING_CALL, beside which the descriptor goes."""
    return NUMBER.pack(index | (0 if given else NO_DESCRIPTOR))


def config(size: int, content: bytes = b"") -> bytes:
    """The payload of GET_CONFIG, both ways."""
    return CONFIG.pack(0, size, 0) + (content or bytes(size))


# ---- from the back-end


def parse_header(data: bytes, kind: Request, size: int) -> None:
    """Check the header of the answer to `kind`, whose payload has `size` bytes.

    Raises:
        VhostUserError: it is none.
    """
    if len(data) != HEADER.size:
        raise VhostUserError(f"{kind.name}: an answer of {len(data)} bytes: its header has {HEADER.size}")
    found, flags, length = HEADER.unpack(data)
    if found != kind:
        raise VhostUserError(f"{kind.name}: the answer is to request {found}")
    if flags & 3 != VERSION or not flags & REPLY or flags & ~(3 | REPLY | NEED_REPLY):
        raise VhostUserError(f"{kind.name}: the answer has flags {flags:#x}: {VERSION | REPLY:#x} is one")
    if length != size:
        raise VhostUserError(f"{kind.name}: the answer has {length} bytes: it must have {size}")


def parse_number(payload: bytes) -> int:
    return int(NUMBER.unpack(payload)[0])


def parse_vring(payload: bytes, index: int) -> int:
    """Where a queue was stopped.

    Raises:
        VhostUserError: it is about another queue, or no place in a split ring.
    """
    found, base = VRING.unpack(payload)
    if found != index:
        raise VhostUserError(f"GET_VRING_BASE: the answer is about queue {found}, and not {index}")
    if base > 0xFFFF:
        raise VhostUserError(f"GET_VRING_BASE: queue {index} at {base:#x}: the last place is 0xffff")
    return int(base)


def parse_config(payload: bytes, size: int) -> bytes:
    """The device's configuration.

    Raises:
        VhostUserError: it is not what was asked for.
    """
    offset, length, _ = CONFIG.unpack_from(payload)
    if (offset, length) != (0, size):
        raise VhostUserError(f"GET_CONFIG: the answer has {length} bytes from {offset} on: it must have {size} from 0")
    return payload[CONFIG.size :]
