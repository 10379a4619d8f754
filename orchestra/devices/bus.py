"""Ports and MMIO addresses: who answers where.

vCPU threads look up while the fleet's thread claims and releases, so the table is replaced whole and never changed.
"""

from __future__ import annotations

from bisect import bisect_right
from threading import Lock
from typing import Protocol, TypeAlias, runtime_checkable

import attrs

from ..errors import SpecError

__all__ = ["Bus", "Claim", "Device", "Handler"]


@runtime_checkable
class Device(Protocol):
    """Registers that are read and written on the vCPU thread, at once.

    The guest is hostile: every offset, size (1, 2, 4, 8) and value must be survived. Calls for one device never
    overlap. What `read` returns is cut to `size` bytes. An exception fails the VM, and no other. If there is a method
    `reset()`, it is called before each run of the VM but the first, on the fleet's thread (`Vm.attach`).
    """

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset` from the claim's start."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take `value` of `size` bytes at `offset`."""


@runtime_checkable
class Asker(Protocol):
    """Accesses that a task answers (see `orchestra.devices.requests`)."""

    def submit(self, vcpu: int, address: int, size: int, write: bool, data: bytes, wake: object) -> object: ...


Handler: TypeAlias = Device | Asker


@attrs.frozen(eq=False)
class Claim:
    span: range
    handler: Handler
    device: Device | None
    """The handler, if it answers on the vCPU thread."""
    lock: Lock


class Bus:
    """One address space. `name` and `size` are for the messages and the edge."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._table: tuple[list[int], list[Claim]] = ([], [])

    def claim(self, span: range, handler: Handler, lock: Lock | None = None) -> Claim:
        """Give a range to a handler. `lock` is held while a device answers: its own, if it has several claims.

        Raises:
            SpecError: the range is empty, outside the address space, not contiguous, or overlaps another claim.
        """
        if not isinstance(span, range) or span.step != 1 or not len(span):
            raise SpecError(f"{self.name}={span!r}: must be a range of addresses with step 1, at least one")
        if span.start < 0 or span.stop > self.size:
            raise SpecError(f"{self.name}={span.start:#x}-{span.stop - 1:#x}: must lie in 0-{self.size - 1:#x}")
        claims = self._table[1]
        for claim in claims:
            taken = claim.span
            if span.start < taken.stop and taken.start < span.stop:
                raise SpecError(
                    f"{self.name}={span.start:#x}-{span.stop - 1:#x}: {taken.start:#x}-{taken.stop - 1:#x} is claimed "
                    f"by {type(claim.handler).__name__} already"
                )
        added = Claim(span, handler, handler if isinstance(handler, Device) else None, lock or Lock())
        self._replace(sorted([*claims, added], key=lambda claim: claim.span.start))
        return added

    def release(self, claim: Claim) -> None:
        self._replace([other for other in self._table[1] if other is not claim])

    def _replace(self, claims: list[Claim]) -> None:
        self._table = ([claim.span.start for claim in claims], claims)

    def find(self, address: int, size: int) -> Claim | None:
        """Who answers all `size` bytes at `address`; None if nobody does. Any thread."""
        starts, claims = self._table
        index = bisect_right(starts, address) - 1
        if index < 0:
            return None
        claim = claims[index]
        return claim if address + size <= claim.span.stop else None

    def claims(self) -> list[Claim]:
        return self._table[1]
