"""The PCI bus of a VM: configuration space from plain data, and who answers where a guest has mapped a BAR.

    PciFunction ─ configuration() ─→ bytes and masks ─→ native/pci.c answers the guest
                                                          │ a write with an effect: command, BAR, MSI-X control
    the device's claim and its ioeventfds  ←── Slot.sync() ┘
    its vectors, bound or not              ←───┘

Source: PCI Local Bus Specification 3.0, chapter 6.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from threading import RLock
from typing import Any, Final, Protocol, runtime_checkable

import attrs

from ...backend.wiring import Bell
from ...model import platform
from ...model.errors import SpecError
from ...model.pci import PciFunction
from ...native import ffi, lib
from .bus import Bus, Claim, Device

__all__ = ["BRIDGE", "OnBus", "PciHost", "Slot", "Space", "bar_addresses", "configuration"]

log: Final = logging.getLogger("orchestra")

SPACE: Final = int(lib.ORC_PCI_SPACE)
COMMAND, STATUS, CACHE_LINE, BAR, SUBSYSTEM, FIRST, LINE = 0x04, 0x06, 0x0C, 0x10, 0x2C, 0x34, 0x3C  # 6.1
CAPABILITIES: Final = 0x40
MEMORY, MASTER, NO_INTX = 1 << 1, 1 << 2, 1 << 10  # of the command register: 6.2.2
HAS_CAPABILITIES: Final = 1 << 4  # of the status register: 6.2.3
BAR_64: Final = 0b100  # memory of a 64-bit address, not prefetchable: 6.2.5.1
MSIX: Final = 0x11
MSIX_ENABLE, MSIX_MASKED = 1 << 15, 1 << 14  # of its message control: 6.8.2.3

BRIDGE: Final = PciFunction(vendor=0x1B36, device=0x0008, class_code=0x060000)
"""QEMU's generic host bridge (PCI_DEVICE_ID_REDHAT_PCIE_HOST): no chipset. With the ids of one, as of Intel's Q35,
guests look for what it has besides, and the kernel's quirks write to its registers."""


# ---- configuration space


@attrs.frozen
class Space:
    """A function's 4 KiB. `effects`: of the `writable` bits those whose change is more than stored.

    Attributes:
        msix, window: where these capabilities are; 0: it has none.
    """

    reset: bytes
    writable: bytes
    effects: bytes
    msix: int = 0
    window: int = 0


def configuration(function: PciFunction, bar: int = 0) -> Space:
    """The configuration space of a function whose BAR 0 is at that address at reset."""
    reset, writable, effects = bytearray(SPACE), bytearray(SPACE), bytearray(SPACE)
    identity = (function.vendor, function.device, 0, 0, function.class_code << 8 | function.revision)
    struct.pack_into("<HHHHI", reset, 0, *identity)
    struct.pack_into("<HH", reset, SUBSYSTEM, function.subsystem_vendor, function.subsystem)
    struct.pack_into("<H", writable, COMMAND, MEMORY | MASTER | NO_INTX)
    struct.pack_into("<H", effects, COMMAND, MEMORY | MASTER)
    writable[CACHE_LINE] = writable[LINE] = 0xFF  # for the guest's own use: 6.2.4
    if function.bar_size:
        struct.pack_into("<Q", reset, BAR, bar | BAR_64)
        for mask in (writable, effects):
            struct.pack_into("<Q", mask, BAR, (1 << 64) - function.bar_size)
    at, link, found = CAPABILITIES, FIRST, {"msix": 0, "window": 0}
    for number, body, writes, acts, name in _capabilities(function):
        reset[link], link = at, at + 1
        reset[at] = number
        for target, part in ((reset, body), (writable, writes), (effects, acts)):
            target[at + 2 : at + 2 + len(part)] = part
        if name:
            found[name] = at
        at = (at + 2 + len(body) + 3) & ~3  # 6.7
        struct.pack_into("<H", reset, STATUS, HAS_CAPABILITIES)
    return Space(bytes(reset), bytes(writable), bytes(effects), **found)


def _capabilities(function: PciFunction) -> Iterator[tuple[int, bytes, bytes, bytes, str]]:
    """Id, body, the bits of it that may be written, those of them with an effect, and its field in `Space`."""
    for one in function.capabilities:
        yield one.id, one.body, one.writable, b"", "window" if one.window else ""
    if function.vectors:
        body = struct.pack("<HII", function.vectors - 1, function.table, function.pending)  # in BAR 0: 6.8.2.4
        control = struct.pack("<H", MSIX_ENABLE | MSIX_MASKED)
        yield MSIX, body, control, control, "msix"


def bar_addresses(functions: Sequence[PciFunction]) -> list[int]:
    """Where each function's BAR is at reset, so that no guest has to place any. 0: it has none, or there is no room."""
    addresses, at = [], platform.BARS.start
    for function in functions:
        size = function.bar_size
        start = (at + size - 1) & -size if size else 0
        fits = size and start + size <= platform.BARS.stop
        addresses.append(start if fits else 0)
        at = start + size if fits else at
    return addresses


# ---- the bus


@runtime_checkable
class OnBus(Device, Protocol):
    """A device that is on the bus. All methods: its lock is held."""

    def interrupts_changed(self) -> None:
        """`Slot.interrupts`, `Slot.master` or an entry of its MSI-X table may have changed.

        Bind or mask the vectors, and touch no memory of the guest's unless it is a bus master.
        """


