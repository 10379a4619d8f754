"""Has the core make VMs while the event loop does other things. No thread waits for the interpreter's lock meanwhile.

a launch's task ── plan ──▶ a thread of the core ── eventfd ──▶ the same task
"""

from __future__ import annotations

import errno
import os
from typing import Any, Final

import trio

from ..backend import Plan
from ..model.errors import ResourceLimit
from ..native import ffi, lib

__all__ = ["Builder"]

PLANS: Final = 16
"""Plans that the core has at once: more than its threads need to be busy, and each takes an eventfd of the process."""


class Builder:
    """The threads of one fleet that make VMs; for the fleet's thread. They begin with the first plan."""

    def __init__(self) -> None:
        self._handle: Any = ffi.NULL
        self._bells: list[int] = []  # eventfds that nobody waits for
        self._places = trio.CapacityLimiter(PLANS)

    async def make(self, plan: Plan) -> None:
        """Make the VM of a plan: `Plan.machine` has it, or says why there is none. Where the host has no thread left,
        the VM is made on this thread: late is better than never.

        If this is cancelled, it waits until the VM is made, and is cancelled then.

        Raises:
            ResourceLimit: the host has no descriptor left. Nothing was made.
        """
        turn = object()
        try:
            self._places.acquire_on_behalf_of_nowait(turn)
        except trio.WouldBlock:
            await self._places.acquire_on_behalf_of(turn)
        try:
            bell = self._bell()
            try:
                if lib.orc_builder_begin(self._handle, plan.raw, bell):
                    plan.make()
                    return
                await self._rung(bell)
            finally:
                self._bells.append(bell)
        finally:
            self._places.release_on_behalf_of(turn)

    def _bell(self) -> int:
        if self._handle == ffi.NULL:
            self._handle = lib.orc_builder_new()
            if self._handle == ffi.NULL:
                raise MemoryError("orc_builder_new")
        if self._bells:
            return self._bells.pop()
        try:
            return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            number = error.errno or errno.EMFILE
            raise ResourceLimit(
                number, f"eventfd: {os.strerror(number)}: raise the limit on open files (ulimit -n)"
            ) from error

    async def _rung(self, bell: int) -> None:
        try:
            await trio.lowlevel.wait_readable(bell)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):  # as long as the kernel takes, about a millisecond
                await trio.lowlevel.wait_readable(bell)
            os.eventfd_read(bell)
            raise
        os.eventfd_read(bell)

    def close(self) -> None:
        """End the threads. No plan is being made."""
        handle, self._handle = self._handle, ffi.NULL
        if handle != ffi.NULL:
            lib.orc_builder_free(handle)
        for bell in self._bells:
            os.close(bell)
        self._bells.clear()
