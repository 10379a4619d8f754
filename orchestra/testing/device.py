"""A device without a VM: its registers driven directly, its surroundings recorded, its clock set by the test."""

from __future__ import annotations

import os
from threading import RLock
from typing import Any, Final

from ..backend.memory import GuestMemory
from ..backend.memory_layout import memory_slots
from ..machine.devices.bus import Bus, NativeDevice
from ..machine.devices.console import Console
from ..machine.devices.consoleport import Ports
from ..machine.devices.pci import OnBus, PciHost
from ..machine.devices.peripheral import Hooks, Peripheral, SharedRam, implementation
from ..machine.devices.timers import Timers, VmTimer
from ..model.actions import Outcome
from ..model.devices import DeviceSpec
from ..model.memory import Memory
from ..model.spec import FlatImage, VmSpec
from ..native import ffi, lib

__all__ = ["DeviceRig", "RecordedMsi", "RecordedPulse"]


CONFIGURATION: Final = 1 << 15  # of device 1, in the memory-mapped window


def answer(native: Any, offset: int, data: bytes) -> bool:
    """Write to an ``orc_device``. False: it goes up to Python."""
    return bool(lib.orc_device_answer(native, offset, len(data), 1, True, ffi.from_buffer(bytearray(data))))


def ask(native: Any, offset: int, size: int) -> int:
    """Read an ``orc_device``. No read goes up to Python."""
    data = ffi.new("uint8_t[]", size)
    assert lib.orc_device_answer(native, offset, size, 1, False, data)
    return int.from_bytes(ffi.buffer(data), "little")


class RecordedLine:
    """A level-triggered line; `levels` has every level that was set, in order."""

    def __init__(self) -> None:
        self.levels: list[bool] = []

    def set(self, level: bool) -> None:
        self.levels.append(level)


class RecordedPulse:
    """An interrupt that counts."""

    fd: int = -1

    def __init__(self) -> None:
        self.fired = 0

    def fire(self) -> None:
        self.fired += 1


class RecordedMsi(RecordedPulse):
    """A `RecordedPulse` with its route. Like KVM, it refuses an address that is no interrupt address.

    Attributes:
        where: address and data; None: nowhere, or masked.
        fd: an eventfd, for a device of the core.
    """

    def __init__(self) -> None:
        super().__init__()
        self.where: tuple[int, int] | None = None
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def route(self, address: int, data: int) -> bool:
        if not 0xFEE0_0000 <= address < 0xFEF0_0000:
            return False
        self.where = (address, data)
        return True

    def deliver(self) -> bool:
        if self.where is not None:
            self.fire()
        return self.where is not None

    def mask(self) -> None:
        self.where = None

    def unroute(self) -> None:
        self.where = None


class RecordedBell:
    """A doorbell on the PCI bus. `address`: where it is; None: nowhere."""

    def __init__(self) -> None:
        self.address: int | None = None
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def place(self, address: int | None) -> None:
        self.address = address


