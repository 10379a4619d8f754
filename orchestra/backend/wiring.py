"""Interrupts and doorbells of devices, as a backend with an irqchip and ioeventfds provides them."""

from __future__ import annotations

import select
from typing import Protocol

__all__ = ["Bell", "InterruptLine", "InterruptPulse", "MsiVector", "Wires", "takes"]


def takes(fd: int) -> bool:
    """Whether an eventfd takes a write now."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(0))


class InterruptLine(Protocol):
    """A level-triggered line. The device holds it for as long as it wants attention. Any thread."""

    def set(self, level: bool) -> None:
        """Set the level. Nothing once the VM is closed."""


class InterruptPulse(Protocol):
    """An interrupt that is made by writing a number to an eventfd, which the kernel listens to (irqfd). Any thread."""

    @property
    def fd(self) -> int:
        """The eventfd, for code that makes interrupts without Python (vhost, a worker). -1 once the VM is closed."""

    def fire(self) -> None:
        """One interrupt. Several that the guest has not taken yet may become one. Nothing once the VM is closed."""


class MsiVector(InterruptPulse, Protocol):
    """A message-signalled interrupt. It goes nowhere until the guest has programmed it.

    What is fired while it goes nowhere, or while it is masked, is not lost: it stays in the eventfd, and becomes one
    interrupt at the next `route`.
    """

    def route(self, address: int, data: int) -> bool:
        """Send the interrupt there from now on. The change is one step: an interrupt never goes to a mixture of both.

        Both come from the guest. Returns False if `address` is no interrupt address of x86-64; the route is then as
        before.
        """

    def deliver(self) -> bool:
        """As `fire`, of an eventfd that another process has as well, and may have filled: it never waits. False: it is
        not bound, and nothing was done."""

    def mask(self) -> None:
        """Keep what is fired from now on in the eventfd, until `route`."""

    def unroute(self) -> None:
        """Send the interrupt nowhere and forget what was fired, as after a reset."""


class Bell(Protocol):
    """A doorbell that moves: a write of any size and value at its place."""

    @property
    def fd(self) -> int:
        """The eventfd (non-blocking) that counts the writes. -1 once the VM is closed."""

    def place(self, address: int | None) -> None:
        """It is at that guest-physical address from now on, and no more where it was. None: nowhere.

        Raises:
            KvmError, ResourceLimit: the kernel refuses; it is nowhere then.
        """


class Wires(Protocol):
    """The wiring of one machine. The machine closes what this returned."""

    def line(self, gsi: int) -> InterruptLine: ...
    def pulse(self, gsi: int) -> InterruptPulse: ...

    def resampled(self, gsi: int) -> tuple[InterruptPulse, int]:
        """A pulse that raises the line until the guest ends the interrupt, and an eventfd (non-blocking) that counts
        these ends."""

    def msi(self) -> MsiVector: ...
    def bell(self) -> Bell: ...

    def doorbell(self, address: int, size: int, value: int | None, *, pio: bool) -> int:
        """An eventfd (non-blocking) that counts the guest's writes there, none of which leaves the kernel.

        Raises:
            KvmError, ResourceLimit: the kernel refuses the doorbell.
        """
