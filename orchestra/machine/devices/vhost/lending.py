"""The queues of one device that a back-end has: lent while the driver has them running, and recalled before a change.

nothing is lent ── the driver has queues running, and nobody holds the device ──▶ lent
                ◀─ a hold, a reset, another set of queues: the back-end stops, and has finished ──
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from ....model.actions import Outcome
from ....model.errors import VhostUserError
from ....native import ffi, lib
from .frontend import FrontEnd, Vring
from .messages import RamRegion

__all__ = ["Lendable", "Lending"]

FINISH: Final = 60.0
"""Seconds in which a back-end that has stopped finishes the requests that it had begun."""

LOOK: Final = 0.001
"""Seconds between two looks whether it has. Nothing tells: a back-end that has stopped notifies nobody."""

USED_INDEX: Final = 2
"""Where the index of a used ring is (virtio 1.2, 2.7.8)."""


@attrs.frozen(eq=False)
class Lendable:
    """A device whose queues are lent.

    Attributes:
        handle: its ``orc_virtio *``.
        owner: keeps the handle alive.
        kicks, calls: eventfds of its queues and of its vectors.
        memory: the descriptor of guest memory.
        read: reads guest memory.
        end: ends the VM. Any thread.
    """

    handle: Any
    owner: object
    kicks: Sequence[int]
    calls: Sequence[int]
    memory: int
    regions: Sequence[RamRegion]
    read: Callable[[int, int], bytes]
    end: Callable[[Outcome], object]


class Lending:
    """For the back-end's thread.

    Attributes:
        lent: the queues, and the vectors that they were lent with.

    Parameters:
        name: of the back-end, for errors.
    """

    def __init__(self, name: str, device: Lendable) -> None:
        self.device, self.lent = device, dict[int, int]()
        self._name = name

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
            places = front_end.stop(list(self.lent))
            self._finish(places)
            self.give_back(places)

    def _finish(self, places: Mapping[int, int]) -> None:
        """Wait until all that was taken from the queues is done. The protocol has the back-end do that before it
        answers, and QEMU 7.2 does not."""
        state = ffi.new("struct orc_virtio_state *")
        lib.orc_virtio_save(self.device.handle, state)
        deadline = time.monotonic() + FINISH
        for queue, place in places.items():
            where = state.queue[queue].device + USED_INDEX
            while int.from_bytes(self.device.read(where, 2), "little") != place:
                if time.monotonic() > deadline:
                    raise VhostUserError(f"{self._name}: its back-end has stopped, and does not finish its requests")
                time.sleep(LOOK)

    def give_back(self, places: Mapping[int, int]) -> None:
        """The queues are back, at these places. Nothing if none is lent."""
        if not self.lent:
            return
        numbers = ffi.new("uint16_t[]", int(lib.ORC_VIRTIO_QUEUES))
        for queue, place in places.items():
            numbers[queue] = place
        lib.orc_virtio_back(self.device.handle, numbers)
        self.lent = {}
