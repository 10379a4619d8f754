"""Calls a device for what is no access of the guest: rings, ends of interrupts, timers that expired.

    within the budget       eventfd readable, timer due → the VM's turn among all (`inbox`) → not while it is paused, no
                            vCPU in the device → called, charged
    over the budget         the eventfd is not watched, no task wakes: called from the `pacer`, and only once all that
                            was served before is paid for

All of it is the fleet's thread's, which is everybody's: so it is paced by what it costs, and never waits for a lock.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from threading import RLock
from typing import Any, Final

import attrs
import trio

from ...model.actions import Failed, Outcome
from ...model.devices import Wiring
from ...model.errors import StateError
from ...native.core import Charged
from ..debt import Debt, Owed
from ..pacer import Pacer
from .peripheral import Peripheral
from .timers import Timers, VmTimer

__all__ = ["RING", "Plugged", "Service", "taken"]

log: Final = logging.getLogger("orchestra")

RING: Final = 20
"""A ring or an expiry counts as this many answers. An answer takes the interpreter for about 6 us (`ANSWER_LIMIT`). To
wake a task on the event loop, to give it its turn and to let it wait again takes 0.1 ms of the loop's CPU time."""

ANSWER: Final = 6_000
"""Nanoseconds. For each such part of a device's work the call counts as one more answer (see above: 6 us)."""

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
        whose: the names of its tenant and of the VM.
        now: the fleet's clock, in nanoseconds.
        end: ends the VM. Any thread.
        buckets: what its devices' work is charged to, in answers.
        in_turn: runs a function in this VM's turn among all that ask (`machine.inbox`).
        pacer: keeps devices to a part of the event loop's time.
        post: runs a function soon on the fleet's thread; from any thread.
        owed: what earlier runs of the VM owe, and the next one will.
    """

    def __init__(
        self,
        whose: tuple[str, str],
        now: Callable[[], int],
        end: Callable[[Outcome], object],
        buckets: Sequence[Charged],
        in_turn: Callable[[Callable[[], object]], object],
        pacer: Pacer,
        post: Callable[..., object],
        owed: Owed,
    ) -> None:
        self.timers = Timers(now, lambda: post(self._wake))
        self.going_on = False  # the devices were made from states, which lack the rings that the kernel had counted
        self._tenant, self._vm = whose
        self._now, self._end = now, end
        self._buckets, self._in_turn, self._pacer, self._owed = buckets, in_turn, pacer, owed
        self._owner: dict[int, Plugged] = {}  # of a timer, by its identity
        self._changed, self._held = trio.Event(), False  # the event is replaced at each change
        self._closed = False

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

    def hold(self) -> None:
        """Let nothing reach a device, until `let_go`."""
        self._held = True

    def let_go(self) -> None:
        """The VM goes on. Timers whose time came meanwhile expire now."""
        self._held = False
        self._wake()

    def close(self) -> None:
        """The guest has ended: call no device any more, also for those who wait to be served."""
        self.timers.close()
        self._closed = True
        self.let_go()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- serving

    async def _listen(self, plugged: Plugged, fd: int, notify: Callable[[int], object]) -> None:
        debt, ring = self._owed.debt(self._buckets), partial(_notify, fd, notify)
        try:
            if self.going_on:  # one ring more than the guest made: a ring before the restore may be lost
                await self._serve(debt, plugged, lambda: (notify(1), True)[1])
            await self._paid(debt, True, lambda: self._try(debt, plugged, ring))
            while True:
                await trio.lowlevel.wait_readable(fd)
                if may := self._may(debt):
                    await self._serve(debt, plugged, ring)
                await self._paid(debt, may, lambda: self._try(debt, plugged, ring))
        finally:
            self._owed.keep(debt)

    async def _watch_timers(self) -> None:
        debt = self._owed.debt(self._buckets)
        try:
            await self._paid(debt, True, lambda: self._expire_next(debt))
            while True:
                changed, at = self._changed, self.timers.next()
                if at is None:
                    await changed.wait()
                    continue
                if (left := at - self._now()) > 0:
                    with trio.move_on_after(left / 1e9):
                        await changed.wait()
                for timer, setting in self.timers.due()[:1]:
                    if may := self._may(debt):
                        await self._serve(debt, self._owner[id(timer)], partial(self._expire, timer, setting))
                    await self._paid(debt, may, lambda: self._expire_next(debt))
        finally:
            self._owed.keep(debt)

    def _expire(self, timer: VmTimer, setting: int) -> bool:
        taken = self.timers.taken(timer, setting)
        if taken:
            timer.expired()
        return taken

    def _expire_next(self, debt: Debt) -> bool | None:
        """As `_try`, with the timer that is due first."""
        due = self.timers.due()
        if not due:
            return False
        timer, setting = due[0]
        return self._try(debt, self._owner[id(timer)], partial(self._expire, timer, setting))

    async def serve(self, plugged: Plugged, call: Callable[[], object]) -> None:
        """Call a device for the host, as `_serve`. The guest did not cause this and is not charged. Once the guest has
        ended, nothing is called."""
        await self._serve(Debt(self._buckets), plugged, lambda: (call(), True)[1])

    async def _serve(self, debt: Debt, plugged: Plugged, call: Callable[[], bool]) -> None:
        """Call a device: in the VM's turn among all others, not while the VM is held, and with no vCPU in the
        device."""
        served = trio.Event()
        self._in_turn(served.set)
        await served.wait()
        while self._try(debt, plugged, call) is None:
            if self._held:
                await self._changed.wait()
            else:  # a vCPU is in the device, perhaps for long: the event loop, which all need, waits for no lock
                await trio.sleep(BUSY)
        self._pacer.spend(debt.unpaid * ANSWER)

    def _may(self, debt: Debt) -> bool:
        """Whether a device may be called at once. Without a limit on answers, always: somebody wants it so."""
        return not debt.limited or self._pacer.may()

    def _try(self, debt: Debt, plugged: Plugged, call: Callable[[], bool]) -> bool | None:
        """Call a device at once, and note what it cost. None: that is not possible now. False: there was nothing to do.
        An exception of the device ends this VM."""
        if self._held or not plugged.lock.acquire(blocking=False):
            return None
        begun = self._pacer.cpu()
        try:  # nothing is awaited here, so a pause or the end finds the call either done or not begun
            if self._closed or not call():
                return False
        except (Exception, SystemExit) as error:  # a device has no say in whether the program ends
            log.error("vm %s: device %s failed", self._vm, plugged.name, exc_info=error)
            self._end(Failed(f"device {plugged.name} failed: {error!r}"))
        finally:
            plugged.lock.release()
        debt.add(RING + (self._pacer.cpu() - begun) // ANSWER)
        return True

    async def _paid(self, debt: Debt, may: bool, again: Callable[[], bool | None]) -> None:
        """Charge what was served. If that has to wait for the budget, or nothing was (not `may`) as devices had their
        part of the event loop's time: serve on from the pacer, by `again`, until there is nothing to do, or what there
        is has to wait for something else."""

        def step(now: int) -> int | None:
            due = debt.due(now)
            return due if due > now else now if again() else None

        now = self._now()
        due = debt.due(now)
        if due > now or not may:
            try:
                await self._pacer.wait(self._tenant, max(due, now + 1), step)
            finally:
                debt.leave()


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
