"""Token buckets and QEMU's windows as fluids: a tick at a time, for many guests at once.

What the C core does lock by lock (`native/bucket.c`) is worked out here for a whole tick. A vCPU that wants to lock
n times in a tick does something else for z = tick / n between two locks. If it also waits W for each turn, it does
tick / (z + W) locks. W is what makes those that share a bucket use up just what the bucket has: its tokens at the
tick's start and those that the tick brings. A vCPU under several buckets waits for the slowest, as in the core.

What this leaves out is the order of events within a tick: tests/test_simulate_buckets.py compares it with the core,
docs/simulate.md says how far it is off.
"""

from __future__ import annotations

import math

from ..model.spec import Limit
from .arrays import Floats, Ints, np

__all__ = ["Buckets", "Windows", "shared_waits"]


class Buckets:
    """One bucket for each of many places; most have no limit. Tokens are brought up to date when they are looked at."""

    def __init__(self, size: int) -> None:
        self.rate = np.full(size, np.inf)
        self.burst = np.zeros(size)
        self.delay = np.full(size, np.inf)
        self._kept = np.full(size, np.nan)  # the rate of a limit that was taken off; nan: there was none
        self._tokens = np.zeros(size)
        self._at = np.zeros(size)
        self.limited = 0

    def set(self, index: int, limit: Limit | None, now: float) -> None:
        """Put a limit in force. As in the core: the first starts full, a changed one keeps what was left, and one that
        is set again what there would be if the old one had gone on unused."""
        was = math.isfinite(self.rate[index])
        if limit is None:
            if was:
                self._kept[index] = self.rate[index]
            self.rate[index], self.delay[index] = np.inf, np.inf
            self.limited -= was
            return
        left = limit.tokens
        if was or not math.isnan(self._kept[index]):
            self.rate[index] = self.rate[index] if was else self._kept[index]
            left = self._left(np.array([index]), now)[0]
        self.rate[index], self.burst[index] = limit.rate, limit.tokens
        self.delay[index] = np.inf if limit.max_delay is None else limit.max_delay
        self._tokens[index], self._at[index] = min(left, limit.tokens), now
        self.limited += not was

    def fill(self, limit: Limit, places: Ints) -> None:
        """The same for many places that had no limit yet, at time 0."""
        self.rate[places], self.burst[places] = limit.rate, limit.tokens
        self.delay[places] = np.inf if limit.max_delay is None else limit.max_delay
        self._tokens[places] = limit.tokens
        self.limited += len(places)

    def _left(self, places: Ints, now: float) -> Floats:
        tokens = self._tokens[places] + self.rate[places] * (now - self._at[places])
        return np.minimum(tokens, self.burst[places])

    def available(self, places: Ints, now: float, tick: float) -> Floats:
        """Locks that may be made in the tick that begins at `now`."""
        return self._left(places, now) + self.rate[places] * tick

    def alone(self, places: Ints, vcpus: Floats, think: Floats) -> Floats:
        """How long a vCPU that has a bucket to itself waits at each turn at least, if the bucket holds less than two.

        A lock is paid before the next, so what such a bucket gains while its guest does something else overflows.
        """
        held, token = (self.burst[places] - 1) / self.rate[places], 1 / self.rate[places]
        return np.where((vcpus == 1) & (held < token), token - np.minimum(held, think), 0.0).clip(0.0)

    def take(self, places: Ints, available: Floats, used: Floats, end: float) -> None:
        """Charge what was used of `available` by the tick's end."""
        self._tokens[places] = np.minimum(np.maximum(available - used, 0.0), self.burst[places])
        self._at[places] = end


def shared_waits(bucket: Ints, vcpus: Floats, think: Floats, least: Floats, rate: Floats) -> Floats:
    """How long each turn takes in buckets that are asked for more than they have.

    Solves, for each bucket, sum(vcpus / (think + max(least, W))) = rate.

    Parameters:
        bucket: which bucket each guest is under, 0 to n - 1.
        vcpus: how many of each guest's vCPUs lock.
        think: seconds that a vCPU of it lets pass between a turn and the next lock.
        least: seconds that it waits anyway, for other buckets.
        rate: locks per second that each of the n buckets has.

    Returns:
        W of each bucket, in seconds.
    """
    n = len(rate)
    low = np.zeros(n)
    high = np.bincount(bucket, vcpus, n) / rate  # were there no time to think
    wait = high / 2
    for _ in range(100):
        each = think + np.maximum(least, wait[bucket])
        over = np.bincount(bucket, vcpus / each, n) - rate
        low, high = np.where(over > 0, wait, low), np.where(over > 0, high, wait)
        if np.max(np.abs(over) / rate) < 1e-10:
            break
        slope = np.bincount(bucket, np.where(wait[bucket] > least, vcpus / each**2, 0.0), n)
        with np.errstate(divide="ignore", invalid="ignore"):
            newton = wait + over / slope
        wait = np.where((newton > low) & (newton < high), newton, (low + high) / 2)
    return wait


class Windows:
    """QEMU's rate limit, one window for each guest (see `QemuWindow`)."""

    def __init__(self, size: int, quota: float, length: float) -> None:
        self._quota, self._length = quota, length
        self._left = np.full(size, quota)  # of the slice
        self._end = np.full(size, -np.inf)

    def through(self, places: Ints, want: Floats, vcpus: Floats, now: float, tick: float) -> Floats:
        """How many of the locks that they want each gets through in the tick that begins at `now`."""
        done = np.zeros(len(places))
        rate = want / tick
        at = np.full(len(places), now)
        end = now + tick
        # A slice may end within the tick and the next begin; ever so often if ticks are long.
        while True:
            fresh = (self._end[places] <= at + 1e-12) & (at < end - 1e-12)
            self._end[places] = np.where(fresh, at + self._length, self._end[places])
            self._left[places] = np.where(fresh, self._quota, self._left[places])
            until = np.minimum(self._end[places], end)
            asked = rate * np.maximum(until - at, 0.0)
            left = self._left[places]
            # The lock that uses up the quota sends its vCPU to sleep; those of the other vCPUs come on top.
            exhausted = (asked >= left) & (left > 0)
            through = np.where(exhausted, left + (vcpus - 1), np.minimum(asked, left))
            through = np.minimum(through, asked)
            done += through
            self._left[places] = np.where(exhausted, 0.0, left - through)
            self._end[places] += np.where(exhausted, (vcpus - 1) / self._quota * self._length, 0.0)
            at = np.maximum(at, np.minimum(self._end[places], end))
            if np.all(at >= end - 1e-12):
                return done
