"""Calls a device for what is no access of the guest: rings, ends of interrupts, timers that expired.

    eventfd readable, timer due → the VM's turn among all → not while it is paused, no vCPU in the device → the device
                                                                       what it cost is paid for before the next one

All of it is the fleet's thread's, which is everybody's: so it is paced by what it costs, and never waits for a lock.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from threading import RLock
from typing import Any, Final

import attrs
import trio

from ...model.actions import Failed, Outcome
from ...model.devices import Wiring
from ...model.errors import StateError
from ...model.spec import Limit
from ...native.core import Bucket
from .peripheral import Peripheral
from .timers import Timers, VmTimer

__all__ = ["RING", "Plugged", "Service", "taken"]

log: Final = logging.getLogger("orchestra")

RING: Final = 20
"""A ring or an expiry counts as this many answers. An answer takes the interpreter for about 6 us (`ANSWER_LIMIT`). To
wake a task on the event loop, to give it its turn and to let it wait again takes 0.1 ms of the loop's CPU time."""

ANSWER: Final = 6_000
"""Nanoseconds. For each such part of a device's work the call counts as one more answer (see above: 6 us)."""

GRID: Final = 5_000_000
"""Nanoseconds. Devices that have to wait for their budget are served at multiples of this, so that the event loop wakes
once for all of them, and not once for each."""

LOOK: Final = 0.05
"""Seconds between two looks of those who wait at the limit in force. By default a wait is shorter: then it costs no
look."""

BUSY: Final = 0.0005
"""Seconds until the next try, if a vCPU is in the device. An access takes Python some microseconds, which is less."""


@attrs.define(eq=False)
class Plugged:
    """A device with its wiring.

    Attributes:
        lock: held by the caller while the device is called.
        bells: the eventfds of its doorbells.
        ends: the one that tells when the guest ends its interrupt, if its line is resampled.
    """

    name: str
    device: Peripheral[Any, Any]
    lock: RLock
    wiring: Wiring
    bells: list[int] = attrs.Factory(list)
    ends: int | None = None

    def acknowledge(self, times: int) -> None:
        self.device.acknowledged()

    @property
    def listened(self) -> bool:
        """Whether the kernel has descriptors for this device: doorbells, or the end of a resampled interrupt."""
        return bool(self.bells) or self.ends is not None