class DeviceRig:
    """A device of that spec, with memory, interrupts and timers that a test can look at. Close it at the end.

    Parameters:
        spec: the device's spec.
        memory: bytes of guest memory, from address 0.
        state: the device goes on from this state; None: power-on.
        now: the time, in nanoseconds.

    Attributes:
        device: the device.
        memory: the guest's memory, which a test writes like the guest.
        line, pulse, msis: its interrupts; `line.levels`, `pulse.fired`, `msis[0].fired` and `.where` say what it did.
        console, ports: what the device has to talk and listen to.
        now: the time, in nanoseconds. `advance` sets it.
        outcomes: with which the device ended the VM.
        wall_clock: seconds since 1970 of the host's clock.
    """

    def __init__(self, spec: DeviceSpec, *, memory: int = 64 * 1024, state: object = None, now: int = 1) -> None:
        wiring = spec.wiring()
        kind: Any = implementation(spec)
        self.back_end = kind.prepare(spec) if spec.has_back_end else None
        backing = Memory(memory, backing="shared" if spec.has_back_end else "anonymous")
        self.memory = GuestMemory(VmSpec(name="rig", boot=FlatImage(code=b"\xf4"), memory=backing))
        self.line, self.pulse = RecordedLine(), RecordedPulse()
        self.msis = tuple(RecordedMsi() for _ in range(wiring.vectors))
        self.now = now
        self.outcomes: list[Outcome] = []
        self.wall_clock = 1_700_000_000.0
        self.console = Console(lambda wake: wake())
        self.ports = Ports(lambda wake: wake(), [spec])
        self.mmio = Bus("mmio", 1 << 52)
        self.bus = PciHost(self.mmio, [] if wiring.pci is None else [wiring.pci])
        self.bells = tuple(RecordedBell() for _ in (wiring.pci.bells if wiring.pci is not None else ()))
        slots = memory_slots(self.memory)
        guest = ffi.gc(lib.orc_guest_memory_new(slots, len(slots), ffi.NULL), lib.orc_guest_memory_free)
        self._timers = Timers(lambda: self.now, lambda: None)
        hooks = Hooks(
            memory=self.memory,
            timer=self._timers.new,
            console=self.console,
            ports=self.ports,
            end=self.outcomes.append,
            wall_clock=lambda: self.wall_clock,
            line=self.line,
            pulse=self.pulse,
            msis=self.msis,
            slot=self.bus.slots[0] if wiring.pci is not None else None,
            bells=self.bells,
            bus=self.bus,
            guest=guest,
            backing=self.memory.backing,
            ram=SharedRam(self.memory.descriptor, ((0, memory, 0),), guest) if self.memory.descriptor else None,
            back_end=self.back_end,
        )
        self.device: Peripheral[Any, Any]
        try:
            self.device = kind(spec, hooks) if state is None else kind.from_state(spec, hooks, state)
        except BaseException:
            self._give_back()
            raise
        if wiring.pci is not None:
            assert isinstance(self.device, OnBus)
            self.bus.slots[0].plug(self.device, RLock(), self.bells)

    def read(self, offset: int, size: int = 4) -> int:
        """Read as a guest does. Returns the value, cut to `size` bytes."""
        return self.device.read(offset, size) & (1 << 8 * size) - 1

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write as a guest does: what the core has answered does not come to `write`."""
        data = value.to_bytes(size, "little")
        device = self.device
        if not isinstance(device, NativeDevice) or not answer(device.native, offset, data):
            device.write(offset, size, value)

    def configure(self, offset: int, value: int, size: int = 4) -> None:
        """Write the configuration space of the device as a guest does."""
        if not answer(self.bus.ecam, CONFIGURATION + offset, value.to_bytes(size, "little")):
            self.bus.sync()

    def ring(self, doorbell: int = 0, times: int = 1) -> None:
        """Ring a doorbell as a guest does."""
        self.device.rang(doorbell, times)

    def advance(self, nanoseconds: int) -> None:
        """Let time pass: each timer expires at its time, in their order."""
        end = self.now + nanoseconds
        while (at := self._timers.next()) is not None and at <= end:
            self.now = max(self.now, at)
            for timer, setting in self._timers.due():
                self._expire(timer, setting)
        self.now = end

    def _expire(self, timer: VmTimer, setting: int) -> None:
        if self._timers.taken(timer, setting):
            timer.expired()

    def again(self) -> DeviceRig:
        """Another rig, with a copy of the memory, whose device goes on from this device's state."""
        size = len(self.memory.regions[0].span)
        other = DeviceRig(self.device.spec, memory=size, state=self.device.state(), now=self.now)
        other.memory.write(0, self.memory.read(0, size))
        return other

    def close(self) -> None:
        """Unmap the memory."""
        if self.back_end is not None:
            self.back_end.stop()
        self.device.stop()
        self._give_back()

    def _give_back(self) -> None:
        if self.back_end is not None:
            self.back_end.close()
        self.memory.close()
        for fd in [msi.fd for msi in self.msis] + [bell.fd for bell in self.bells]:
            os.close(fd)

    def __enter__(self) -> DeviceRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
