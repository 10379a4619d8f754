"""Decides which dirty logs are read, and when: the logs of active VMs, about once a second each.

A reading write-protects the pages that it names, so the guest pays a fault for each page that it writes between two
readings. So more readings cost the guest, and not only the host. A page counts once in each reading, so figures are
comparable only if the time between two readings is always the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import attrs
import trio

from ..backend.kvm.dirty import DirtyLog, read_logs
from ..machine.control import VmControl

__all__ = ["DirtyLogs", "DirtyPages"]

log: Final = logging.getLogger("orchestra")

EVERY: Final = 1_000_000_000
"""Nanoseconds between two readings of one log."""

EARLY: Final = 0.1
"""A reading may come earlier by this part of `EVERY`. Ticks are not exact: after a tick that came a little early, the
next reading would otherwise be two ticks away."""


DirtyPages: TypeAlias = tuple[VmControl, int, int]
"""A VM, the pages that it wrote, and the nanoseconds in which it wrote them."""


@attrs.define(eq=False)
class _Watch:
    """One VM's log. `begun`: the next reading counts writes since this time. `stirred`: when the VM was last seen to be
    active. `rate`: pages a second by the last reading. Times in nanoseconds."""

    vm: VmControl
    log: DirtyLog
    begun: int
    pages: int
    stirred: int = 0
    rate: float | None = None


class DirtyLogs:
    """The dirty logs of one fleet: `stir` active VMs, `read` the logs that are `due`, and `take` the results."""

    def __init__(self) -> None:
        self._watched: dict[VmControl, _Watch] = {}
        self._stirred: set[_Watch] = set()  # active since their last reading
        self._read: list[_Watch] = []  # read, and not yet taken
        self._reading = False
        self._one = trio.CapacityLimiter(1)

    def next(self, now: int) -> int | None:
        """The latest time for the next look; None: no VM is logged."""
        return now + EVERY if self._watched else None

    def watch(self, vm: VmControl, dirty: DirtyLog, now: int) -> Iterator[DirtyPages]:
        """A VM's log was switched on or off. Yields what it counted until then."""
        yield from self.forget(vm, dirty)
        if dirty.on:
            self._watched[vm] = _Watch(vm, dirty, now, dirty.sums()[0])

    def forget(self, vm: VmControl, dirty: DirtyLog | None) -> Iterator[DirtyPages]:
        """A VM has ended, and its log was read for the last time. Yields what that reading counted."""
        watch = self._watched.get(vm)
        if watch is not None and watch.log is dirty:  # the log of this run, and not of another run of the VM
            del self._watched[vm]
            if watch in self._stirred or watch.pages != dirty.sums()[0]:
                yield from self._counted(watch)
            self._stirred.discard(watch)

    def stir(self, vm: VmControl, since: int, now: int) -> None:
        """A VM was active between these times."""
        watch = self._watched.get(vm)
        if watch is None:
            return
        if watch not in self._stirred:
            self._stirred.add(watch)
            if since > watch.begun:  # the VM rested before, and wrote nothing
                watch.begun, watch.rate = since, None
        watch.stirred = now

    def rate(self, vm: VmControl) -> float | None:
        """Pages a second by the last reading; None: there was no reading since the VM last rested."""
        watch = self._watched.get(vm)
        return None if watch is None else watch.rate

    def due(self, now: int) -> list[_Watch]:
        """The logs that have to be read now. Costs O(active logged VMs)."""
        least = EVERY * (1 - EARLY)
        return [] if self._reading else [watch for watch in self._stirred if now - watch.begun >= least]

    async def read(self, due: Sequence[_Watch], done: trio.Event) -> None:
        """Read these logs on a worker thread, and set `done`. Where the host has no thread left, on the event loop."""
        self._reading = True
        try:
            logs = [watch.log for watch in due]
            try:
                problem = await trio.to_thread.run_sync(read_logs, logs, limiter=self._one)
            except RuntimeError:  # the host has no thread left
                problem = read_logs(logs)
            if problem is not None:
                log.warning("dirty pages: %s: some are not counted", problem)
            self._read += due
        finally:
            self._reading = False
            done.set()

    def take(self) -> Iterator[DirtyPages]:
        """Yields what was read since the last call."""
        read, self._read = self._read, []
        for watch in read:
            yield from self._counted(watch)

    def _counted(self, watch: _Watch) -> Iterator[DirtyPages]:
        pages, read = watch.log.sums()
        passed = read - watch.begun
        if passed > 0:
            yield watch.vm, pages - watch.pages, passed
            watch.rate = (pages - watch.pages) * 1e9 / passed
            watch.pages, watch.begun = pages, read
            if watch.stirred <= read:  # otherwise the VM may have written after the reading
                self._stirred.discard(watch)
