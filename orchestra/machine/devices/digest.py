"""The one to copy: a device that computes the CRC-32 of guest memory. See docs/devices.md.

    offset  size  register
    0x00    4     ID: "ORCD", little-endian; read-only
    0x04    4     STATUS: bit 0: it is broken, and needs a reset; read-only
    0x08    8     DESCRIPTOR: the guest-physical address of a descriptor
    0x10    8     MSI_ADDRESS
    0x18    4     MSI_DATA: writing it programs the interrupt with both
    0x1c    4     RESET: any write resets the device; reads as 0
    0x20    4     DOORBELL: there is a request; reads as 0. It is written without an exit.
    0x24    4     SERVED: how many requests were answered, modulo 2**32; read-only

Registers are read and written as a whole; any other access reads as 0 and changes nothing. A descriptor is 24 bytes:

    0  address, 8 bytes      8  length, 4 bytes      12  status, 4 bytes      16  CRC, 4 bytes      20  zero, 4 bytes

The guest sets status to 1 (asked) and rings. The device writes CRC and 2 (done), or 3 (refused: the range is not all
memory, or longer than 64 KiB), and interrupts. A descriptor that is no memory itself breaks the device.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import attrs

from ...model.checks import whole
from ...model.devices import Digest
from ...model.errors import GuestMemoryError
from .peripheral import Hooks, Peripheral

__all__ = ["DigestDevice", "DigestState"]

ID: Final = int.from_bytes(b"ORCD", "little")
BROKEN: Final = 1
ASKED, DONE, REFUSED = 1, 2, 3
LONGEST: Final = 64 * 1024
"""Bytes of one request, about 20 us of work. It is done on the fleet's thread, which is everybody's."""
DESCRIPTOR: Final = struct.Struct("<QIIII")
RESULT: Final = struct.Struct("<II")
RESULT_AT: Final = 12
"""Where status and CRC are in a descriptor: all that the device writes of it."""


@attrs.frozen
class DigestState:
    """All that the device keeps. A number that does not fit its register is refused here, wherever it comes from."""

    descriptor: int = 0
    msi_address: int = 0
    msi_data: int = 0
    programmed: bool = False
    broken: bool = False
    served: int = 0

    def __attrs_post_init__(self) -> None:
        for field, bits in (("descriptor", 64), ("msi_address", 64), ("msi_data", 32), ("served", 32)):
            whole(field, getattr(self, field), 0, (1 << bits) - 1)


class DigestDevice(Peripheral[Digest, DigestState]):
    """See the module."""

    State = DigestState

    def __init__(self, spec: Digest, hooks: Hooks) -> None:
        super().__init__(spec, hooks)
        self._now = DigestState()  # frozen: each change is a new one, so `state` is always whole

    # ---- registers, on vCPU threads

    def read(self, offset: int, size: int) -> int:
        now = self._now
        match offset, size:
            case 0x00, 4:
                return ID
            case 0x04, 4:
                return BROKEN if now.broken else 0
            case 0x08, 8:
                return now.descriptor
            case 0x10, 8:
                return now.msi_address
            case 0x18, 4:
                return now.msi_data
            case 0x24, 4:
                return now.served
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        match offset, size:
            case 0x08, 8:
                self._now = attrs.evolve(self._now, descriptor=value)
            case 0x10, 8:
                self._now = attrs.evolve(self._now, msi_address=value)
            case 0x18, 4:
                programmed = self.hooks.msis[0].route(self._now.msi_address, value)
                if not programmed:
                    self.hooks.msis[0].unroute()
                self._now = attrs.evolve(self._now, msi_data=value, programmed=programmed)
            case 0x1C, 4:
                self.reset()

    # ---- work, on the fleet's thread

    def rang(self, doorbell: int, times: int) -> None:
        now = self._now
        if now.broken:
            return
        try:
            # Read once, all of it: the guest may write another length there while this one is checked.
            address, length, status, _, _ = DESCRIPTOR.unpack(self.hooks.memory.read(now.descriptor, DESCRIPTOR.size))
        except GuestMemoryError:
            self._now = attrs.evolve(now, broken=True)
            return
        if status != ASKED:  # it rang twice for one request, or this is the ring after a restore
            return
        result, crc = self._digest(address, length)
        self.hooks.memory.write(now.descriptor + RESULT_AT, RESULT.pack(result, crc))
        self._now = attrs.evolve(now, served=(now.served + 1) & 0xFFFF_FFFF)
        self.hooks.msis[0].fire()

    def _digest(self, address: int, length: int) -> tuple[int, int]:
        if length > LONGEST:
            return REFUSED, 0
        try:
            return DONE, zlib.crc32(self.hooks.memory.read(address, length))
        except GuestMemoryError:
            return REFUSED, 0

    # ---- power

    def reset(self) -> None:
        self.hooks.msis[0].unroute()
        self._now = DigestState()

    def state(self) -> DigestState:
        return self._now

    def restore(self, state: DigestState) -> None:
        if state.programmed:
            self.hooks.msis[0].route(state.msi_address, state.msi_data)
        self._now = state
