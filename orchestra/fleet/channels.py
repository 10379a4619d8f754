"""Delivers exits to subscribers: from the core's rings through one drain task into bounded channels."""

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
from ..native.records import event_mask

__all__ = ["Dispatcher", "Exits", "ExitsStatistics"]

AHEAD: Final = 64
"""Exit objects that are made at once for a task that takes exits one by one: one checkpoint and one copy from the
channel for 64 exits. With more objects at a time, Python's garbage collector would work for longer than a ring
lasts."""

MOST_IN_BATCH: Final = 1_000_000
RETIRED: Final = 10_000
"""VMs that have left, whose names are kept for exits that wait. Beyond this number the waiting exits are dropped and
counted as missed: otherwise a subscriber that never receives would make a fleet grow that launches and stops for
years."""
PACE: Final = 0.001
"""Seconds between two batches while exits keep coming. The first exit after a rest is delivered at once. In a storm,
batches of a few exits would cost several times as much. No exit is later than this unless the event loop is late."""

LATE: Final = 2 * PACE
"""Seconds. If the drain task gets its turn on the event loop later than this, the loop is crowded."""

SLOWEST: Final = 0.016
"""The most seconds between two batches on a crowded loop."""

FEWEST: Final = 64
"""The fewest exits of a batch on a crowded loop. With `SLOWEST` that is 4,000 exits a second, one or two per cent of a
core."""


@attrs.frozen
class ExitsStatistics:
    """`received`: exits that came to the channel. `missed`: those of them that were dropped because it was full.
    `waiting`: those that wait to be received now."""

    received: int
    missed: int
    waiting: int


