"""Pauses one run of a VM, lets it go on, and names what a pause waits for. `pause_levels` has the levels of a pause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, cast

from ..backend import RunResult
from ..host.control.caps import Caps
from ..native.core import Command
from .devices.assembly import Assembly
from .devices.bus import Bus
from .lifecycle import Lifecycle
from .pause_levels import Level, PauseLevels, PendingIo, PendingRequests
from .vcpu import Vcpu

__all__ = ["Pausing"]


class Run(Protocol):
    """The run (`Instance`), as `Pausing` needs it."""

    life: Lifecycle
    pause_levels: PauseLevels
    vcpus: list[Vcpu]
    mmio: Bus
    devices: Assembly | None
    now: Callable[[], int]

    def command(self, set: int = 0, clear: int = 0) -> None: ...


class Pausing:
    """The pauses of one run; for the fleet's thread. In a run that has ended, all methods do nothing."""

    def __init__(self, run: Run, caps: Caps) -> None:
        self._run = run
        self._caps = caps
        self._began = 0

    def pause(self) -> None:
        """Tell all vCPUs to park; does not wait.

        Order: `pause_levels` begins first, so that the first report of a vCPU finds the new pause number. The command
        comes before `using` is read. A vCPU does the two in the opposite order, so one of them sees the other.
        """
        run, pause_levels = self._run, self._run.pause_levels
        if run.life.has_ended:
            return
        pause_levels.begin(requests=run.devices is not None and run.devices.has_queues)
        if run.devices is not None:
            run.devices.hold(self.look)
            self.look()
        self._began = run.now()
        run.command(set=Command.PAUSE)
        for vcpu in run.vcpus:
            vcpu.pausing = True
            if vcpu.using is not None:  # a device answers, and the command is set: this vCPU runs no guest code
                pause_levels.come(vcpu.index, pause_levels.number, Level.PAUSED)
        self._caps.hurry(True)

    def look(self) -> None:
        """Devices may have come to rest: the I/O thread has the drain task say so (`Instance.talked`)."""
        levels, devices = self._run.pause_levels, self._run.devices
        if levels.awaits_requests and devices is not None and devices.is_still:
            levels.rest()

    def resume(self) -> None:
        """Let all vCPUs go on."""
        run = self._run
        if run.life.has_ended:
            return
        run.pause_levels.end()
        for vcpu in run.vcpus:
            vcpu.pausing = False
        self._caps.hurry(False)
        if run.devices is not None:
            run.devices.let_go()
        run.command(clear=Command.PAUSE)

    def pending(self) -> tuple[PendingIo | PendingRequests, ...]:
        """What keeps the run from being quiesced, while it is told to pause: unanswered accesses, and requests to
        devices."""
        run = self._run
        if run.life.has_ended:
            return ()
        accesses = tuple(found for vcpu in run.vcpus if (found := self._pending(vcpu)) is not None)
        if run.devices is None or not run.pause_levels.awaits_requests:
            return accesses
        busy = run.devices.outstanding()
        return accesses + tuple(PendingRequests(name, requests, self._began) for name, requests in busy)

    def _pending(self, vcpu: Vcpu) -> PendingIo | None:
        """The access that this vCPU waits for. None: there is none, or none that can be named."""
        pause_levels, using, asked = self._run.pause_levels, vcpu.using, vcpu.asked
        settled = pause_levels.has_gone(vcpu.index) or pause_levels.level(vcpu.index) is Level.QUIESCED
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
