"""virtio devices on PCI (virtio 1.2): their specs, and what all of them have on the bus."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import attrs

from .checks import fail, number, whole
from .devices import DeviceSpec, Wiring, check_streams
from .memory import MAX_MEMORY, PAGE, MiB
from .pci import Capability, PciFunction

__all__ = [
    "BAR_SIZE",
    "COMMON",
    "DEVICE",
    "ISR",
    "NOTIFY",
    "NOTIFY_MULTIPLIER",
    "PENDING",
    "TABLE",
    "Balloon",
    "Console",
    "Rng",
]

# Where things are in BAR 0: native/virtio.h has the same, and a test compares them.
COMMON: Final = range(0x0, 0x3C)
ISR: Final = range(0x1000, 0x1001)
DEVICE: Final = 0x2000
NOTIFY: Final = 0x3000
NOTIFY_MULTIPLIER: Final = 4
TABLE: Final = 0x4000
PENDING: Final = 0x5000
BAR_SIZE: Final = 0x8000

VENDOR: Final = 0x1AF4
FIRST_DEVICE: Final = 0x1040  # 4.1.2: the device is this and its type
MODERN: Final = 1  # the lowest revision of a device that is not transitional: 4.1.2.1
VENDOR_CAPABILITY: Final = 0x09
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = range(1, 6)  # 4.1.4


def function(kind: int, class_code: int, queues: int, config_size: int) -> PciFunction:
    """What a virtio device of that type is on the bus: a vector for each queue, and one for its configuration."""
    parts = [
        _part(COMMON_CFG, COMMON.start, len(COMMON)),
        _part(ISR_CFG, ISR.start, len(ISR)),
        _part(NOTIFY_CFG, NOTIFY, NOTIFY_MULTIPLIER * queues, _le(NOTIFY_MULTIPLIER)),
    ]
    if config_size:
        parts.append(_part(DEVICE_CFG, DEVICE, config_size))
    window = _part(PCI_CFG, 0, 0, bytes(4))
    writable = bytes([0, 0, 0xFF, 0, 0, 0]) + b"\xff" * 12  # bar; offset, length and data: 4.1.4.9
    parts.append(attrs.evolve(window, writable=writable, window=True))
    return PciFunction(
        vendor=VENDOR,
        device=FIRST_DEVICE + kind,
        class_code=class_code,
        subsystem_vendor=VENDOR,
        subsystem=FIRST_DEVICE + kind,  # 0x40 or higher: no driver of transitional devices takes it
        revision=MODERN,
        bar_size=BAR_SIZE,
        vectors=queues + 1,
        table=TABLE,
        pending=PENDING,
        bells=tuple(NOTIFY + NOTIFY_MULTIPLIER * queue for queue in range(queues)),
        capabilities=tuple(parts),
    )


def _part(kind: int, offset: int, length: int, more: bytes = b"") -> Capability:
    """struct virtio_pci_cap (4.1.4) from `cap_len` on, which counts the id and the pointer to the next one as well."""
    head = bytes([16 + len(more), kind, 0, 0, 0, 0])  # in BAR 0
    return Capability(VENDOR_CAPABILITY, head + _le(offset) + _le(length) + more)


def _le(value: int) -> bytes:
    return value.to_bytes(4, "little")


def as_names(value: Any) -> Any:
    """A list of names as a tuple; what is no list is checked as it is."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@attrs.frozen
class Rng(DeviceSpec):
    """An entropy device: random bytes of the host's, for ``/dev/hwrng`` and the kernel's own pool."""

    implementation: ClassVar[str] = "orchestra.machine.devices.virtio:RngDevice"

    def wiring(self) -> Wiring:
        return Wiring(pci=function(4, 0xFF0000, queues=1, config_size=0))  # of no class that there is


MOST_PORTS: Final = 6
"""Each takes two of a device's 16 queues (native/virtio.h), and the console and control messages take four."""


@attrs.frozen
class Console(DeviceSpec):
    """A console, ``hvc0`` in Linux; its output goes to the VM's console. Faster than `Serial`: it works in blocks.

    Parameters:
        columns, rows: its size, which the guest is told, until `Console.resize` says another.
        ports: names of byte streams beside it, 6 at most. A program in the guest opens ``/dev/virtio-ports/NAME`` (by
            udev; the device itself is ``/dev/vport0p1``), and the other end is ``vm.ports[name]``.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.virtioconsole:ConsoleDevice"

    columns: int = 80
    rows: int = 25
    ports: tuple[str, ...] = attrs.field(default=(), converter=as_names)

    def __attrs_post_init__(self) -> None:
        whole("columns", self.columns, 1, 0xFFFF)
        whole("rows", self.rows, 1, 0xFFFF)
        check_streams(self.ports)
        if len(self.ports) > MOST_PORTS:
            raise fail("ports", len(self.ports), f"must be at most {MOST_PORTS}: add another Console for more")

    def wiring(self) -> Wiring:
        queues = 2 if not self.ports else 4 + 2 * len(self.ports)  # 5.3.2
        return Wiring(pci=function(3, 0x078000, queues=queues, config_size=12), streams=self.ports)


@attrs.frozen
class Balloon(DeviceSpec):
    """A memory balloon: memory that the guest does not use goes back to the host; `Vm.set_memory` asks for more of it.

    The guest needs a driver (Linux: ``virtio_balloon``). Nothing forces a guest: one without a driver, or one that
    refuses, keeps its memory.

    Parameters:
        free_page_reporting: the guest reports memory that it has freed, in pieces of 2 MiB or more, and the host has it
            back until the guest touches it again. Nothing needs to be asked for.
        deflate_on_oom: a guest that has run out of memory takes pages back from the balloon before it kills a process.
            Linux then counts the pages in the balloon as used (MemFree), and else as not there (MemTotal).
        must_tell_host: the driver says so before it uses a page of the balloon again. The host has no need of that.
        statistics_interval: seconds between two statistics of the guest's memory (`MemoryStatistics.guest`); None: only
            those of the driver's start. Each wakes the guest, and no Python.
        floor: the least that `Vm.set_memory` may ask for, in bytes.
    """

    implementation: ClassVar[str] = "orchestra.machine.devices.balloon:BalloonDevice"

    free_page_reporting: bool = True
    deflate_on_oom: bool = True
    must_tell_host: bool = False
    statistics_interval: float | None = 10.0
    floor: int = 64 * MiB

    def __attrs_post_init__(self) -> None:
        for name in ("free_page_reporting", "deflate_on_oom", "must_tell_host"):
            if not isinstance(getattr(self, name), bool):
                raise fail(name, getattr(self, name), "must be True or False")
        interval = self.statistics_interval
        if interval is not None and not 0.1 <= number("statistics_interval", interval) <= 86400:
            raise fail("statistics_interval", interval, "must be from 0.1 to 86400 seconds, or None")
        if whole("floor", self.floor, PAGE, MAX_MEMORY, " bytes") % PAGE:
            raise fail("floor", self.floor, f"must be a multiple of {PAGE} bytes")

    @property
    def memory_floor(self) -> int:
        return self.floor

    def wiring(self) -> Wiring:
        queues = 5 if self.free_page_reporting else 3
        return Wiring(pci=function(5, 0xFF0000, queues=queues, config_size=16))  # of no class, as Rng
