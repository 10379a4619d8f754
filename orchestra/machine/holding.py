"""How far a VM is held: from the word "pause" to the moment when its state may be read and saved.

Each vCPU comes to its levels by itself; the VM is at the lowest that any of them is at. One that has ended counts as
quiesced.

                   begin()            it is outside the guest,         nothing of an access is left
                                      and will not enter it            to be done
       RUNNING ───────────────▶ RUNNING ───────────────▶ PAUSED ───────────────▶ QUIESCED
          ▲                     (pausing)                   │  ▲                    │
          │                        │                        │  └─ ...until the answer comes: the kernel then
          │                        │                        │     completes the access, without a single
          └──────── end() ─────────┴───────── end() ────────┴──── instruction of the guest's ◀┘ end()

A run that starts paused is QUIESCED from its first moment (`settle`).

*Paused*: no guest code runs. A vCPU may still be in the middle of an access that a device or a task is to answer; when
the answer comes, registers and memory change. *Quiesced*: nothing is pending; registers and memory stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Literal

import attrs
import trio

__all__ = ["Holding", "Level", "PendingIo"]


class Level(IntEnum):
    """How far one vCPU, or a VM, is held."""

    RUNNING = 0
    PAUSED = 1
    QUIESCED = 2


@attrs.frozen
class PendingIo:
    """An access of a paused VM's guest that was not answered yet: what keeps the VM from being quiesced.

    Attributes:
        vcpu: whose.
        bus: where: "ports" or "mmio".
        address, size, write: as of `Request`.
        waits_for: the name of the device's class that is to answer; "a task": one that has `Vm.requests`.
        since: when it was asked, on the fleet's clock in nanoseconds; of a device: when the VM was told to pause, if
            that was later.
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


class Holding:
    """Of one run of a VM; for the fleet's thread.

    Attributes:
        number: counts pauses, so that what a vCPU says of one is not taken for another.
        paused, quiesced: set while it is that far, or will not be: the pause was taken back, or the run is over.

    Parameters:
        vcpus: how many.
        reached: told of a level when the VM comes to it; of the higher one alone if it comes to both at once.
    """

    def __init__(self, vcpus: int, reached: Callable[[Level], object]) -> None:
        self.number = 0
        self.paused = trio.Event()
        self.quiesced = trio.Event()
        self._reached = reached
        self._levels = [Level.RUNNING] * vcpus
        self._gone: set[int] = set()

    def begin(self) -> None:
        """It is told to pause."""
        self.number += 1
        self._renew()

    def settle(self) -> None:
        """It was told to before any vCPU has run: it is quiesced from its first moment on. Nobody is told of that."""
        self._levels = [Level.QUIESCED] * len(self._levels)
        self.paused.set()
        self.quiesced.set()

    def end(self) -> None:
        """It may run again. Whoever waits for a pause that is taken back goes on."""
        self.paused.set()
        self.quiesced.set()
        self._renew()

    def _renew(self) -> None:
        self._levels = [Level.RUNNING] * len(self._levels)
        self.paused, self.quiesced = trio.Event(), trio.Event()

    def close(self) -> None:
        """The run is over."""
        self.paused.set()
        self.quiesced.set()

    def come(self, index: int, number: int, level: Level) -> None:
        """A vCPU has come to that level of that pause."""
        if number == self.number and level > self._levels[index]:
            self._levels[index] = level
            self._check()

    def gone(self, index: int) -> None:
        """A vCPU has ended."""
        self._gone.add(index)
        self._check()

    def level(self, index: int) -> Level:
        """How far that vCPU is."""
        return self._levels[index]

    def _check(self) -> None:
        alive = [level for index, level in enumerate(self._levels) if index not in self._gone]
        lowest = min(alive, default=Level.QUIESCED)
        fresh = [
            level
            for level, event in ((Level.PAUSED, self.paused), (Level.QUIESCED, self.quiesced))
            if lowest >= level and not event.is_set()
        ]
        for level in fresh:
            (self.paused if level is Level.PAUSED else self.quiesced).set()
        if fresh and alive:
            self._reached(fresh[-1])
