"""A driver of a virtio device that runs on the host, beside a guest that does nothing; and memory that can't be had."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import Any, Final

import pytest

import orchestra as orc
from orchestra.machine.devices.pci import MASTER, MEMORY
from orchestra.model import virtio
from orchestra.testing.device import answer

RINGS: Final = 0x1_0000
DATA: Final = 0x1_4000
QUEUE: Final = 8
WRITE, NEXT = 2, 1  # of a descriptor: virtio 1.2, 2.7.5
VERSION_1: Final = 1 << 32


def machine(*devices: orc.DeviceSpec, name: str = "vm") -> orc.VmSpec:
    """A VM with these devices on its bus, whose guest spins."""
    boot = orc.FlatImage(code=b"\xeb\xfe")
    return orc.VmSpec(name=name, boot=boot, memory=orc.MiB, irqchip="full", devices=(orc.PciHostBridge(), *devices))


class HostDriver:
    """Drives queue 0 of the device in that slot (from 1 on) as a guest's driver does."""

    def __init__(self, vm: orc.Vm, slot: int = 1) -> None:
        devices = vm._control.guest.devices
        self.vm, self.slot = vm, slot
        self.bridge, self.device = devices.plugged[0].device, devices.plugged[slot].device
        self.offered = 0

    def command(self, bits: int) -> None:
        """Write the command register of its configuration space."""
        self.configure(0x04, struct.pack("<H", bits))

    def configure(self, offset: int, data: bytes) -> None:
        if not answer(self.bridge.native, self.slot * 8 * 4096 + offset, data):
            self.bridge.write(0, 0, 0)  # the core has stored it, and Python looks

    def put(self, offset: int, size: int, value: int) -> None:
        if not answer(self.device.native, offset, value.to_bytes(size, "little")):
            self.device.write(offset, size, value)

    def start(self, *, master: bool = True) -> None:
        """Up to DRIVER_OK."""
        self.command(MEMORY | MASTER * master)
        self.put(0x14, 1, 0)
        for status in (1, 3):
            self.put(0x14, 1, status)
        for select in (0, 1):
            self.put(0x08, 4, select)
            self.put(0x0C, 4, VERSION_1 >> 32 * select & 0xFFFF_FFFF)
        self.put(0x14, 1, 11)
        self.put(0x16, 2, 0)
        self.put(0x18, 2, QUEUE)
        for register, address in ((0x20, RINGS), (0x28, RINGS + 0x1000), (0x30, RINGS + 0x2000)):
            self.put(register, 8, address)
        self.put(0x1C, 2, 1)
        self.put(0x14, 1, 15)

    def offer(self, *buffers: tuple[int, int, int]) -> None:
        """Make a chain of (address, size, flags) available, and notify."""
        for number, (address, size, flags) in enumerate(buffers):
            more = number + 1 < len(buffers)
            entry = struct.pack("<QIHH", address, size, flags | NEXT * more, number + 1 if more else 0)
            self.vm.write_memory(RINGS + 16 * number, entry)
        self.vm.write_memory(RINGS + 0x1004 + 2 * (self.offered % QUEUE), bytes(2))
        self.offered += 1
        self.vm.write_memory(RINGS + 0x1002, struct.pack("<H", self.offered))
        os.eventfd_write(self.device.hooks.bells[0].fd, 1)

    def read_sector(self, sector: int, to: int) -> None:
        """A request to a disk."""
        self.vm.write_memory(DATA, struct.pack("<IIQ", 0, 0, sector))
        self.offer((DATA, 16, 0), (to, 512, WRITE), (DATA + 0x100, 1, WRITE))

    @property
    def status(self) -> int:
        return int(self.device.read(virtio.COMMON.start + 0x14, 1))

    @property
    def used(self) -> int:
        """How many requests are done."""
        return int.from_bytes(self.vm.read_memory(RINGS + 0x2002, 2), "little")


class Missing:
    """A page of guest memory that nobody has touched, and that whoever touches it waits for, until `give`.

    As memory is that comes from another host, or from a file that hangs.
    """

    def __init__(self, vm: orc.Vm, address: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)  # userfaultfd(2)
        if self.fd < 0:
            pytest.skip(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
        self._page = _host_address(vm, address)
        fcntl.ioctl(self.fd, 0xC018_AA3F, struct.pack("<QQQ", 0xAA, 0, 0))  # UFFDIO_API
        missing = struct.pack("<QQQQ", self._page, 4096, 1, 0)
        fcntl.ioctl(self.fd, 0xC020_AA00, missing)  # UFFDIO_REGISTER

    def touched(self) -> bool:
        """Whether somebody waits for it."""
        try:
            return len(os.read(self.fd, 32)) == 32
        except BlockingIOError:
            return False

    def give(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)  # which wakes whoever waits: the page is as any other
            self.fd = -1


def _host_address(vm: orc.Vm, address: int) -> int:
    memory: Any = vm._control.guest.memory
    for region in memory.regions:
        if address in region.span:
            return int(region.host) + address - region.span.start
    raise AssertionError(f"{address:#x} is no memory")
