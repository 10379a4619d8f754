"""Timers of one VM's devices, on the fleet's clock. They know no trio: their owner asks `next` and `due`."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Final, Protocol

__all__ = ["LONGEST", "SHORTEST", "Timer", "Timers", "VmTimer"]

SHORTEST: Final = 50_000
"""Nanoseconds. A guest that asks for less gets this: each expiry is work for the fleet's thread."""

LONGEST: Final = 1 << 62
"""Nanoseconds, 146 years. Sums with any time of the clock stay below 2**63."""


class Timer(Protocol):
    """Calls its device once, some time after it was armed. All methods: any thread."""

    def arm(self, after: int) -> None:
        """Expire in `after` nanoseconds; a time set before no longer counts. Does nothing once the VM is closed."""

    def disarm(self) -> None:
        """Don't expire. If the device itself calls this, no expiry that was set before comes after the return."""

    def remaining(self) -> int | None:
        """Nanoseconds until it expires, at least 0; None: it is not armed. For the device's state."""


class VmTimer:
    """A timer of `Timers`, which alone change `at` and `setting`."""

    __slots__ = ("_timers", "at", "expired", "setting")

    def __init__(self, timers: Timers, expired: Callable[[], None]) -> None:
        self._timers = timers
        self.expired = expired
        self.at: int | None = None
        self.setting = 0  # counts arm and disarm: an expiry with an old count is ignored

    def arm(self, after: int) -> None:
        self._timers.set(self, min(max(after, SHORTEST), LONGEST))

    def disarm(self) -> None:
        self._timers.set(self, None)

    def remaining(self) -> int | None:
        return self._timers.remaining(self)


class Timers:
    """The timers of one VM.

    Parameters:
        now: the clock, in nanoseconds.
        sooner: told that the next expiry is sooner than it was. Any thread.
    """

    def __init__(self, now: Callable[[], int], sooner: Callable[[], object]) -> None:
        self.now = now
        self._sooner = sooner
        self._timers: list[VmTimer] = []
        self._lock = Lock()  # of each one's `at` and `setting`
        self._closed = False

    def new(self, expired: Callable[[], None]) -> VmTimer:
        """Make a timer, not armed."""
        timer = VmTimer(self, expired)
        self._timers.append(timer)
        return timer

    def set(self, timer: VmTimer, after: int | None) -> None:
        with self._lock:
            if self._closed:
                return
            before = self._next()
            timer.at = None if after is None else self.now() + after
            timer.setting += 1
            sooner = timer.at is not None and (before is None or timer.at < before)
        if sooner:
            self._sooner()

    def remaining(self, timer: VmTimer) -> int | None:
        with self._lock:
            return None if timer.at is None else max(timer.at - self.now(), 0)

    def next(self) -> int | None:
        """When the next timer expires; None: no timer is armed."""
        with self._lock:
            return self._next()

    def _next(self) -> int | None:  # a VM has a handful of them
        return min((timer.at for timer in self._timers if timer.at is not None), default=None)

    def due(self) -> list[tuple[VmTimer, int]]:
        """The timers that have expired, the oldest first, each with its setting. `taken` takes them one by one."""
        with self._lock:
            now = self.now()
            found = [(timer.at, timer) for timer in self._timers if timer.at is not None and timer.at <= now]
            return [(timer, timer.setting) for _, timer in sorted(found, key=lambda one: one[0])]

    def taken(self, timer: VmTimer, setting: int) -> bool:
        """Take an expiry, with the device's lock held: False if the device set the timer again or disarmed it since."""
        with self._lock:
            if timer.setting != setting or timer.at is None:
                return False
            timer.at = None
            timer.setting += 1
            return True

    def close(self) -> None:
        """No timer expires any more, and none can be armed."""
        with self._lock:
            self._closed = True
            for timer in self._timers:
                timer.at = None
                timer.setting += 1
