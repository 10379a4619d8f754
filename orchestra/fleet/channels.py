"""Exits told to subscribers: from the core's ring through one drain task into bounded channels."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any, Final, Literal

import attrs
import trio

from ..model.errors import SpecError
from ..model.exits import Exit
from ..native.channels import EVERY_VM, NO_VM, Channel, ExitBatch
from ..native.core import FleetCore, VcpuCore
from ..native.records import told_mask

__all__ = ["Dispatcher", "Exits", "ExitsStatistics"]

AHEAD: Final = 64
"""Exits that are made at once for whoever takes them one by one: a checkpoint and a copy from the channel for so many.
More objects than that at a time would give Python's garbage collector work that takes longer than a ring lasts."""

MOST_IN_BATCH: Final = 1_000_000
RETIRED: Final = 10_000
"""VMs that have left, whose names are kept for exits that wait. Someone who never receives must not make a fleet that
launches and stops for years grow: then what waits is missed."""
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
    """A bounded channel of exits: ``async for exit in exits``, or ``async for batch in exits.batches()`` for several at
    once as columns, which costs a fraction of it. One task at a time.

    When it is full, exits are dropped and counted in `missed`; statistics and budgets count them all the same. The next
    64 exits to iterate over are made at once: they still count as `waiting`, and are not dropped any more.
    Iterating is a checkpoint whenever it has to wait, and every 64th time when it has not: at 400,000 exits a second a
    checkpoint each would cost more than everything else.
    """

    def __init__(
        self,
        kinds: tuple[type[Exit], ...],
        vm: str | None,
        channel: Channel,
        names: Mapping[int, str],
        leave: Callable[[Exits], None],
    ) -> None:
        self.kinds = kinds
        self.vm = vm
        self.mask = told_mask(kinds)
        self.channel = channel
        self._names = names
        self._ahead: list[Exit] = []  # made already, the next one last
        self._batch = ExitBatch(b"", {})  # what they were made of; its names outlive the fleet's
        self._task: Any = None
        self._ended = self._closed = False
        self._leave = leave

    @property
    def missed(self) -> int:
        return self.channel.missed

    def wake(self) -> None:
        if self._task is not None and (self.channel.waiting or self._ended):
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    def end(self) -> None:
        """Nothing more will come: its VM ended, or the fleet did."""
        self._ended = True
        self.wake()

    def _more(self) -> bool:
        """None is made: make the next ones. False: none waits."""
        if not self.channel.waiting:
            return False
        self._batch = ExitBatch(self.channel.take(AHEAD), self._names)
        self._ahead = [*self._batch]
        self._ahead.reverse()
        return True

    async def _wait(self) -> None:
        """Until some wait, if none do.

        Raises:
            trio.EndOfChannel: none will.
            trio.BusyResourceError: another task waits for them.
        """
        while not self.channel.waiting:
            if self._closed or self._ended:
                raise self._nothing()
            if self._task is not None:
                raise trio.BusyResourceError("another task is receiving from these exits")
            self._task = trio.lowlevel.current_task()

            def abort(_: Any) -> trio.lowlevel.Abort:
                self._task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)

    async def receive(self) -> Exit:
        """The next exit.

        Raises:
            trio.EndOfChannel: its VM or the fleet has ended and everything was received.
            trio.BusyResourceError: another task is receiving.
        """
        if self._ahead or self.channel.waiting:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._ahead and not self._more():  # again, if another task took what came
            await self._wait()
        return self._ahead.pop()

    def receive_nowait(self) -> Exit:
        """The next exit, if one waits.

        Raises:
            trio.WouldBlock: none does.
            trio.EndOfChannel: its VM or the fleet has ended and everything was received.
        """
        if self._ahead or self._more():
            return self._ahead.pop()
        raise self._nothing()

    def _nothing(self) -> Exception:
        """Why none waits."""
        if self._closed:
            return trio.ClosedResourceError("these exits were closed")
        return trio.EndOfChannel() if self._ended else trio.WouldBlock()

    async def __anext__(self) -> Exit:
        # As receive(), and no more than this for most of 400,000 exits a second.
        if self._ahead:
            return self._ahead.pop()
        try:
            return await self.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise StopAsyncIteration from None

    async def batches(self, most: int = 4096) -> AsyncGenerator[ExitBatch, None]:
        """All exits from here on, several at once: as columns, and no object for each.

        Ends as the channel does. Each iteration is a checkpoint; cancelling it loses no exit.

        Parameters:
            most: exits in a batch, from 1 to 1,000,000. It has as many as wait, and does not wait for more than one.

        Raises:
            SpecError: no such number.
            trio.BusyResourceError: another task is receiving.
        """
        check_batch(most)
        while True:
            try:
                batch = await self.next_batch(most)
            except (trio.EndOfChannel, trio.ClosedResourceError):
                return
            yield batch

    async def next_batch(self, most: int) -> ExitBatch:
        """As `receive`, of several."""
        if self._ahead or self.channel.waiting:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._ahead and not self.channel.waiting:
            await self._wait()
        return self.next_batch_nowait(most)

    def next_batch_nowait(self, most: int) -> ExitBatch:
        """As `receive_nowait`, of several."""
        if self._ahead:
            batch = self._batch[-len(self._ahead) :][:most]
            del self._ahead[-len(batch) :]
            return batch
        if self.channel.waiting:
            return ExitBatch(self.channel.take(most), self._names)
        raise self._nothing()

    def statistics(self) -> ExitsStatistics:
        channel = self.channel
        return ExitsStatistics(channel.received, channel.missed, channel.waiting + len(self._ahead))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._names = dict(self._names)  # what waits can still be taken, and from now on nobody asks if some does
            self.end()
            self._leave(self)

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


