"""Interrupts and doorbells of a VM on KVM: irqfds, ioeventfds, and the one owner of its interrupt routes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import Any, Final

from ...model.devices import IRQS, Irqchip
from ...model.errors import OrchestraError, ResourceLimit
from ...native import ffi, lib
from ..wiring import takes
from .ioctl import failure
from .vm import KvmVm

__all__ = ["KvmWires", "Routes"]

MSI_ADDRESSES: Final = range(0xFEE0_0000, 0xFEF0_0000)
"""Where an MSI is written to (Intel SDM vol. 3, 11.11.1). With more bits of a destination in the upper half, which KVM
has for guests with more than 255 vCPUs, it would not be one; none of ours asks for that."""

MOST_ROUTES: Final = 4096
"""KVM_MAX_IRQ_ROUTES (include/linux/kvm_host.h), which no header for user space has."""

LINE_ROUTES: Final = IRQS + 16
"""Of these, those of the I/O APIC and the two PICs."""


class Routes:
    """Where the message-signalled interrupts of a VM go, by GSI. KVM has one table for all, so the table has one owner.

    Each change publishes a whole table, which KVM puts in the place of the old one at once. Any thread: a guest that
    programs its devices does so on its vCPUs' threads.
    """

    def __init__(self, interrupts: Any, *, lines: bool) -> None:
        """`lines`: the VM has an I/O APIC and PICs, whose routes stay as KVM made them."""
        self._interrupts = interrupts
        self._lines = lines
        self._lock = Lock()
        self._next = IRQS  # a GSI is not given twice: an irqfd of the one before may still be there
        self._routes: dict[int, tuple[int, int]] = {}

    def add(self) -> int:
        """A GSI of its own, which goes nowhere yet.

        Raises:
            ResourceLimit: KVM has no more of them.
        """
        with self._lock:
            if self._next - IRQS + LINE_ROUTES >= MOST_ROUTES:
                raise ResourceLimit(0, f"KVM_SET_GSI_ROUTING: a VM has {MOST_ROUTES} routes at most: use fewer devices")
            gsi, self._next = self._next, self._next + 1
            return gsi

    def set(self, gsi: int, address: int, data: int) -> None:
        """Send it there. Nothing if that is so already, as the kernel waits for all vCPUs to see a change.

        Raises:
            KvmError, ResourceLimit: the kernel won't; all is as it was.
        """
        self._change(gsi, (address, data))

    def clear(self, gsi: int) -> None:
        """Send it nowhere.

        Raises:
            KvmError, ResourceLimit: the kernel won't; all is as it was.
        """
        self._change(gsi, None)

    def _change(self, gsi: int, where: tuple[int, int] | None) -> None:
        with self._lock:  # over the ioctl, or two changes could be put into force in the wrong order
            if self._routes.get(gsi) == where:
                return
            routes = {number: there for number, there in self._routes.items() if number != gsi}
            if where is not None:
                routes[gsi] = where
            table = [{"gsi": number, "address": address, "data": data} for number, (address, data) in routes.items()]
            result = lib.orc_interrupts_route(
                self._interrupts, self._lines, ffi.new("struct orc_route[]", table), len(table)
            )
            if result:
                raise failure(-result, "KVM_SET_GSI_ROUTING")
            self._routes = routes

    @property
    def table(self) -> Mapping[int, tuple[int, int]]:
        """What is in force: address and data by GSI."""
        return self._routes


class Line:
    """A line of the irqchip, set by KVM_IRQ_LINE in the core."""

    def __init__(self, interrupts: Any, gsi: int) -> None:
        self._interrupts, self._gsi = interrupts, gsi

    def set(self, level: bool) -> None:
        lib.orc_interrupts_set(self._interrupts, self._gsi, level)  # the spec's number was checked


class Pulse:
    """An eventfd that the kernel makes an interrupt of."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._lock = Lock()  # whoever fires while it is closed must not write to what has its number next

    def fire(self) -> None:
        with self._lock, suppress(BlockingIOError):  # full: nobody has looked at 2**64 of them
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        with self._lock:
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Msi(Pulse):
    """A message-signalled interrupt: an eventfd, bound to a GSI that is routed as the guest says.

    It is bound only while it is to interrupt: of an eventfd that is bound to a GSI without a route, the kernel takes
    what was written and makes nothing of it. An irqfd goes before its route, as AMD's posted interrupts want it
    (the kernel's svm_update_pi_irte looks the route of a bound irqfd up without a check).
    """

    def __init__(self, fd: int, vm: KvmVm, routes: Routes, gsi: int) -> None:
        super().__init__(fd)
        self._vm, self._routes = vm, routes
        self._bound = False
        self.gsi = gsi

    def route(self, address: int, data: int) -> bool:
        if address not in MSI_ADDRESSES or not 0 <= data < 1 << 32:
            return False
        with self._lock:
            self._routes.set(self.gsi, address, data)
            self._bind(True)
        return True

    def deliver(self) -> bool:
        with self._lock:  # bound, the kernel empties it at each write. Only one that was full before may be full still
            if self._bound and self.fd >= 0 and takes(self.fd):
                os.eventfd_write(self.fd, 1)
            return self._bound

    def mask(self) -> None:
        with self._lock:
            self._bind(False)

    def unroute(self) -> None:
        with self._lock:
            self._bind(False)
            self._routes.clear(self.gsi)
            with suppress(BlockingIOError):
                if self.fd >= 0:
                    os.eventfd_read(self.fd)

    def _bind(self, bound: bool) -> None:
        if self.fd >= 0 and bound != self._bound:
            self._vm.irqfd(self.fd, self.gsi, deassign=not bound)
            self._bound = bound


