"""Both address spaces of one VM, ports and MMIO, and claims that lie in either or both of them."""

from __future__ import annotations

from threading import RLock
from typing import Final

from .bus import Bus, Handler

__all__ = ["Buses", "Ranges"]

PORTS: Final = 1 << 16
PHYSICAL: Final = 1 << 52
"""The most physical addresses that a CPU can have (Intel SDM vol. 3, 4.1.4: MAXPHYADDR)."""

Ranges = tuple[range | None, range | None]
"""A range of ports and a range of MMIO addresses; None: no range on that bus."""


class Buses:
    """The two buses of one run of a VM. All methods: any thread."""

    def __init__(self) -> None:
        self.ports = Bus("ports", PORTS)
        self.mmio = Bus("mmio", PHYSICAL)

    def claim(self, ports: range | None, mmio: range | None, handler: Handler) -> None:
        """Give ranges to a handler; all of them or, with an error, none.

        Raises:
            SpecError: as `Bus.claim`.
        """
        # One lock for all claims of a device, as its calls never overlap, on whichever bus they come.
        held = [*self.ports.claims(), *self.mmio.claims()]
        lock = next((claim.lock for claim in held if claim.handler is handler), None) or RLock()
        claimed = self.ports.claim(ports, handler, lock) if ports is not None else None
        if mmio is not None:
            try:
                self.mmio.claim(mmio, handler, lock)
            except BaseException:
                if claimed is not None:
                    self.ports.release(claimed)
                raise

    def release(self, handler: Handler) -> None:
        """Take back all claims of a handler: after the return nobody calls the handler."""
        for bus in (self.ports, self.mmio):
            for claim in bus.claims():
                if claim.handler is handler:
                    bus.release(claim)
