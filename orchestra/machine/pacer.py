"""Keeps the work of devices on the event loop to a part of the CPU time that the loop can have, and serves the devices
that have to wait, for that or for their budget: at a few times, many of them at each, and with no task for each.

doorbell, timers → must wait → `wait`: a step at its time, all due steps of the fleet together → nothing more to do
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

import trio

__all__ = ["GRID", "PART", "Pacer", "Part", "Step"]

GRID: Final = 10_000_000
"""Nanoseconds. Steps are done at multiples of this. To wake the event loop beside guests that keep the CPUs busy costs
it 0.1 ms of CPU time or more, as the caches are cold by then: so it wakes once for all."""

PART: Final = 1 / 16
"""Of the CPU time that the event loop can have, rings and timers get this at most. The rest is for what vCPUs and tasks
wait for: beside guests that keep the CPUs busy the loop gets no more than its share, however much it has to do. A guest
that rings waits for nothing, so it keeps its CPU busy at the same time."""

SAVED: Final = 250_000
"""Nanoseconds of CPU time that steps may save up, four steps of a usual device. Everybody on the loop waits for what
they use in one go, and beside busy guests several times as long, as the scheduler lets those catch up."""

LOOK: Final = 50_000_000
"""Nanoseconds between two looks of a waiting step at the limits in force. A usual wait is shorter and costs none."""

STEPS: Final = 4
"""Steps that are done in one round of the event loop. The rest come in the next."""

Step: TypeAlias = Callable[[int], int | None]
"""Does what is due at that time (ns), and returns when it wants to be called again. That time or an earlier one means:
as soon as the others had their turn. None: no more."""


class _Paced:
    __slots__ = ("done", "step", "tenant")

    def __init__(self, tenant: str, step: Step) -> None:
        self.tenant = tenant
        self.step: Step | None = step  # None: the one who waits for it was cancelled
        self.done = trio.Event()


class Part:
    """The CPU time that steps may use by now: `PART` of what the event loop can have. On idle CPUs that is all time.
    Where the loop waits for a CPU, it is less: of the time, the part in which it got the CPU when it wanted it.

    Parameters:
        times: nanoseconds that passed, that the loop's thread ran, and that it waited for a CPU.
    """

    def __init__(self, times: Callable[[], tuple[int, int, int]]) -> None:
        self._times = times
        self._left, self._rate = float(SAVED), PART
        self._last = times()

    def left(self) -> float:
        """Nanoseconds. 0 or less: wait."""
        before, self._last = self._last, self._times()
        passed, ran, waited = (now - then for now, then in zip(self._last, before, strict=True))
        self._rate = PART * ran / (ran + waited) if waited > 0 else PART
        self._left = min(self._left + passed * self._rate, SAVED)
        return self._left

    def wait(self) -> int:
        """Nanoseconds until there is some again, at the rate seen last."""
        return int(min(max(-self._left / self._rate, GRID), LOOK)) if self._rate else LOOK

    def spend(self, cpu: int) -> None:
        self._left -= cpu


class Pacer:
    """The steps of one fleet. For its thread. Tenants take turns, as in `Inbox`.

    Parameters:
        now: the fleet's clock, in nanoseconds.
        times: as of `Part`.
        cpu: nanoseconds that the calling thread has had a CPU. In virtual time that is 0: what a device costs there
            must not depend on the machine.
    """

    def __init__(
        self,
        now: Callable[[], int],
        times: Callable[[], tuple[int, int, int]],
        cpu: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._now = now
        self.cpu = cpu
        self._part = Part(times)
        self._due: dict[str, deque[_Paced]] = {}  # by tenant
        self._numbers = itertools.count()  # for steps of the same time: the first come is the first served
        self._heap: list[tuple[int, int, _Paced]] = []
        self._sooner = trio.Event()  # replaced whenever it was set

    def may(self) -> bool:
        """Whether there is CPU time left for devices now."""
        return self._part.left() > 0

    def spend(self, cpu: int) -> None:
        """Nanoseconds of CPU time that a device took otherwise than by a step."""
        self._part.spend(cpu)

    async def wait(self, tenant: str, at: int, step: Step) -> None:
        """Do the step at that time, and then whenever it wants, until it wants no more. It must not raise."""
        paced = _Paced(tenant, step)
        if self._push(at, paced):
            self._sooner.set()
        try:
            await paced.done.wait()
        finally:
            paced.step = None

    def _push(self, at: int, paced: _Paced) -> bool:
        """True: it is the first now."""
        at = min(at, self._now() + LOOK)
        at += -at % GRID
        first = not self._heap or at < self._heap[0][0]
        heapq.heappush(self._heap, (at, next(self._numbers), paced))
        return first

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            self._sooner = trio.Event()
            self._take()
            if self._due:
                if (left := self._part.left()) > 0:
                    self._serve(left)
                    await trio.lowlevel.checkpoint()
                else:
                    await trio.sleep(self._part.wait() / 1e9)
            elif self._heap:
                with trio.move_on_after(max(self._heap[0][0] - self._now(), 0) / 1e9):
                    await self._sooner.wait()
            else:
                await self._sooner.wait()

    def _take(self) -> None:
        """Find what is due."""
        now = self._now()
        while self._heap and self._heap[0][0] <= now:
            paced = heapq.heappop(self._heap)[2]
            self._due.setdefault(paced.tenant, deque()).append(paced)

    def _serve(self, left: float) -> None:
        """Do a few of the steps that are due, while there is CPU time left for them."""
        begun, spent = self.cpu(), 0
        for _ in range(STEPS):
            if not self._due or spent >= left:
                break
            tenant, waiting = next(iter(self._due.items()))
            del self._due[tenant]
            self._do(waiting)
            if waiting:
                self._due[tenant] = waiting  # at the end of the dict: the other tenants come first
            spent = self.cpu() - begun
        self._part.spend(spent)

    def _do(self, waiting: deque[_Paced]) -> None:
        paced = waiting.popleft()
        if paced.step is None:
            return
        now = self._now()
        at = paced.step(now)
        if at is None:
            paced.done.set()
        elif at <= now:
            waiting.append(paced)
        else:
            self._push(at, paced)
