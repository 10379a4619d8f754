"""How a machine wires its devices: what a backend that has an irqchip and ioeventfds gives to each of them."""

from __future__ import annotations

from typing import Protocol

__all__ = ["InterruptLine", "InterruptPulse", "MsiVector", "Wires"]


class InterruptLine(Protocol):
    """A level-triggered line. The device holds it for as long as it wants attention. Any thread."""

    def set(self, level: bool) -> None:
        """Set the level. Nothing once the VM is closed."""


class InterruptPulse(Protocol):
    """An interrupt that is made by writing a number to an eventfd, which the kernel listens to (irqfd). Any thread."""

    @property
    def fd(self) -> int:
        """The eventfd, for whoever makes interrupts without Python (vhost, a worker). -1 once the VM is closed."""

    def fire(self) -> None:
        """One interrupt. Several that the guest has not taken yet may become one. Nothing once the VM is closed."""


class MsiVector(InterruptPulse, Protocol):
    """A message-signalled interrupt. It goes nowhere until the guest has said where to."""

    def route(self, address: int, data: int) -> bool:
        """Send it there from now on, in one step: to the old place or the new one, and never to half of each.

        Both come from the guest. False: `address` is no interrupt address of x86-64; it is routed as before then.
        """

    def unroute(self) -> None:
        """Send it nowhere, as after a reset."""


class Wires(Protocol):
    """The wiring of one machine, which closes what it gave."""

    def line(self, gsi: int) -> InterruptLine: ...
    def pulse(self, gsi: int) -> InterruptPulse: ...

    def resampled(self, gsi: int) -> tuple[InterruptPulse, int]:
        """A pulse that raises the line until the guest ends the interrupt, and an eventfd (non-blocking) that counts
        these ends."""

    def msi(self) -> MsiVector: ...

    def doorbell(self, address: int, size: int, value: int | None, *, pio: bool) -> int:
        """An eventfd (non-blocking) that counts the guest's writes there, none of which leaves the kernel.

        Raises:
            KvmError, ResourceLimit: the kernel won't.
        """
