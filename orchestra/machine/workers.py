"""Worker threads of one fleet, for work that would hold up its event loop: set-ups, teardowns, dirty logs, unmapping.

Each kind of work has a limit of its own, so that no kind waits for another. Where the host has no thread left, the
event loop does the work itself: late is better than never.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, Final, TypeVar, cast

import trio

from ..backend.memory import GuestMemory, Region, unmap
from ..host.control.priority import end_priority
from ..host.files import Files

__all__ = ["Workers", "at_length"]

log: Final = logging.getLogger("orchestra")

T = TypeVar("T")

THREADS: Final = 4
"""For each kind of work. More would contend: the kernel makes and removes VMs under locks of process and host."""

BIG: Final = 256 << 20
"""Bytes. A memory of this size takes 20 ms or more to unmap. So big memories never take the last thread: small ones,
and the restarts that wait for them, need not wait for a big one."""


def at_length(function: Callable[..., T], *arguments: object) -> T:
    """Call a function that takes long, on a worker thread: with the default slice, whatever the thread inherited."""
    end_priority()
    return function(*arguments)


class Workers:
    """The worker threads of one fleet; for the fleet's thread.

    Attributes:
        setup, teardown, dirty, populate, files: the limiters for `run`. `files` has no limit: a file that hangs keeps
            its thread.
        host: the host's files; where its cgroups are mounted is read once.
        claimed: bytes of memory that launches are about to take (`machine.prefault`).

    Parameters:
        threaded: False: do all work on the calling thread. For fleets in virtual time, whose clock knows no threads.
    """

    def __init__(self, threaded: bool) -> None:
        self.setup = trio.CapacityLimiter(THREADS)
        self.teardown = trio.CapacityLimiter(THREADS)
        self.dirty = trio.CapacityLimiter(THREADS)
        self.populate = trio.CapacityLimiter(THREADS)
        self.files = trio.CapacityLimiter(inf)
        self.host = Files()
        self.claimed = 0
        self._threaded = threaded
        self._token = trio.lowlevel.current_trio_token()
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, list[Region], trio.Event]] = []  # a heap: the smallest first
        self._running: list[int] = []  # sizes of what is being unmapped
        self._idle = trio.Event()
        self._idle.set()

    async def run(self, function: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        """Call a function on a worker thread, and return its result. Only the wait for a turn can be cancelled."""
        if not self._threaded:
            return function()
        # Not trio.to_thread: what it does beyond this takes a twentieth of a launch, and is not needed here. It copies
        # the context, names the thread, and takes a turn of the event loop even if the limit is not reached.
        await trio.lowlevel.checkpoint_if_cancelled()
        turn, task = object(), trio.lowlevel.current_task()
        try:
            limiter.acquire_on_behalf_of_nowait(turn)
        except trio.WouldBlock:
            await limiter.acquire_on_behalf_of(turn)

        def done(result: Any) -> None:  # `outcome.Outcome`, of a library that trio depends on
            limiter.release_on_behalf_of(turn)
            trio.lowlevel.reschedule(task, result)

        try:
            trio.lowlevel.start_thread_soon(
                partial(at_length, function), lambda result: self._token.run_sync_soon(done, result)
            )
        except RuntimeError:  # the host has no thread left
            limiter.release_on_behalf_of(turn)
            return function()
        return cast(T, await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED))

    def discard(self, memory: GuestMemory) -> trio.Event:
        """Give a guest's memory back: nobody can use it from now on. The event is set once the memory is unmapped."""
        done = trio.Event()
        regions = memory.detach()
        if not self._threaded or not regions:
            unmap(regions)
            done.set()
            return done
        if self._idle.is_set():
            self._idle = trio.Event()
        size = sum(len(region.span) for region in regions)
        heapq.heappush(self._waiting, (size, next(self._numbers), regions, done))
        self._start()
        return done

    async def idle(self) -> None:
        """Wait until all discarded memory is unmapped."""
        await self._idle.wait()

    def _start(self) -> None:
        while self._waiting and len(self._running) < THREADS:
            size, _, regions, done = self._waiting[0]
            if size >= BIG and sum(other >= BIG for other in self._running) >= THREADS - 1:
                return  # the heap has the smallest first, so all that wait are big
            try:
                trio.lowlevel.start_thread_soon(partial(at_length, unmap, regions), partial(self._report, size, done))
            except RuntimeError:
                if self._running:
                    return  # a thread that is at work calls `_start` again at its end
                unmap(regions)
                done.set()
            else:
                self._running.append(size)
            heapq.heappop(self._waiting)
        if not self._waiting and not self._running:
            self._idle.set()

    def _report(self, size: int, done: trio.Event, result: object) -> None:
        """A memory is unmapped: tell the fleet's thread. Worker thread."""
        try:
            self._token.run_sync_soon(self._unmapped, size, done, result)
        except trio.RunFinishedError:
            pass  # nobody is left to be told

    def _unmapped(self, size: int, done: trio.Event, result: object) -> None:
        if (error := getattr(result, "error", None)) is not None:
            log.error("a guest's memory could not be unmapped: %r", error)
        self._running.remove(size)
        done.set()
        self._start()