def check_batch(most: object) -> None:
    """Raise SpecError unless it is a number of exits that a batch can have."""
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST_IN_BATCH:
        raise SpecError(f"most={most!r}: must be from 1 to {MOST_IN_BATCH:,} exits")


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
        self._core = core
        self._subscribers: list[Exits] = []
        self._names: dict[int, str] = {}  # of VMs by number, for records that may still wait
        self._numbers: dict[str, int] = {}  # of those that are here
        self._left: deque[int] = deque()
        self._missed = 0  # by channels that are closed
        self._closed = False
        self._tell: Callable[[], None] = lambda: None
        self._talked: Callable[[int], None] = lambda id: None

    def register(self, core: VcpuCore, vm: str, number: int, vcpu: int) -> None:
        """Before it runs: whose exits this core tells. `number`: of the VM, and of no other before or after it."""
        core.set_name(number, vcpu)
        if self._numbers.get(vm) != number:
            self._names[number] = vm
            self._numbers[vm] = number
            for subscriber in self._subscribers:
                if subscriber.vm == vm:
                    subscriber.channel.follow(number)

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
        kinds = kinds or (Exit,)
        number = EVERY_VM if vm is None else self._numbers.get(vm, NO_VM)
        channel = Channel(self._core, told_mask(kinds), number, capacity, drop_oldest=drop == "oldest")
        exits = Exits(kinds, vm, channel, self._names, self._leave)
        if self._closed:
            channel.end()
            exits.end()
            return exits
        self._subscribers.append(exits)
        try:
            self._tell()
        except BaseException:
            self._subscribers.remove(exits)
            channel.end()
            raise
        return exits

    def _leave(self, exits: Exits) -> None:
        if exits in self._subscribers:
            self._subscribers.remove(exits)
            exits.channel.end()
            self._missed += exits.missed
            self._tell()

    def deliver(self, core: VcpuCore | None = None, *, most: int = FleetCore.BATCH) -> int:
        """Deliver one batch, of all or of one; how many exits it had."""
        taken = self._core.deliver(core, most=most)
        if taken:
            for subscriber in self._subscribers:
                subscriber.wake()
        return taken

    def hear(self) -> int:
        """Wake those who wait for output of a console; how many vCPUs had some."""
        ids = self._core.talking()
        for id in ids:
            self._talked(id)
        return len(ids)

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
        for core in cores:
            while self.deliver(core):
                pass

    def vm_left(self, vm: str, number: int) -> None:
        """None of its cores is there any more, and none comes: its name is needed until its exits were received."""
        if number not in self._names:
            return  # it came no further than that
        if self._numbers.get(vm) == number:
            del self._numbers[vm]
        self._left.append(number)
        waiting = [subscriber for subscriber in self._subscribers if subscriber.channel.waiting]
        if waiting and len(self._left) <= RETIRED:
            return
        for subscriber in waiting:
            subscriber.channel.drop()
        for gone in self._left:
            del self._names[gone]
        self._left.clear()

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
            subscriber.channel.end()
            subscriber.end()
