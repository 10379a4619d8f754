"""Exits told to subscribers: from the core's ring through one drain task into bounded channels."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import attrs
import trio

from ..model.errors import SpecError
from ..model.exits import Exit
from ..native.core import FleetCore, VcpuCore
from ..native.records import RECORD_SIZE, RecordReader, told_mask, wants

__all__ = ["Dispatcher", "Exits", "ExitsStatistics"]

ITEMS_PER_CHECKPOINT: Final = 64
RETIRED: Final = 10_000
PACE: Final = 0.001
"""Seconds between two batches while exits keep coming. The first after a rest is delivered at once; in a storm, taking
a few at a time would cost several times as much, and none is later than this unless the event loop is."""

LATE: Final = 2 * PACE
"""Seconds. Whoever comes later to its turn on the event loop finds it crowded."""

SLOWEST: Final = 0.016
"""Seconds between two batches on a crowded loop."""

FEWEST: Final = 64
"""Exits in a batch on a crowded loop: 4,000 a second at the slowest, one or two per cent of a core."""


@attrs.frozen
class ExitsStatistics:
    """`received`: came to the channel; `missed`: of these, dropped since it was full; `waiting`: in it now."""

    received: int
    missed: int
    waiting: int


class Exits(trio.abc.ReceiveChannel[Exit]):
    """A bounded channel of exits: ``async for exit in exits``. One task at a time.

    When it is full, exits are dropped and counted in `missed`; statistics and budgets count them all the same.
    Iterating is a checkpoint whenever it has to wait, and every 64th time when it has not: at 300,000 exits a second a
    checkpoint each would cost more than everything else.
    """

    def __init__(
        self,
        kinds: tuple[type[Exit], ...],
        vm: str | None,
        capacity: int,
        drop: str,
        reader: RecordReader,
        leave: Callable[[Exits], None],
    ) -> None:
        self.kinds = kinds
        self.vm = vm
        self.missed = 0
        self.mask = told_mask(kinds)
        self._decode = reader.decode
        self._drop_oldest = drop == "oldest"
        self._queue: deque[bytes] = deque(maxlen=capacity)
        self._received = 0
        self._taken = 0
        self._task: Any = None
        self._ended = self._closed = False
        self._leave = leave

    def put(self, record: bytes) -> None:
        queue = self._queue
        self._received += 1
        if len(queue) == queue.maxlen:
            self.missed += 1
            if not self._drop_oldest:
                return
        queue.append(record)

    @property
    def backlog(self) -> int:
        return len(self._queue)

    def wake(self) -> None:
        if self._task is not None and (self._queue or self._ended):
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    def end(self) -> None:
        """Nothing more will come: its VM ended, or the fleet did."""
        self._ended = True
        self.wake()

    async def receive(self) -> Exit:
        """The next exit.

        Raises:
            trio.EndOfChannel: its VM or the fleet has ended and everything was received.
            trio.BusyResourceError: another task is receiving.
        """
        queue = self._queue
        self._taken += 1
        if queue:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            while queue:
                exit = self._decode(queue.popleft())
                if exit is not None:
                    return exit
                self.missed += 1  # it waited for so long that nobody knows any more whose it was
            if self._closed:
                raise trio.ClosedResourceError("these exits were closed")
            if self._ended:
                raise trio.EndOfChannel
            if self._task is not None:
                raise trio.BusyResourceError("another task is receiving from these exits")
            self._task = trio.lowlevel.current_task()

            def abort(_: Any) -> trio.lowlevel.Abort:
                self._task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)

    def receive_nowait(self) -> Exit:
        """The next exit, if one waits.

        Raises:
            trio.WouldBlock: none does.
            trio.EndOfChannel: its VM or the fleet has ended and everything was received.
        """
        self._taken += 1
        while self._queue:
            exit = self._decode(self._queue.popleft())
            if exit is not None:
                return exit
            self.missed += 1
        if self._closed:
            raise trio.ClosedResourceError("these exits were closed")
        raise trio.EndOfChannel if self._ended else trio.WouldBlock

    async def __anext__(self) -> Exit:
        # As receive(), without a second coroutine for each of 300,000 exits a second.
        queue = self._queue
        if queue and (self._taken + 1) % ITEMS_PER_CHECKPOINT:
            self._taken += 1
            exit = self._decode(queue.popleft())
            if exit is not None:
                return exit
            self.missed += 1
        try:
            return await self.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise StopAsyncIteration from None

    def statistics(self) -> ExitsStatistics:
        return ExitsStatistics(self._received, self.missed, len(self._queue))

    def close(self) -> None:
        self._closed = True
        self.end()
        self._leave(self)

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


def next_pace(pace: float, late: float) -> float:
    """Seconds between the next two batches, after a wait that ended `late`: the loop is left to the others at once, and
    taken back little by little, as it is in time because it was left."""
    return min(SLOWEST, 2 * pace) if late > LATE else max(PACE, 0.9 * pace)


class Dispatcher:
    """Which exits are wanted by whom; drains the ring and delivers.

    How many exits there are to tell is the guests' doing, and what they cost is paid by the event loop, which everybody
    needs. So in a storm it is the telling that makes way: while the loop is late there are fewer and smaller batches,
    `FEWEST` each `SLOWEST` seconds at worst. What does not fit into the rings meanwhile is missed, and counted.
    """

    def __init__(self, core: FleetCore, paced: bool) -> None:
        self._paced = paced  # not where time is scripted
        self.reader = RecordReader()
        self._core = core
        self._subscribers: list[Exits] = []
        self._listeners: dict[str, list[Exits]] = {}  # of these, by VM; made as they are needed
        self._missed = 0  # by channels that are closed
        self._retired: list[int] = []  # ids whose records may still wait in a channel
        self._closed = False
        self._tell: Callable[[], None] = lambda: None
        self._talked: Callable[[int], None] = lambda id: None

    def on_talk(self, talked: Callable[[int], None]) -> None:
        """`talked` is called with the id of a vCPU whose console has output that somebody waits for."""
        self._talked = talked

    def on_change(self, tell: Callable[[], None]) -> None:
        """`tell` is called when the masks of `told` changed."""
        self._tell = tell

    def told(self, vm: str) -> int:
        """Which reasons a VM's vCPUs are to put into their rings."""
        mask = 0
        for subscriber in self._subscribers:
            if subscriber.vm is None or subscriber.vm == vm:
                mask |= subscriber.mask
        return mask

    def subscribe(
        self, kinds: tuple[type[Exit], ...], vm: str | None, capacity: int, drop: Literal["oldest", "newest"]
    ) -> Exits:
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, Exit)):
                raise SpecError(f"kinds={kind!r}: must be exit types, such as orchestra.BusLock or orchestra.Io")
        if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity <= 10_000_000:
            raise SpecError(f"capacity={capacity!r}: must be from 1 to 10,000,000 exits")
        if drop not in ("oldest", "newest"):
            raise SpecError(f'drop={drop!r}: must be "oldest" or "newest"')
        exits = Exits(kinds or (Exit,), vm, capacity, drop, self.reader, self._leave)
        if self._closed:
            exits.end()
            return exits
        self._subscribers.append(exits)
        self._listeners.clear()
        try:
            self._tell()
        except BaseException:
            self._subscribers.remove(exits)
            self._listeners.clear()
            raise
        return exits

    def _leave(self, exits: Exits) -> None:
        if exits in self._subscribers:
            self._subscribers.remove(exits)
            self._listeners.clear()
            self._missed += exits.missed
            self._tell()

    def deliver(self, core: VcpuCore | None = None, *, most: int = FleetCore.BATCH) -> int:
        """Deliver one batch, of all or of one; how many exits it had."""
        batch = self._core.drain(core, most=most)
        if not batch:
            return 0
        listeners = self._listeners
        for record, vm, reason, flags in self.reader.split(batch):
            for subscriber in listeners[vm] if vm in listeners else self._listen(vm):
                if wants(subscriber.mask, reason, flags):
                    subscriber.put(record)
        for subscriber in self._subscribers:
            subscriber.wake()
        return len(batch) // RECORD_SIZE

    def hear(self) -> int:
        """Wake those who wait for output of a console; how many vCPUs had some."""
        ids = self._core.talking()
        for id in ids:
            self._talked(id)
        return len(ids)

    def _listen(self, vm: str) -> list[Exits]:
        self._listeners[vm] = [one for one in self._subscribers if one.vm is None or one.vm == vm]
        return self._listeners[vm]

    async def run(self) -> None:
        """The drain task: sleeps on the eventfd, costs nothing while nobody subscribed or nothing happens."""
        last, pace = -PACE, PACE
        while True:
            # A slow pace is one of small batches as well: half as often and half as many each time it slows down.
            heard, taken = self.hear(), self.deliver(most=max(FEWEST, int(FleetCore.BATCH * PACE / pace)))
            if heard or taken:
                begun, last = last, trio.current_time()
                wait = 0.0
                if self._paced and (pace > PACE or (last - begun < PACE and taken < FleetCore.BATCH)):
                    wait = pace
                await trio.sleep(wait)
                if self._paced:
                    pace = next_pace(pace, trio.current_time() - last - wait)
            elif self._core.may_sleep():
                await trio.lowlevel.wait_readable(self._core.eventfd)
                pace = PACE
            else:
                await trio.lowlevel.checkpoint()

    def retire(self, cores: Iterable[VcpuCore]) -> None:
        """Deliver what is left of these cores, which run no more, before they go. Others have to wait: they may never
        pause."""
        cores = list(cores)
        for core in cores:
            while self.deliver(core):
                pass
        self._retired += [core.id for core in cores]
        # Their names are needed until the last of their records was received. Someone who never receives must not make
        # a fleet that launches and stops for years grow: then the oldest go, with what waits of them.
        if not any(subscriber.backlog for subscriber in self._subscribers):
            done, self._retired = self._retired, []
        else:
            done, self._retired = self._retired[:-RETIRED], self._retired[-RETIRED:]
        for id in done:
            self.reader.remove(id)

    def vm_ended(self, vm: str) -> None:
        for subscriber in self._subscribers:
            if subscriber.vm == vm:
                subscriber.end()

    def missed(self) -> int:
        """Exits that channels dropped."""
        return self._missed + sum(subscriber.missed for subscriber in self._subscribers)

    def close(self) -> None:
        """No VM is left: every channel ends, those that are opened from now on included."""
        self._closed = True
        for subscriber in self._subscribers:
            subscriber.end()
