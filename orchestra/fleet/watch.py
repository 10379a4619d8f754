"""Gives a task the facts that policies decide on: what the fleet did, interval by interval."""

from __future__ import annotations

import math
from typing import Protocol, Self

import trio

from ..model.errors import SpecError
from ..policy import Facts
from .observer import Observer

__all__ = ["Watch"]


class Fleet(Protocol):
    """The fleet, as a watch needs it."""

    @property
    def closed(self) -> bool: ...
    def now(self) -> int: ...


class Watch:
    """Facts for each interval: ``async for facts in watch``. Opened by `Fleet.watch`. One task at a time.

    Each `Facts` is about the time since the one before, or since the watch was opened. So nothing is missed: a task
    that takes facts late gets the next over a longer time (`Facts.interval`). Facts list only active VMs. Iterating is
    a checkpoint; cancelling loses nothing. Iterating ends with the block, and with the fleet.
    """

    def __init__(self, fleet: Fleet, activity: Observer, interval: float) -> None:
        number = isinstance(interval, int | float) and not isinstance(interval, bool)
        if not (number and 1e-3 <= interval < math.inf):
            raise SpecError(f"interval={interval!r}: must be seconds between two facts, at least 0.001")
        self._fleet = fleet
        self._activity = activity
        self._interval = round(interval * 1e9)
        activity.look(fleet.now())
        self._window = activity.open()
        self._due = fleet.now() + self._interval
        self._busy = False
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Facts:
        if self._busy:
            raise trio.BusyResourceError("another task is watching with this")
        self._busy = True
        try:
            await trio.sleep(max(0.0, (self._due - self._fleet.now()) / 1e9))
        finally:
            self._busy = False
        if self._closed or self._fleet.closed:
            raise StopAsyncIteration
        return self._take()

    def _take(self) -> Facts:
        activity, now = self._activity, self._fleet.now()
        activity.look(now)
        facts = activity.facts(self._window, ended=True)
        activity.close(self._window)
        self._window = activity.open()
        # If the task is late by whole intervals, these are skipped: the facts cover their time.
        self._due += max(1, -(-(now - self._due) // self._interval)) * self._interval
        return facts

    def close(self) -> None:
        """End the watch: iterating ends."""
        if not self._closed:
            self._closed = True
            self._activity.close(self._window)
