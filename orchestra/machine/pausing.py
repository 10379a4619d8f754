"""Pauses one run of a VM, and lets it go on; says what a pause still waits for. `holding` has how far that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, cast

from ..backend import RunResult
from ..host.control.caps import Caps
from ..native.core import Command
from .devices.assembly import Assembly
from .devices.bus import Bus
from .holding import Holding, Level, PendingIo
from .lifecycle import Lifecycle
from .vcpu import Vcpu

__all__ = ["Pausing"]


class Run(Protocol):
    """What this needs of the run (`Instance`)."""

    life: Lifecycle
    holding: Holding
    vcpus: list[Vcpu]
    mmio: Bus
    devices: Assembly | None
    now: Callable[[], int]

    def command(self, set: int = 0, clear: int = 0) -> None: ...


class Pausing:
    """Of one run; for the fleet's thread. A run that has ended is not paused, and nothing of it is pending."""

    def __init__(self, run: Run, caps: Caps) -> None:
        self._run = run
        self._caps = caps
        self._began = 0

    def pause(self) -> None:
        """Ask all vCPUs to park."""
        run, holding = self._run, self._run.holding
        if run.life.has_ended:
            return
        holding.begin()
        if run.devices is not None:
            run.devices.hold()
        self._began = run.now()
        run.command(set=Command.PAUSE)
        for vcpu in run.vcpus:
            vcpu.pausing = True
            if vcpu.using is not None:  # seen after the command, so it runs no guest code any more
                holding.come(vcpu.index, holding.number, Level.PAUSED)
        self._caps.hurry(True)

    def resume(self) -> None:
        """Let all vCPUs go on."""
        run = self._run
        if run.life.has_ended:
            return
        run.holding.end()
        for vcpu in run.vcpus:
            vcpu.pausing = False
        self._caps.hurry(False)
        if run.devices is not None:
            run.devices.let_go()
        run.command(clear=Command.PAUSE)

    def pending(self) -> tuple[PendingIo, ...]:
        """What keeps it from being quiesced, while it is told to pause: accesses that were not answered."""
        if self._run.life.has_ended:
            return ()
        return tuple(found for vcpu in self._run.vcpus if (found := self._pending(vcpu)) is not None)

    def _pending(self, vcpu: Vcpu) -> PendingIo | None:
        """None: it waits for nothing, or for nothing that can be named."""
        holding, using, asked = self._run.holding, vcpu.using, vcpu.asked
        settled = holding.has_gone(vcpu.index) or holding.level(vcpu.index) is Level.QUIESCED
        if not vcpu.pausing or settled:
            return None
        if asked is not None:
            name, waits_for = ("ports" if asked.bus == RunResult.IO else "mmio"), "a task"
            address, size, write, since = asked.address, asked.size, asked.write, asked.since
        elif using is not None:
            access, since = vcpu.engine.access, self._began
            name, waits_for = "mmio" if using in self._run.mmio.claims() else "ports", type(using.handler).__name__
            address, size, write = int(access.address), int(access.size), bool(access.write)
        else:
            return None
        return PendingIo(vcpu.index, cast(Literal["ports", "mmio"], name), address, size, write, waits_for, since)
