"""Holds each vCPU thread of one guest to a share of a CPU: in the run loop, or by the kernel (`bandwidth`)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

import trio

from ...model.errors import ResourceLimit
from ...native.core import VcpuCore
from .bandwidth import CpuCgroup, ThreadCap

__all__ = ["Caps", "CgroupCaps", "RunLoopCaps"]

log: Final = logging.getLogger("orchestra")

PATIENCE: Final = 1.0
"""Seconds until a cgroup whose threads have ended must be empty. It takes a millisecond."""


class Caps(Protocol):
    """The caps of one guest. Methods are for the fleet's thread, unless their docstring says otherwise."""

    def put(self, share: float | None, threads: Mapping[int, int]) -> None:
        """Let each thread use at most that share of a CPU from now on; None: no cap.

        Parameters:
            threads: the threads that have not ended, by the index of their vCPU.

        Raises:
            ResourceLimit: the host has no room for a cap, or refuses it.
        """

    async def settled(self) -> None:
        """Wait until the cap is in force; no checkpoint if it is already.

        Raises:
            ResourceLimit: the host refuses the cap; nothing is capped then.
        """

    def held(self, index: int, now: int) -> int:
        """Nanoseconds for which a cap has held that vCPU so far."""

    def hurry(self, on: bool) -> None:
        """True: the fleet waits for the threads, so let them run. False: the wait is over. Calls come in pairs."""

    def end(self) -> None:
        """The guest is to end: let its threads run to their end. Any thread."""

    def leave(self, index: int) -> None:
        """That vCPU will not run again. Its own thread."""

    def close(self) -> None:
        """Give back what the caps took of the host, after the last thread has ended. Any thread; waits up to a
        second."""


class RunLoopCaps:
    """Holds them outside the guest, in the C run loop, by something that any command ends (`native/cap.c`)."""

    def __init__(self, cores: Sequence[VcpuCore]) -> None:
        self._cores = cores
        self._share: float | None = None

    def put(self, share: float | None, threads: Mapping[int, int]) -> None:
        try:
            for core in self._cores:
                core.cap(share)
        except ResourceLimit:  # all threads or none: give the earlier ones their old cap back
            for core in self._cores:
                with suppress(ResourceLimit):
                    core.cap(self._share)
            raise
        self._share = share

    async def settled(self) -> None:
        pass

    def held(self, index: int, now: int) -> int:
        return self._cores[index].counters(now).capped

    def hurry(self, on: bool) -> None:
        pass

    def end(self) -> None:
        pass

    def leave(self, index: int) -> None:
        pass

    def close(self) -> None:
        pass