class Slot:
    """One function on the bus.

    Lock order: the host's, then the device's. A device that looks at `interrupts` takes neither.
    """

    def __init__(self, host: PciHost, number: int, function: PciFunction, bar: int) -> None:
        self.number = number
        self.function = function
        self._host = host
        space = configuration(function, bar)  # the core has a copy of it
        self._msix, self._window = space.msix, space.window
        self._claim: Claim | None = None
        self._device: OnBus | None = None
        self._lock = RLock()
        self._bells: Sequence[Bell] = ()
        self._told = (False, False)
        if result := lib.orc_pci_add(host.handle, number, space.reset, space.writable, space.effects):
            raise MemoryError(f"orc_pci_add: {result}")

    def _read(self, offset: int, size: int) -> int:
        found = ffi.new("uint8_t[]", size)
        lib.orc_pci_copy(self._host.handle, self.number, offset, size, found)
        return int.from_bytes(ffi.buffer(found), "little")

    @property
    def master(self) -> bool:
        """Whether it may access memory: 6.2.2. Any thread."""
        return bool(self._read(COMMAND, 2) & MASTER)

    @property
    def interrupts(self) -> bool:
        """Whether its vectors may interrupt now, but for their own masks. Any thread."""
        if not self._msix or not self.master:  # an MSI is a write of a bus master: 6.8.3
            return False
        return self._read(self._msix + 2, 2) & (MSIX_ENABLE | MSIX_MASKED) == MSIX_ENABLE

    @property
    def mapped(self) -> range | None:
        """Where its BAR answers; None: nowhere."""
        return None if self._claim is None else self._claim.span

    def plug(self, device: OnBus, lock: RLock, bells: Sequence[Bell]) -> None:
        """Let that device be the function: it answers at the BAR, with `lock` held. On any thread, once.

        Raises:
            KvmError, ResourceLimit: the kernel refuses a doorbell.
        """
        self._device, self._lock, self._bells = device, lock, bells
        if self._window:
            native = getattr(device, "native", ffi.NULL)
            lib.orc_pci_window(self._host.handle, self.number, self._window, native)
        self._host.sync()

    def sync(self) -> bool:
        """Put what the configuration space says into force. Caller holds the host's lock. False: another is there."""
        if self._device is None:
            return True
        done = self._map()
        with self._lock:
            through_window = lib.orc_pci_took_window(self._host.handle, self.number)
            if (now := (self.master, self.interrupts)) != self._told or through_window:
                self._told = now
                self._device.interrupts_changed()
        return done

    def _map(self) -> bool:
        wanted = self._wanted()
        if wanted == self.mapped:
            return True
        # The doorbells leave first. Meanwhile the device gets the writes itself, at whichever place they come.
        for bell in self._bells:
            bell.place(None)
        bus, before, self._claim = self._host.mmio, self._claim, None
        try:
            if before is not None and wanted is not None:
                self._claim = bus.move(before, wanted)
            elif wanted is not None and self._device is not None:
                self._claim = bus.claim(wanted, self._device, self._lock)
        except SpecError:  # what two devices decode is nobody's
            return False
        finally:
            if before is not None:
                bus.release(before)  # nothing, if it was moved
        if wanted is not None:
            for offset, bell in zip(self.function.bells, self._bells, strict=True):
                bell.place(wanted.start + offset)
        return True

    def _wanted(self) -> range | None:
        size = self.function.bar_size
        if not size or not self._read(COMMAND, 2) & MEMORY:
            return None
        start = self._read(BAR, 8) & -size
        return range(start, start + size) if start else None  # 0: nobody has placed it


class PciHost:
    """The bus of one run: all functions, whose devices are plugged in one by one.

    Attributes:
        handle: the core's ``orc_pci *``.
        slots: of the devices, in the order of the functions.
    """

    def __init__(self, mmio: Bus, functions: Sequence[PciFunction]) -> None:
        self.handle = lib.orc_pci_new()
        if self.handle == ffi.NULL:
            raise MemoryError("orc_pci_new")
        self.mmio = mmio
        self.ecam: Any = ffi.gc(lib.orc_pci_ecam(self.handle), lib.orc_device_free)
        self.ports: Any = lib.orc_pci_ports(self.handle)
        self._lock = RLock()
        self.bridge = Slot(self, 0, BRIDGE, 0)
        places = zip(functions, bar_addresses(functions), strict=True)
        self.slots = tuple(Slot(self, number, function, bar) for number, (function, bar) in enumerate(places, 1))

    def sync(self) -> None:
        """Put what the configuration spaces say into force. Any thread."""
        with self._lock:
            blocked = [slot for slot in self.slots if not slot.sync()]
            for slot in blocked:
                slot.sync()  # another one may have made room

    def reset(self) -> None:
        lib.orc_pci_reset(self.handle)
        self.sync()

    def save(self) -> tuple[int, tuple[bytes, ...]]:
        """CONFIG_ADDRESS, and the configuration space of each function, the bridge's first."""
        spaces, space = [], ffi.new("uint8_t[]", SPACE)
        for slot in (self.bridge, *self.slots):
            lib.orc_pci_copy(self.handle, slot.number, 0, SPACE, space)
            spaces.append(bytes(ffi.buffer(space)))
        return int(lib.orc_pci_selected(self.handle)), tuple(spaces)

    def load(self, selected: int, spaces: Sequence[bytes]) -> None:
        """Be as it was saved.

        Raises:
            SpecError: no such bus can be in that state.
        """
        slots = (self.bridge, *self.slots)
        if len(spaces) != len(slots) or any(len(space) != SPACE for space in spaces):
            raise SpecError(f"spaces: must be {len(slots)} of {SPACE} bytes")
        for slot, space in zip(slots, spaces, strict=True):
            if not lib.orc_pci_load(self.handle, slot.number, ffi.from_buffer(space)):
                raise SpecError(f"spaces: slot {slot.number} differs where no guest can write")
        lib.orc_pci_select(self.handle, selected)
        self.sync()
