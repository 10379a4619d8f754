"""How far a run has followed a pause: from the command to the moment when its state may be read and saved.

Each vCPU reaches its levels by itself. The level of the run is the lowest level of its vCPUs. A vCPU that has ended
counts as quiesced. `lifecycle` has the states of the run as a whole, and the drawing.

*Paused*: no guest code runs. A vCPU may still be in the middle of an access that a device or a task has to answer. When
the answer comes, the kernel completes the access without executing another instruction of the guest, and registers and
memory change. *Quiesced*: no access is pending, and no request to a device is in flight; registers and memory stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Literal

import attrs
import trio

from .lifecycle import Event, Lifecycle

__all__ = ["Level", "PauseLevels", "PendingIo", "PendingRequests"]


class Level(IntEnum):
    """How far one vCPU, or a VM, has followed a pause."""

    RUNNING = 0
    PAUSED = 1
    QUIESCED = 2


@attrs.frozen
class PendingIo:
    """An access of a paused VM's guest that still waits for its answer. It keeps the VM from being quiesced.

    Attributes:
        vcpu: the number of the vCPU that made the access.
        bus: "ports" or "mmio".
        address, size, write: as in `Request`.
        waits_for: the class name of the device that has to answer; "a task": a task in a `Vm.requests` block has to.
        since: nanoseconds on the fleet's clock. For a task: when the question was asked. For a device: when the VM was
            told to pause.
    """

    vcpu: int
    bus: Literal["ports", "mmio"]
    address: int
    size: int
    write: bool
    waits_for: str
    since: int

    def __str__(self) -> str:
        what = f"{'write' if self.write else 'read'} of {self.size} bytes at {self.bus} {self.address:#x}"
        return f"vCPU {self.vcpu}: a {what} waits for {self.waits_for}"


@attrs.frozen
class PendingRequests:
    """Requests of a paused VM's guest that a device still works on. They keep the VM from being quiesced.

    Attributes:
        device: the device, such as "Disk /srv/web-1.img".
        requests: how many are in flight. None: the device is too busy to be asked.
        since: nanoseconds on the fleet's clock, when the VM was told to pause.
    """

    device: str
    requests: int | None
    since: int

    def __str__(self) -> str:
        return f"{self.device}: {'some' if self.requests is None else self.requests} requests are in flight"


class PauseLevels:
    """The pauses of one run of a VM; for the fleet's thread. It reports the level of the run to the run's `Lifecycle`.

    Attributes:
        number: counts pauses. A vCPU reports with this number, so a late report about an old pause is ignored.
        paused, quiesced: set when the run has reached that level, or never will: the pause was taken back, or the run
            is over.
        awaits_requests: devices may have requests in flight, which keep the run from being quiesced.

    Parameters:
        vcpus: the number of vCPUs.
        reached: called with a level when the run reaches it. If both are reached at once, only with `QUIESCED`.
    """

    def __init__(self, vcpus: int, life: Lifecycle, reached: Callable[[Level], object]) -> None:
        self.number = 0
        self.paused = trio.Event()
        self.quiesced = trio.Event()
        self._life = life
        self._reached = reached
        self._levels = [Level.RUNNING] * vcpus
        self._gone: set[int] = set()
        self._asked = False
        self.awaits_requests = False

    def begin(self, *, requests: bool = False) -> None:
        """The run is told to pause. `requests`: devices may have some in flight, until `rest` is called."""
        # First, as this raises if the run can't pause now: then nothing else has changed.
        self._life.happen(Event.PAUSE)
        self._asked = True
        self.awaits_requests = requests
        self.number += 1
        self._renew()

    def settle(self) -> None:
        """The pause came before any vCPU ran: the run is quiesced at once, and `reached` is not called."""
        self._levels = [Level.QUIESCED] * len(self._levels)
        self.awaits_requests = False
        self._come_to(Level.QUIESCED)
        self.paused.set()

    def end(self) -> None:
        """The run may go on. Tasks that wait for the pause, which is taken back, go on too."""
        self._life.happen(Event.RESUME)
        self._asked = False  # from now on a report of a vCPU about that pause comes too late
        self.awaits_requests = False
        # The events of the pause that is taken back let their tasks go. `_renew` makes others, as an event stays set
        # and the next pause must not find itself reached.
        self.paused.set()
        self.quiesced.set()
        self._renew()

    def _renew(self) -> None:
        self._levels = [Level.RUNNING] * len(self._levels)
        self.paused, self.quiesced = trio.Event(), trio.Event()

    def close(self) -> None:
        """The run is over: no task waits for a pause any more."""
        self.paused.set()
        self.quiesced.set()

    def come(self, index: int, number: int, level: Level) -> None:
        """A vCPU reports that it has reached this level of pause number `number`."""
        if self._asked and number == self.number and level > self._levels[index]:
            self._levels[index] = level
            self._check()

    def rest(self) -> None:
        """No request to a device is in flight any more, until the pause ends."""
        if self.awaits_requests:
            self.awaits_requests = False
            self._check()

    def gone(self, index: int) -> None:
        """A vCPU has ended."""
        self._gone.add(index)
        self._check()

    def level(self, index: int) -> Level:
        """The level of that vCPU."""
        return self._levels[index]

    def has_gone(self, index: int) -> bool:
        """Whether that vCPU has ended."""
        return index in self._gone

    @property
    def all_gone(self) -> bool:
        return len(self._gone) == len(self._levels)

    def _check(self) -> None:
        # A vCPU that has ended runs no guest code, so the others decide.
        alive = [level for index, level in enumerate(self._levels) if index not in self._gone]
        if not alive:
            self.close()
            return
        lowest = min(alive)
        if self.awaits_requests:
            lowest = min(lowest, Level.PAUSED)
        fresh = [
            level
            for level, event in ((Level.PAUSED, self.paused), (Level.QUIESCED, self.quiesced))
            if lowest >= level and not event.is_set()
        ]
        for level in fresh:
            self._come_to(level)
        if fresh:
            self._reached(fresh[-1])

    def _come_to(self, level: Level) -> None:
        if level is Level.PAUSED:
            self._life.happen(Event.PARKED)
            self.paused.set()
        else:
            self._life.happen(Event.SETTLED)
            self.quiesced.set()