class Exits(trio.abc.ReceiveChannel[Exit]):
    """A bounded channel of exits: ``async for exit in exits``, or ``async for batch in exits.batches()`` for several at
    once as columns, which costs a fraction of the time. One task at a time.

    When the channel is full, exits are dropped and counted in `missed`; statistics and budgets still count them. The
    next 64 exits to iterate over are made at once: these still count as `waiting`, and are not dropped any more.
    Iterating is a checkpoint whenever it has to wait, and at every 64th exit otherwise: at 400,000 exits a second, a
    checkpoint for each exit would cost more than everything else.
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
        self.mask = event_mask(kinds)
        self.channel = channel
        self._names = names
        self._ahead: list[Exit] = []  # made already, in reverse order: `pop` takes the next
        self._batch = ExitBatch(b"", {})  # what `_ahead` was made of; its names outlive the fleet's
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
        """No exit will come any more: the VM of this channel, or the fleet, has ended."""
        self._ended = True
        self.wake()

    def _more(self) -> bool:
        """Make the next exits. False: no exit waits."""
        if not self.channel.waiting:
            return False
        self._batch = ExitBatch(self.channel.take(AHEAD), self._names)
        self._ahead = [*self._batch]
        self._ahead.reverse()
        return True

    async def _wait(self) -> None:
        """Wait until at least one exit waits to be received.

        Raises:
            trio.EndOfChannel: no exit will come.
            trio.ClosedResourceError: the channel was closed.
            trio.BusyResourceError: another task is receiving.
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
        """The next exit. A checkpoint; cancelling loses no exit.

        Raises:
            trio.EndOfChannel: the VM or the fleet has ended and everything was received.
            trio.ClosedResourceError: the channel was closed.
            trio.BusyResourceError: another task is receiving.
        """
        if self._ahead or self.channel.waiting:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        while not self._ahead and not self._more():  # a loop, as another task may take what came
            await self._wait()
        return self._ahead.pop()

    def receive_nowait(self) -> Exit:
        """The next exit, if one waits.

        Raises:
            trio.WouldBlock: no exit waits.
            trio.EndOfChannel: the VM or the fleet has ended and everything was received.
            trio.ClosedResourceError: the channel was closed.
        """
        if self._ahead or self._more():
            return self._ahead.pop()
        raise self._nothing()

    def _nothing(self) -> Exception:
        """The exception that says why no exit waits."""
        if self._closed:
            return trio.ClosedResourceError("these exits were closed")
        return trio.EndOfChannel() if self._ended else trio.WouldBlock()

    async def __anext__(self) -> Exit:
        # As `receive`. Most of 400,000 exits a second take this short way, without a checkpoint.
        if self._ahead:
            return self._ahead.pop()
        try:
            return await self.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise StopAsyncIteration from None

    async def batches(self, most: int = 4096) -> AsyncGenerator[ExitBatch, None]:
        """All exits from here on, several at once, as columns and without an object for each.

        Ends when the channel ends. Each iteration is a checkpoint; cancelling it loses no exit.

        Parameters:
            most: the most exits in a batch, from 1 to 1,000,000. A batch has the exits that wait; it waits for the
                first only.

        Raises:
            SpecError: `most` is out of range.
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
            # A copy: waiting exits can still be taken, and the dispatcher may forget names from now on.
            self._names = dict(self._names)
            self.end()
            self._leave(self)

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


def check_batch(most: object) -> None:
    """Raises:
    SpecError: not a number of exits that a batch can have.
    """
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST_IN_BATCH:
        raise SpecError(f"most={most!r}: must be from 1 to {MOST_IN_BATCH:,} exits")


def next_pace(pace: float, late: float) -> float:
    """Seconds between the next two batches. `late`: seconds by which the last wait ended too late.

    The pace doubles at once on a crowded loop, so that others get the loop. It recovers by a tenth each time, as the
    loop may be in time only because the pace is slow.
    """
    return min(SLOWEST, 2 * pace) if late > LATE else max(PACE, 0.9 * pace)


class Dispatcher:
    """Knows which subscriber wants which exits; drains the rings and delivers.

    Guests decide how many exits there are, and the event loop, which everybody needs, pays for the delivery. So in a
    storm the delivery gives way: while the loop is late, batches are fewer and smaller, at worst `FEWEST` exits each
    `SLOWEST` seconds. Exits that do not fit into the rings meanwhile are counted as missed.
    """

    def __init__(self, core: FleetCore, paced: bool) -> None:
        self._paced = paced  # False in virtual time, in which a loop is never late
        self._core = core
        self._subscribers: list[Exits] = []
        self._names: dict[int, str] = {}  # VM names by number, also of VMs that left, for records that may still wait
        self._numbers: dict[str, int] = {}  # numbers of the VMs that are here
        self._left: deque[int] = deque()
        self._missed = 0  # exits that closed channels have dropped
        self._closed = False
        self._notify: Callable[[], None] = lambda: None
        self._talked: Callable[[int], None] = lambda id: None

    def register(self, core: VcpuCore, vm: str, number: int, vcpu: int) -> None:
        """Note whose exits this core reports, before it runs. `number`: the VM's, and no other VM's before or after
        it."""
        core.set_name(number, vcpu)
        if self._numbers.get(vm) != number:
            self._names[number] = vm
            self._numbers[vm] = number
            for subscriber in self._subscribers:
                if subscriber.vm == vm:
                    subscriber.channel.follow(number)

    def on_talk(self, talked: Callable[[int], None]) -> None:
        """Call `talked` with the id of a vCPU whose console has output that a task waits for."""
        self._talked = talked

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` when the masks of `event_mask` have changed."""
        self._notify = notify

    def event_mask(self, vm: str) -> int:
        """The mask of the exit reasons that a VM's vCPUs have to put into their rings."""
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
        if not isinstance(vm, str | None):
            raise SpecError(f"vm={vm!r}: must be a Vm, a VM's name, or None for all")
        if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity <= 10_000_000:
            raise SpecError(f"capacity={capacity!r}: must be from 1 to 10,000,000 exits")
        if drop not in ("oldest", "newest"):
            raise SpecError(f'drop={drop!r}: must be "oldest" or "newest"')
        kinds = kinds or (Exit,)
        number = EVERY_VM if vm is None else self._numbers.get(vm, NO_VM)
        channel = Channel(self._core, event_mask(kinds), number, capacity, drop_oldest=drop == "oldest")
        exits = Exits(kinds, vm, channel, self._names, self._leave)
        if self._closed:
            channel.end()
            exits.end()
            return exits
        self._subscribers.append(exits)
        try:
            self._notify()
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
            self._notify()

    def deliver(self, core: VcpuCore | None = None, *, most: int = FleetCore.BATCH) -> int:
        """Deliver one batch, from all cores or from one. Returns the number of exits in it."""
        taken = self._core.deliver(core, most=most)
        if taken:
            for subscriber in self._subscribers:
                subscriber.wake()
        return taken

    def pass_output(self) -> int:
        """Wake the tasks that wait for console output. Returns the number of vCPUs that had output."""
        ids = self._core.talking()
        for id in ids:
            self._talked(id)
        return len(ids)

    async def run(self) -> None:
        """The drain task. It sleeps on the eventfd, and costs nothing while nobody has subscribed or nothing
        happens."""
        last, pace = -PACE, PACE
        while True:
            # A slower pace also has smaller batches: half as often and half as many exits, each time the pace doubles.
            printed, taken = self.pass_output(), self.deliver(most=max(FEWEST, int(FleetCore.BATCH * PACE / pace)))
            if printed or taken:
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
        """Deliver the records that are left in these cores, before the cores are freed. None of them runs any more.

        Only these cores: others may never pause, so a drain of all rings might not end.
        """
        for core in cores:
            while self.deliver(core):
                pass

    def vm_left(self, vm: str, number: int) -> None:
        """The VM has left for good. Its name is kept until its exits were received."""
        if number not in self._names:
            return  # the VM left before it had a core
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
        """No VM is left: end every channel, also those that are opened from now on."""
        self._closed = True
        for subscriber in self._subscribers:
            subscriber.channel.end()
            subscriber.end()
