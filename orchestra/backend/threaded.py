"""The common part of engines that block on a thread of their own. The core does all the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..native import lib
from ..native.core import Runner, VcpuCore
from ..native.records import Fields, unpack

__all__ = ["ThreadedEngine"]


class ThreadedEngine:
    """An engine whose `run` is one call into the C core, which releases the interpreter's lock."""

    threaded = True
    in_core: Any
    """The C function that `run` calls: ``enum orc_why (*)(orc_vcpu *)``."""

    def __init__(self, core: VcpuCore) -> None:
        self.core = core
        self.access: Any = lib.orc_vcpu_access(core.handle)
        self._handle = core.handle

    def start(self, vm: str, index: int, proceed: Callable[[int], object]) -> Runner:
        """Run the engine on a thread of its own. The thread calls `proceed` in Python when `run` returns for the first
        time.

        Raises:
            ResourceLimit: the host has no thread left.
        """
        return Runner(self.core, vm, index, self.in_core, proceed)

    def sleep(self, seen: int) -> None:
        lib.orc_vcpu_sleep(self._handle, seen)

    def attach(self) -> None:
        lib.orc_vcpu_attach(self._handle)

    def detach(self) -> None:
        lib.orc_vcpu_detach(self._handle)

    def kick(self) -> None:
        """Nothing: the core kicks threads."""

    def wake(self) -> None:
        self.core.wake()

    def resumed(self) -> None:
        """Nothing, unless the engine can tell the guest that time has passed."""

    def last_exit(self) -> Fields:
        return unpack(lib.orc_vcpu_record(self._handle))
