"""Which dirty logs are read, and when: those of VMs that did something, about once a second each.

Reading a log write-protects what it names: the guest pays a fault for each page that it writes between two readings. So
reading more often costs the guest, not only the host; and as a page counts once in a reading, figures are comparable
only if the time between two is always the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import attrs
import trio

from ..backend.kvm.dirty import DirtyLog, read_logs
from ..machine.vm import Vm

__all__ = ["DirtyLogs", "Told"]

log: Final = logging.getLogger("orchestra")

EVERY: Final = 1_000_000_000
"""Nanoseconds between two readings of one log."""

EARLY: Final = 0.1
"""It may be that part of them less: ticks are not exact, and after one that came a little early it would be two."""


Told: TypeAlias = tuple[Vm, int, int]
"""A VM, the pages that it wrote, and the nanoseconds in which it did."""


@attrs.define(eq=False)
class _Watch:
    """One VM's log. `begun`: what the next reading tells was written since then. `stirred`: when the VM was last seen
    to have done something."""

    vm: Vm
    log: DirtyLog
    begun: int
    pages: int
    stirred: int = 0
    rate: float | None = None


class DirtyLogs:
    """Of one fleet: `stir` what did something, have the `due` ones `read`, and `take` what that told."""

    def __init__(self) -> None:
        self._watched: dict[Vm, _Watch] = {}
        self._stirred: set[_Watch] = set()  # with something to read
        self._read: list[_Watch] = []  # with something to take
        self._reading = False
        self._one = trio.CapacityLimiter(1)

    def next(self, now: int) -> int | None:
        """When to look again at the latest; None: no VM is logged."""
        return now + EVERY if self._watched else None

    def watch(self, vm: Vm, dirty: DirtyLog, now: int) -> Iterator[Told]:
        """A VM's log was switched on or off. What it told until then."""
        yield from self.forget(vm, dirty)
        if dirty.on:
            self._watched[vm] = _Watch(vm, dirty, now, dirty.sums()[0])

    def forget(self, vm: Vm, dirty: DirtyLog | None) -> Iterator[Told]:
        """A VM has ended, and its log was read for the last time. What that told."""
        watch = self._watched.get(vm)
        if watch is not None and watch.log is dirty:  # and not that of another run of the VM
            del self._watched[vm]
            if watch in self._stirred or watch.pages != dirty.sums()[0]:
                yield from self._told(watch)
            self._stirred.discard(watch)

    def stir(self, vm: Vm, since: int, now: int) -> None:
        """A VM did something between these times."""
        watch = self._watched.get(vm)
        if watch is None:
            return
        if watch not in self._stirred:
            self._stirred.add(watch)
            if since > watch.begun:  # it had a rest, and wrote nothing in it
                watch.begun, watch.rate = since, None
        watch.stirred = now

    def rate(self, vm: Vm) -> float | None:
        """Pages a second by the last reading; None if there was none since the VM last rested."""
        watch = self._watched.get(vm)
        return None if watch is None else watch.rate

    def due(self, now: int) -> list[_Watch]:
        """What is to be read now. Costs O(logged VMs that did something)."""
        least = EVERY * (1 - EARLY)
        return [] if self._reading else [watch for watch in self._stirred if now - watch.begun >= least]

    async def read(self, due: Sequence[_Watch], done: trio.Event) -> None:
        """Read them on a worker thread; `done`: they were."""
        self._reading = True
        try:
            logs = [watch.log for watch in due]
            try:
                problem = await trio.to_thread.run_sync(read_logs, logs, limiter=self._one)
            except RuntimeError:  # there is no thread to be had
                problem = read_logs(logs)
            if problem is not None:
                log.warning("dirty pages: %s: some are not counted", problem)
            self._read += due
        finally:
            self._reading = False
            done.set()

    def take(self) -> Iterator[Told]:
        """What was read since the last call."""
        read, self._read = self._read, []
        for watch in read:
            yield from self._told(watch)

    def _told(self, watch: _Watch) -> Iterator[Told]:
        pages, read = watch.log.sums()
        passed = read - watch.begun
        if passed > 0:
            yield watch.vm, pages - watch.pages, passed
            watch.rate = (pages - watch.pages) * 1e9 / passed
            watch.pages, watch.begun = pages, read
            if watch.stirred <= read:  # else it may have written since
                self._stirred.discard(watch)
