"""What a PCI function is, as plain data: its identity, its one BAR, its vectors and its capabilities.

`machine/devices/pci` makes its configuration space of it. Source: PCI Local Bus Specification 3.0, chapter 6.
"""

from __future__ import annotations

from typing import Final

import attrs

from .checks import fail, whole
from .errors import SpecError

__all__ = ["MOST_BELLS", "MOST_FUNCTIONS", "MOST_VECTORS", "Capability", "PciFunction"]

MOST_FUNCTIONS: Final = 31
"""Slots of a bus, but that of the host bridge. Each has one function: a driver of one then has no say over another."""
MOST_VECTORS: Final = 64
MOST_BELLS: Final = 64
VECTOR: Final = 16
"""Bytes of an entry of the MSI-X table: 6.8.2."""
BODY: Final = range(1, 64)


@attrs.frozen
class Capability:
    """A capability of a function: what follows its id and its pointer to the next one.

    Parameters:
        id: 9 is a vendor's own.
        body: its bytes at reset.
        writable: the bits of these that the guest may write, a byte each; empty: none. Writing one has no effect.
        window: it is a VIRTIO_PCI_CAP_PCI_CFG: reading or writing its last 4 bytes accesses the BAR.
    """

    id: int
    body: bytes
    writable: bytes = b""
    window: bool = False

    def __attrs_post_init__(self) -> None:
        whole("capability id", self.id, 1, 0xFF)
        if not isinstance(self.body, bytes) or len(self.body) not in BODY:
            raise fail("capability body", self.body, f"must be {BODY.start} to {BODY.stop - 1} bytes")
        if len(self.writable) not in (0, len(self.body)):
            raise fail("capability writable", self.writable, "must be as many bytes as the body, or none")


@attrs.frozen
class PciFunction:
    """A device on the PCI bus. Its registers are in BAR 0, and its interrupts are MSI-X.

    Parameters:
        vendor, device, subsystem_vendor, subsystem: who it is.
        class_code: class, subclass and programming interface, 24 bits.
        revision: of the device.
        bar_size: bytes of BAR 0, a power of two from 16 on. 0: it has none.
        vectors: its interrupts; 0: none.
        table, pending: where in the BAR the MSI-X table and the pending bits are. The device answers there.
        bells: where in the BAR a write of any size and value reaches the device without an exit (`Hooks.bells`).
        capabilities: besides MSI-X.
    """

    vendor: int
    device: int
    class_code: int
    subsystem_vendor: int = 0
    subsystem: int = 0
    revision: int = 0
    bar_size: int = 0
    vectors: int = 0
    table: int = 0
    pending: int = 0
    bells: tuple[int, ...] = ()
    capabilities: tuple[Capability, ...] = ()

    def __attrs_post_init__(self) -> None:
        for name, bits in (("vendor", 16), ("device", 16), ("subsystem_vendor", 16), ("subsystem", 16)):
            whole(name, getattr(self, name), 0, (1 << bits) - 1)
        whole("class_code", self.class_code, 0, (1 << 24) - 1)
        whole("revision", self.revision, 0, 0xFF)
        whole("bar_size", self.bar_size, 0, 1 << 28)
        if self.bar_size and (self.bar_size < 16 or self.bar_size & self.bar_size - 1):
            raise fail("bar_size", self.bar_size, "must be a power of two from 16 on, or 0 for no BAR")
        whole("vectors", self.vectors, 0, MOST_VECTORS)
        for name, size in (("table", VECTOR * self.vectors), ("pending", 8)):
            at = whole(name, getattr(self, name), 0, (1 << 28) - 8)
            if self.vectors and (at % 8 or at + size > self.bar_size):
                raise fail(name, at, "must be a multiple of 8 (6.8.2) within the BAR")
        if len(self.bells) > MOST_BELLS:
            raise fail("bells", len(self.bells), f"must be at most {MOST_BELLS}")
        for bell in self.bells:
            whole("bell", bell, 0, self.bar_size - 1)
        if len(set(self.bells)) != len(self.bells):
            raise SpecError(f"bells={self.bells}: must be different places")
