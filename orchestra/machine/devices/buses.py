"""Both address spaces of one VM, ports and MMIO, and claims that lie in either or both of them."""

from __future__ import annotations

from threading import RLock
from typing import Final

from .bus import Bus, Handler

__all__ = ["Buses", "Ranges"]

PORTS: Final = 1 << 16
PHYSICAL: Final = 1 << 52
"""What a CPU can have of physical addresses at most (Intel SDM vol. 3, 4.1.4: MAXPHYADDR)."""

Ranges = tuple[range | None, range | None]
"""Of ports and of MMIO addresses; None: none there."""


class Buses:
    """Of one run of a VM."""

    def __init__(self) -> None:
        self.ports = Bus("ports", PORTS)
        self.mmio = Bus("mmio", PHYSICAL)

    def claim(self, ports: range | None, mmio: range | None, handler: Handler) -> None:
        """Give ranges to a handler; all of them or, with an error, none.

        Raises:
            SpecError: as `Bus.claim`.
        """
        # A device's calls never overlap, wherever they come from: one lock for all its claims.
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
        """Take back whatever the handler claimed: when it returns, nobody calls it."""
        for bus in (self.ports, self.mmio):
            for claim in bus.claims():
                if claim.handler is handler:
                    bus.release(claim)