class CgroupCaps:
    """The caps of one guest (`Caps`), kept by the kernel.

    Parameters:
        name: of the guest.
        ask: makes a vCPU's thread run a function soon.
        post: makes the fleet's thread run a function soon.
        failed: called with the reason if a cap does not come into force; nothing is capped then.
    """

    def __init__(
        self,
        cgroup: CpuCgroup,
        name: str,
        ask: Callable[[int, Callable[[], None]], object],
        post: Callable[..., object],
        failed: Callable[[ResourceLimit], object],
    ) -> None:
        self._cgroup = cgroup
        self._name = name
        self._ask = ask
        self._post = post
        self._failed = failed
        self._share: float | None = None
        self._caps: dict[int, ThreadCap] = {}
        self._lifted: list[ThreadCap] = []
        self._held: Counter[int] = Counter()
        self._entering: set[ThreadCap] = set()
        self._changed = trio.Event()
        self._problem: ResourceLimit | None = None
        self._hurries = 0
        self._ending = False

    def put(self, share: float | None, threads: Mapping[int, int]) -> None:
        self._problem = None
        if share is None or share >= 1:
            self._lift()
            return
        made: dict[int, ThreadCap] = {}
        try:
            for index, tid in threads.items():
                if index not in self._caps:
                    # Made empty and loose first, and filled by the thread itself: no thread is ever held by a cap that
                    # it has not entered.
                    made[index] = self._cgroup.cap(f"{self._name}.{index}", tid)
                    made[index].put(share, loose=True)  # until the thread has reported that it is in
            for cap in self._caps.values():
                cap.put(share, self._loose or cap in self._entering)
        except ResourceLimit:
            for cap in made.values():
                cap.remove()
            raise
        self._share = share
        self._caps |= made
        self._entering.update(made.values())
        # Last: only when all cgroups are made and nothing can fail any more, does a thread learn of its cap.
        for index, cap in made.items():
            self._ask(index, partial(self._enter, index, cap))

    def _lift(self) -> None:
        caps, self._caps = self._caps, {}
        for index, cap in caps.items():
            try:
                # No quota any more, before the thread has left: it may be held just now, and then could not leave.
                cap.put(None)
            except ResourceLimit as error:
                log.error("vm %s: %s", self._name, error.strerror)
            # The cgroup goes, so its time is added up here.
            self._held[index] += cap.held()
            self._lifted.append(cap)
            self._ask(index, partial(self._leave, cap))

    async def settled(self) -> None:
        while self._entering:
            await self._changed.wait()
        if self._problem is not None:
            raise self._problem

    # ---- on the vCPUs' threads, and back

    def _enter(self, index: int, cap: ThreadCap) -> None:
        problem = None
        try:
            cap.enter()
        except ResourceLimit as error:
            problem = error
        self._post(self._entered, index, cap, problem)

    def _entered(self, index: int, cap: ThreadCap, problem: ResourceLimit | None) -> None:
        self._entering.discard(cap)
        if self._caps.get(index) is cap:  # otherwise the cap was lifted meanwhile
            try:
                if problem is not None:
                    raise problem
                cap.put(self._share, self._loose)
            except ResourceLimit as error:
                self._problem = error
                self._lift()
                self._failed(error)
        # A new event for the next change, as an event can't be unset; `settled` looks again at what is left.
        self._changed.set()
        self._changed = trio.Event()

    def leave(self, index: int) -> None:
        if (cap := self._caps.get(index)) is not None:
            self._out(cap)

    def _out(self, cap: ThreadCap) -> None:
        try:
            cap.leave()
        except OSError as error:
            log.error("vm %s: %s", self._name, error.strerror)

    def _leave(self, cap: ThreadCap) -> None:
        self._out(cap)
        self._post(self._left, cap)

    def _left(self, cap: ThreadCap) -> None:
        if cap in self._lifted and cap.remove():
            self._lifted.remove(cap)

    # ---- for those who wait for threads

    @property
    def _loose(self) -> bool:
        return self._ending or self._hurries > 0

    def hurry(self, on: bool) -> None:
        # Written only when the answer changes: several callers may be in a hurry at once.
        before = self._loose
        self._hurries += 1 if on else -1
        if self._loose != before:
            self._again()

    def end(self) -> None:
        if not self._ending:
            self._ending = True
            self._again()

    def _again(self) -> None:
        for cap in list(self._caps.values()):
            try:
                cap.put(self._share, self._loose or cap in self._entering)
            except ResourceLimit as error:
                log.error("vm %s: %s", self._name, error.strerror)

    # ---- figures and end

    def held(self, index: int, now: int) -> int:
        cap = self._caps.get(index)
        return self._held[index] + (cap.held() if cap is not None else 0)

    def close(self) -> None:
        self._ending = True
        left = [*self._caps.values(), *self._lifted]
        self._caps = {}
        self._lifted = []
        # A thread that has ended may still be in its cgroup for a moment, and rmdir fails until then. This runs on a
        # worker thread, so a sleep harms nobody.
        end = time.monotonic() + PATIENCE
        for cap in left:
            while not cap.remove():
                if time.monotonic() > end:
                    log.warning("vm %s: %s is in use by somebody else, and stays", self._name, cap.folder)
                    break
                time.sleep(0.001)
