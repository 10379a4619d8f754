"""The queues of one device that a back-end has: lent while the driver has them running, and recalled before a change.

nothing is lent ── the driver has queues running, and nobody holds the device ──▶ lent
                ◀─ a hold, a reset, another set of queues: the back-end stops, and has finished ──
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import attrs

from ....backend.wiring import takes
from ....model.actions import Outcome
from ....model.errors import VhostUserError
from ....native import ffi, lib
from .frontend import FrontEnd, Vring
from .messages import RamRegion

__all__ = ["Lendable", "Lending"]

FINISH: Final = 60.0
"""Seconds in which a back-end finishes the requests that it had begun."""

LOOK: Final = 0.001
"""Seconds between two looks whether it has. Nothing tells: the back-end notifies the guest, or has stopped and notifies
nobody."""

INDEX: Final = 2
"""Where the index of a ring is, of both rings (virtio 1.2, 2.7.6 and 2.7.8)."""


@attrs.frozen(eq=False)
class Lendable:
    """A device whose queues are lent.

    Attributes:
        handle: its ``orc_virtio *``.
        owner: keeps the handle alive.
        kicks, calls: eventfds of its queues and of its vectors.
        memory: the descriptor of guest memory.
        read: reads guest memory.
        deliver: fires that vector without a wait; False: it can't fire now.
        end: ends the VM. Any thread.
    """

    handle: Any
    owner: object
    kicks: Sequence[int]
    calls: Sequence[int]
    memory: int
    regions: Sequence[RamRegion]
    read: Callable[[int, int], bytes]
    deliver: Callable[[int], bool]
    end: Callable[[Outcome], object]


def fire(handle: Any, deliver: Callable[[int], bool], kicks: Any = ffi.NULL) -> None:
    """Fire the vectors that a device owes its driver. Those that can't fire are pending. Any thread.

    Parameters:
        kicks: a ``uint64_t *`` that gets the queues whose back-end is owed a kick.
    """
    vectors = int(lib.orc_virtio_owed(handle, kicks))
    late = sum(1 << vector for vector in range(vectors.bit_length()) if vectors >> vector & 1 and not deliver(vector))
    if late:
        lib.orc_virtio_owe(handle, late)


class Wait:
    """Waits for what nobody tells, in pieces, and not for ever."""

    def __init__(self, problem: str) -> None:
        self._problem, self._deadline = problem, time.monotonic() + FINISH

    def a_moment(self) -> None:
        if time.monotonic() > self._deadline:
            raise VhostUserError(self._problem)
        time.sleep(LOOK)


class Lending:
    """For the back-end's thread.

    Attributes:
        lent: the queues, and the vectors that they were lent with.
        at: the eventfd that it writes or reads just now; -1: none. The back-end has it as well, and may make it wait.

    Parameters:
        name: of the back-end, for errors.
        drain: the back-end must have nothing in flight when it is told to stop. The protocol has a back-end finish its
            requests then; QEMU 7.2 breaks the device at the end of a request whose queue has stopped.
    """

    def __init__(self, name: str, device: Lendable, *, drain: bool) -> None:
        self.device, self.lent = device, dict[int, int]()
        self.at = -1
        self._name = name
        # Made now: where descriptors are used up later, a pause goes on.
        self._own = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.kicks] if drain else []

    def follow(self, front_end: FrontEnd, *, held: bool) -> None:
        """Lend and recall, as the driver wants it by now.

        Raises:
            VhostUserError: the back-end does not do it.
        """
        wanted = 0 if held else int(lib.orc_virtio_live_queues(self.device.handle))
        if wanted != sum(1 << queue for queue in self.lent):
            self.recall(front_end)
        if wanted and not self.lent:
            self._lend(front_end)
        elif self.lent:
            self._interrupt(front_end)
        self._notify()

    def _notify(self) -> None:
        """Write the notifications that are due."""
        kicks = ffi.new("uint64_t *")
        fire(self.device.handle, self.device.deliver, kicks)
        for queue, kick in enumerate(self.device.kicks):
            if kicks[0] >> queue & 1:
                self._kick(kick)

    def _kick(self, fd: int) -> None:
        self.at = fd
        if takes(fd):  # if not, it is readable for as long as nobody reads it
            os.eventfd_write(fd, 1)
        self.at = -1

    def _lend(self, front_end: FrontEnd) -> None:
        device, state = self.device, ffi.new("struct orc_virtio_state *")
        mask = int(lib.orc_virtio_lend(device.handle, state))
        queues = [queue for queue in range(len(device.kicks)) if mask >> queue & 1]
        if not queues:
            return
        self.lent = {queue: state.queue[queue].vector for queue in queues}
        vrings = {
            queue: Vring(
                size=one.size,
                descriptors=one.descriptors,
                driver=one.driver,
                device=one.device,
                next=one.next,
                kick=device.kicks[queue],
                call=self._call(one.vector),
            )
            for queue in queues
            for one in [state.queue[queue]]
        }
        front_end.start(state.accepted, device.memory, device.regions, vrings, state.status)
        for queue in queues:
            lib.orc_virtio_wake(device.handle, queue)

    def _call(self, vector: int) -> int:
        return self.device.calls[vector] if vector < len(self.device.calls) else -1

    def _interrupt(self, front_end: FrontEnd) -> None:
        """Where the driver wants its interrupts by now."""
        state = ffi.new("struct orc_virtio_state *")
        lib.orc_virtio_save(self.device.handle, state)
        for queue, before in self.lent.items():
            if (vector := state.queue[queue].vector) != before:
                front_end.call(queue, self._call(vector))
                self.lent[queue] = vector

    def recall(self, front_end: FrontEnd) -> None:
        """Have the back-end stop, wait until it has finished, and take the queues back. Nothing if none is lent.

        Raises:
            VhostUserError: the back-end does not do it.
        """
        if self.lent:
            if self._own:
                self._drain(front_end)
            places = front_end.stop(list(self.lent))
            self._finish(places)
            self.give_back(places)

    def _drain(self, front_end: FrontEnd) -> None:
        """Wait until nothing is in flight, and nothing is taken any more.

        The back-end takes requests when it is kicked, and now we alone kick it, until all that is available is used. It
        may still be at our last kick then: so the kick is taken back, and the queues are looked at once more. A guest
        that goes on meanwhile (a pause takes its time) rings its own eventfd, which is served later.
        """
        kicks = {queue: self._own[queue] for queue in self.lent}
        for queue, kick in kicks.items():
            self._clear(kick)
            front_end.kick(queue, kick)
        wait = Wait(f"{self._name}: its back-end does not finish its requests")
        while busy := self._busy():
            for queue in busy:
                self._kick(kicks[queue])
            wait.a_moment()
            if not self._busy():
                for kick in kicks.values():
                    self._clear(kick)
                front_end.settle()

    def _clear(self, kick: int) -> None:
        self.at = kick
        with suppress(BlockingIOError):
            os.eventfd_read(kick)
        self.at = -1

    def close(self) -> None:
        """Give its descriptors back, once its thread has ended. A second call does nothing."""
        own, self._own = self._own, []
        for kick in own:
            os.close(kick)

    def _busy(self) -> list[int]:
        """The queues with requests that are available and not used."""
        state = ffi.new("struct orc_virtio_state *")
        lib.orc_virtio_save(self.device.handle, state)
        return [q for q in self.lent if self._index(state.queue[q].device) != self._index(state.queue[q].driver)]

    def _index(self, ring: int) -> int:
        return int.from_bytes(self.device.read(ring + INDEX, 2), "little")

    def _finish(self, places: Mapping[int, int]) -> None:
        """Wait until all that was taken from the queues is done, which it is already by the protocol."""
        state = ffi.new("struct orc_virtio_state *")
        lib.orc_virtio_save(self.device.handle, state)
        wait = Wait(f"{self._name}: its back-end has stopped, and does not finish its requests")
        for queue, place in places.items():
            while self._index(state.queue[queue].device) != place:
                wait.a_moment()

    def give_back(self, places: Mapping[int, int]) -> None:
        """The queues are back, at these places. Nothing if none is lent."""
        if not self.lent:
            return
        numbers = ffi.new("uint16_t[]", int(lib.ORC_VIRTIO_QUEUES))
        for queue, place in places.items():
            numbers[queue] = place
        lib.orc_virtio_back(self.device.handle, numbers)
        self.lent = {}
