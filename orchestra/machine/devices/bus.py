"""Ports and MMIO addresses, and the handlers that answer there.

The table of claims is the core's (native/bus.c): vCPU threads look up there, without a lock, while others claim, move
and release. The core itself answers accesses that a device of the core or nobody has claimed: these never reach Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from threading import Lock, RLock
from typing import Any, Protocol, TypeAlias, runtime_checkable

import attrs

from ...model.errors import SpecError, StateError
from ...native import ffi, lib

__all__ = ["Bus", "Claim", "Device", "Handler", "NativeDevice"]


@runtime_checkable
class Device(Protocol):
    """Registers that are read and written on the vCPU thread, at once.

    The guest is hostile: a device must survive every offset, size (1, 2, 4, 8) and value. Calls for one device never
    overlap. What `read` returns is cut to `size` bytes. An exception fails the VM, and no other. If there is a method
    `reset()`, it is called before each run of the VM but the first, on the fleet's thread (`Vm.attach`).

    An access that reaches beyond the device's addresses, or that has another size, is divided into naturally aligned
    pieces. The device gets the pieces that lie on its addresses.
    """

    def read(self, offset: int, size: int) -> int:
        """The value of `size` bytes at `offset` from the claim's start."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take `value` of `size` bytes at `offset`."""


@runtime_checkable
class Asker(Protocol):
    """Accesses that a task answers (see `orchestra.machine.devices.requests`)."""

    def deliver(self, request: Any) -> None: ...


class NativeDevice:
    """A device of the core, which answers accesses without Python. `native` is its ``orc_device *``."""

    native: Any

    def read(self, offset: int, size: int) -> int:
        data = ffi.new("uint8_t[]", size)
        lib.orc_device_answer(self.native, offset, size, 1, False, data)
        return int.from_bytes(ffi.buffer(data), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        lib.orc_device_answer(self.native, offset, size, 1, True, ffi.from_buffer(value.to_bytes(size, "little")))


Handler: TypeAlias = Device | Asker


@attrs.define(eq=False)
class Claim:
    """One range of a bus, and the handler that answers there.

    Attributes:
        version: the number of the claim on the bus, by which the core names it. A claim that moves gets another.
        device: the handler, if it answers on the vCPU thread. None: a task answers.
        lock: held by the thread that calls the handler, during the call.
        live: the claim was neither released nor moved. Read with `lock` held: once false, no call begins any more.
    """

    span: range
    handler: Handler
    device: Device | None
    lock: RLock
    version: int
    live: bool = True

    def retire(self) -> None:
        """Wait for a call in flight, unless this thread makes it, and let no other call begin."""
        with self.lock:
            self.live = False


class Bus:
    """One address space of `size` addresses. `name` is for messages. All methods: any thread.

    Attributes:
        handle: the core's table.
        claimed: the claims by version. If the core names a version that is not here, that claim was released meanwhile.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.claimed: dict[int, Claim] = {}
        self.handle: Any = ffi.gc(lib.orc_bus_new(), lib.orc_bus_free)
        if self.handle == ffi.NULL:
            raise MemoryError("orc_bus_new")
        self._claims: list[Claim] = []
        # From 1: the core says 0 where nobody has claimed (`orc_bus_find`).
        self._versions = count(1)
        self._lock = Lock()

    def claim(self, span: range, handler: Handler, lock: RLock | None = None) -> Claim:
        """Give a range to a handler.

        Parameters:
            lock: held while a device answers. A device with several claims has one lock for all of them.

        Raises:
            SpecError: the range is empty, outside the address space, not contiguous, or overlaps another claim.
        """
        with self._lock:
            self._check(span, self._claims)
            # Reentrant: a device may release or move its own claim within a call.
            added = self._made(span, handler, lock or RLock())
            self._replace([*self._claims, added])
            return added

    def move(self, claim: Claim, span: range) -> Claim:
        """Let a claim's handler answer at another range, from one access to the next: never at both, nor at none.

        Returns the claim that takes its place. Waits, as `release`, for a call to the range before.

        Raises:
            SpecError: as `claim`; nothing is moved then.
            StateError: the claim was released or moved already.
        """
        with self._lock:
            if self.claimed.get(claim.version) is not claim:
                raise StateError(f"{self.name}={claim.span.start:#x}-{claim.span.stop - 1:#x}: it is claimed no more")
            others = [other for other in self._claims if other is not claim]
            self._check(span, others)
            moved = self._made(span, claim.handler, claim.lock)
            self._replace([*others, moved])
        # Outside the bus's lock: the call that this waits for may itself claim, move or release.
        claim.retire()
        return moved

    def release(self, claim: Claim) -> None:
        """Take a range back. A second call does nothing.

        After the return no call for this claim runs or begins, except a call that the caller itself is within. So this
        waits for a device that answers on another thread. The fleet's thread must not release a device that waits for
        the fleet's thread: they would wait for each other.
        """
        with self._lock:
            if self.claimed.get(claim.version) is claim:
                self._replace([other for other in self._claims if other is not claim])
        claim.retire()

    def find(self, address: int) -> Claim | None:
        """The claim that has an address; None: nobody has."""
        return self.claimed.get(lib.orc_bus_find(self.handle, address))

    def claims(self) -> list[Claim]:
        """The claims in the order of their addresses. The list is replaced, never changed: any thread may read it."""
        return self._claims

    def _made(self, span: range, handler: Handler, lock: Any) -> Claim:
        return Claim(span, handler, handler if isinstance(handler, Device) else None, lock, next(self._versions))

    def _check(self, span: range, claims: Sequence[Claim]) -> None:
        if not isinstance(span, range) or span.step != 1 or not len(span):
            raise SpecError(f"{self.name}={span!r}: must be a range of addresses with step 1, at least one")
        if span.start < 0 or span.stop > self.size:
            raise SpecError(f"{self.name}={span.start:#x}-{span.stop - 1:#x}: must lie in 0-{self.size - 1:#x}")
        for claim in claims:
            taken = claim.span
            if span.start < taken.stop and taken.start < span.stop:
                raise SpecError(
                    f"{self.name}={span.start:#x}-{span.stop - 1:#x}: {taken.start:#x}-{taken.stop - 1:#x} is claimed "
                    f"by {type(claim.handler).__name__} already; choose other addresses, or release those first"
                )

    def _replace(self, claims: list[Claim]) -> None:
        """Publish these claims. During the change `claimed` has old and new claims, as the core may name both."""
        claims.sort(key=lambda claim: claim.span.start)
        table = ffi.new("struct orc_claim[]", len(claims))
        for entry, claim in zip(table, claims, strict=True):
            entry.start, entry.last, entry.version = claim.span.start, claim.span.stop - 1, claim.version
            entry.task = claim.device is None
            if isinstance(claim.handler, NativeDevice):
                entry.device = claim.handler.native
        before = self.claimed
        self.claimed = before | {claim.version: claim for claim in claims}
        if lib.orc_bus_replace(self.handle, table, len(claims)):
            self.claimed = before
            raise MemoryError("orc_bus_replace")
        self._claims = claims
        self.claimed = {claim.version: claim for claim in claims}