class MovableBell:
    """An ioeventfd of any width, at the place where a guest maps the device's registers."""

    def __init__(self, fd: int, vm: KvmVm) -> None:
        self.fd = fd
        self._vm = vm
        self._address: int | None = None

    def place(self, address: int | None) -> None:
        if self.fd < 0 or address == self._address:
            return
        if (before := self._address) is not None:
            self._address = None
            self._vm.ioeventfd(self.fd, before, 0, deassign=True)
        if address is not None:
            self._vm.ioeventfd(self.fd, address, 0)
            self._address = address

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class KvmWires:
    """See `orchestra.backend.wiring`. Made for a VM with `irqchip`; whoever owns the VM closes this first.

    Attributes:
        routes: of its message-signalled interrupts.
    """

    def __init__(self, vm: KvmVm, irqchip: Irqchip) -> None:
        self.routes = Routes(vm.interrupts, lines=irqchip == "full")
        self._vm = vm
        self._pulses: list[Pulse] = []
        self._bells: list[int] = []  # eventfds that the kernel writes
        self._movable: list[MovableBell] = []

    def line(self, gsi: int) -> Line:
        return Line(self._vm.interrupts, gsi)

    def pulse(self, gsi: int) -> Pulse:
        """Raises ResourceLimit (no descriptor left), KvmError."""
        pulse = Pulse(_eventfd())
        self._pulses.append(pulse)
        self._vm.irqfd(pulse.fd, gsi)
        return pulse

    def resampled(self, gsi: int) -> tuple[Pulse, int]:
        """Raises ResourceLimit (no descriptor left), KvmError."""
        pulse = Pulse(_eventfd())
        self._pulses.append(pulse)
        ends = _eventfd()
        self._bells.append(ends)
        self._vm.irqfd(pulse.fd, gsi, resample_fd=ends)
        return pulse, ends

    def msi(self) -> Msi:
        """Raises ResourceLimit (no descriptor or route left), KvmError."""
        gsi = self.routes.add()
        msi = Msi(_eventfd(), self._vm, self.routes, gsi)
        self._pulses.append(msi)
        return msi

    def bell(self) -> MovableBell:
        """Raises ResourceLimit (no descriptor left)."""
        bell = MovableBell(_eventfd(), self._vm)
        self._movable.append(bell)
        return bell

    def doorbell(self, address: int, size: int, value: int | None, *, pio: bool) -> int:
        fd = _eventfd()
        self._bells.append(fd)
        self._vm.ioeventfd(fd, address, size, datamatch=value, pio=pio)
        return fd

    def close(self) -> None:
        """Nobody listens to its doorbells any more. The kernel lets go of an eventfd that is closed."""
        for pulse in self._pulses:
            pulse.close()
        for bell in self._movable:
            bell.close()
        bells, self._bells = self._bells, []
        for fd in bells:
            os.close(fd)


def _eventfd() -> int:
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        found: OrchestraError = failure(error.errno or 0, "eventfd")
        raise found from error