class Service:
    """Serves the devices of one VM.

    Parameters:
        vm: its name, for the log.
        now: the fleet's clock, in nanoseconds.
        end: ends the VM. Any thread.
        limit: says what its devices' work may cost by now, in answers; None: anything.
        in_turn: runs a function in this VM's turn among all that ask (`machine.inbox`).
        post: runs a function soon on the fleet's thread; from any thread.
    """

    def __init__(
        self,
        vm: str,
        now: Callable[[], int],
        end: Callable[[Outcome], object],
        limit: Callable[[], Limit | None],
        in_turn: Callable[[Callable[[], object]], object],
        post: Callable[..., object],
    ) -> None:
        self.timers = Timers(now, lambda: post(self._wake))
        self.going_on = False  # the devices were made from states, which lack the rings that the kernel had counted
        self._vm, self._now, self._end, self._limit, self._in_turn = vm, now, end, limit, in_turn
        self._owner: dict[int, Plugged] = {}  # of a timer, by its identity
        self._changed, self._held = trio.Event(), False  # the event is replaced at each change
        self._bucket: Bucket | None = None
        self._worth = 0  # answers that were served and are not charged yet

    @property
    def has_timers(self) -> bool:
        return bool(self._owner)

    def new_timer(self, plugged: Plugged | None, expired: Callable[[], None]) -> VmTimer:
        """Make a timer for the device that is being made."""
        if plugged is None:
            raise StateError("a device makes its timers in __init__")
        timer = self.timers.new(expired)
        self._owner[id(timer)] = plugged  # `Timers` keeps the timer, so no other object gets its id
        return timer

    async def run(self, devices: Iterable[Plugged], ended: trio.Event) -> None:
        """Serve the devices until the guest has ended."""
        self._bucket = Bucket()
        self._bucket.set(self._limit(), self._now())
        try:
            async with trio.open_nursery() as nursery:
                for plugged in devices:
                    for number, fd in enumerate(plugged.bells):
                        nursery.start_soon(self._listen, plugged, fd, partial(plugged.device.rang, number))
                    if plugged.ends is not None:
                        nursery.start_soon(self._listen, plugged, plugged.ends, plugged.acknowledge)
                if self._owner:
                    nursery.start_soon(self._watch_timers)
                await ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._bucket.close()

    def hold(self) -> None:
        """Let nothing reach a device, until `let_go`."""
        self._held = True

    def let_go(self) -> None:
        """The VM goes on. Timers whose time came meanwhile expire now."""
        self._held = False
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- serving

    async def _listen(self, plugged: Plugged, fd: int, notify: Callable[[int], object]) -> None:
        if self.going_on:  # one ring more than the guest made: a ring before the restore may be lost
            await self._serve(plugged, partial(notify, 1))
        while True:
            await trio.lowlevel.wait_readable(fd)
            # After a wait for the budget, read the descriptor again at once: that saves a turn of the event loop.
            while await self._serve(plugged, partial(_notify, fd, notify)) and await self._waited():
                pass

    async def _watch_timers(self) -> None:
        while True:
            changed, at = self._changed, self.timers.next()
            if at is None:
                await changed.wait()
                continue
            if (left := at - self._now()) > 0:
                with trio.move_on_after(left / 1e9):
                    await changed.wait()
            for timer, setting in self.timers.due():
                await self._serve(self._owner[id(timer)], partial(self._expire, timer, setting))
                await self._waited()

    def _expire(self, timer: VmTimer, setting: int) -> None:
        if self.timers.taken(timer, setting):
            timer.expired()

    async def _serve(self, plugged: Plugged, call: Callable[[], object]) -> object:
        """Call a device: in the VM's turn among all others, not while the VM is held, and with no vCPU in the device.
        An exception of the device ends this VM."""
        served = trio.Event()
        self._in_turn(served.set)
        await served.wait()
        while self._held or not plugged.lock.acquire(blocking=False):
            if self._held:
                await self._changed.wait()
            else:  # a vCPU is in the device, perhaps for long: the event loop, which all need, waits for no lock
                await trio.sleep(BUSY)
        begun = time.thread_time_ns()
        try:  # nothing is awaited here, so a pause finds the call either done or not begun
            return call()
        except (Exception, SystemExit) as error:  # a device has no say in whether the program ends
            log.error("vm %s: device %s failed", self._vm, plugged.name, exc_info=error)
            self._end(Failed(f"device {plugged.name} failed: {error!r}"))
            return None
        finally:
            plugged.lock.release()
            self._worth += RING + (time.thread_time_ns() - begun) // ANSWER

    async def _waited(self) -> bool:
        """Charge what was served, and wait for the budget. False: there was nothing to wait for."""
        assert self._bucket is not None
        worth, self._worth = self._worth, 0
        if not worth:
            return False
        now = self._now()
        self._bucket.set(self._limit(), now)
        ticket = self._bucket.charge(now, worth)
        if ticket is None:
            return False
        try:
            while (turn := self._bucket.turn(ticket)) > now:
                turn += -turn % GRID
                await trio.sleep(min((turn - now) / 1e9, LOOK))
                now = self._now()
                self._bucket.set(self._limit(), now)  # a change counts for waits in progress too
        finally:
            self._bucket.leave(ticket)
        return True


def _notify(fd: int, notify: Callable[[int], object]) -> bool:
    times = taken(fd)
    if times:
        notify(times)
    return times > 0


def taken(fd: int) -> int:
    """How often the descriptor was rung since the last call; resets the count."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
