"""Token buckets and QEMU's windows as a fluid model: a tick at a time, for many guests at once.

`policy/buckets` computes how a bucket fills and empties. This module computes how long guests wait for a bucket. A vCPU
that wants to lock n times in a tick does something else for z = tick / n between two locks. If the vCPU also waits W
for each lock, it makes tick / (z + W) locks. W is chosen so that the vCPUs under a bucket use exactly what the bucket
has: its tokens at the start of the tick and those that the tick brings. A vCPU under several buckets waits for the
slowest, as in the core.

The model leaves out the order of events within a tick. tests/test_simulate_buckets.py compares it with the core, and
docs/simulate.md says how large the difference is.
"""

from __future__ import annotations

import math

from ..model.spec import Limit
from ..policy.buckets import Bucket, earned, spent
from .arrays import Floats, Ints, np

__all__ = ["Buckets", "Windows", "shared_waits"]


class Buckets:
    """One `policy.buckets.Bucket` for each of many places, as columns; most have no limit."""

    def __init__(self, size: int) -> None:
        self.rate = np.full(size, np.inf)  # the rate in force; inf: there is no limit
        self.burst = np.zeros(size)
        self.delay = np.full(size, np.inf)
        self._last = np.zeros(size)  # the rate in force, or that of the last limit; 0: there was none
        self._tokens = np.zeros(size)
        self._at = np.zeros(size)
        self.limited = 0

    def set(self, index: int, limit: Limit | None, now: float) -> None:
        """Put a limit in force, or take it off."""
        was = math.isfinite(self.rate[index])
        columns = self._last, self.burst, self._tokens, self._at
        one = Bucket(None, *(float(column[index]) for column in columns))
        one.put(limit, now)
        for column, value in zip(columns, (one.rate, one.burst, one.tokens, one.at), strict=True):
            column[index] = value
        self.rate[index] = np.inf if limit is None else limit.rate
        self.delay[index] = np.inf if limit is None or limit.max_delay is None else limit.max_delay
        self.limited += (limit is not None) - was

    def fill(self, limit: Limit, places: Ints) -> None:
        """Put a limit in force at many places that had none yet, at time 0."""
        self.rate[places] = self._last[places] = limit.rate
        self._tokens[places] = self.burst[places] = limit.tokens
        self.delay[places] = np.inf if limit.max_delay is None else limit.max_delay
        self.limited += len(places)

    def available(self, places: Ints, now: float, tick: float) -> Floats:
        """Locks that may be made in the tick that begins at `now`."""
        rate = self.rate[places]
        tokens: Floats = earned(
            self._tokens[places], rate, self.burst[places], now - self._at[places], least=np.minimum
        )
        return tokens + rate * tick

    def alone(self, places: Ints, vcpus: Floats, think: Floats) -> Floats:
        """How long a vCPU that has a bucket to itself waits at each turn at least, if the bucket holds less than two.

        A lock is paid before the next, so what such a bucket gains while its guest does something else overflows.
        """
        held, token = (self.burst[places] - 1) / self.rate[places], 1 / self.rate[places]
        return np.where((vcpus == 1) & (held < token), token - np.minimum(held, think), 0.0).clip(0.0)

    def take(self, places: Ints, available: Floats, used: Floats, end: float) -> None:
        """Charge what was used of `available` by the tick's end."""
        self._tokens[places] = spent(available, used, self.burst[places], least=np.minimum, most=np.maximum)
        self._at[places] = end


def shared_waits(bucket: Ints, vcpus: Floats, think: Floats, least: Floats, rate: Floats) -> Floats:
    """How long a vCPU waits for each lock under buckets that are asked for more than they have.

    Solves, for each bucket, sum(vcpus / (think + max(least, W))) = rate.

    Parameters:
        bucket: the bucket of each guest, 0 to n - 1.
        vcpus: how many vCPUs of each guest lock.
        think: seconds that a vCPU of the guest lets pass between two locks.
        least: seconds that a vCPU waits anyway, for other buckets.
        rate: locks per second that each of the n buckets has.

    Returns:
        W of each bucket, in seconds.
    """
    n = len(rate)
    low = np.zeros(n)
    high = np.bincount(bucket, vcpus, n) / rate  # as if a vCPU took no time between two locks
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
        self._left = np.full(size, quota)  # quota left in the slice
        self._end = np.full(size, -np.inf)

    def through(self, places: Ints, want: Floats, vcpus: Floats, now: float, tick: float) -> Floats:
        """How many of the locks that each VM wants pass in the tick that begins at `now`."""
        done = np.zeros(len(places))
        rate = want / tick
        at = np.full(len(places), now)
        end = now + tick
        # A slice may end within the tick and the next one begin, many times if ticks are long.
        while True:
            fresh = (self._end[places] <= at + 1e-12) & (at < end - 1e-12)
            self._end[places] = np.where(fresh, at + self._length, self._end[places])
            self._left[places] = np.where(fresh, self._quota, self._left[places])
            until = np.minimum(self._end[places], end)
            asked = rate * np.maximum(until - at, 0.0)
            left = self._left[places]
            # The lock that uses up the quota sends its vCPU to sleep. One lock of each other vCPU comes on top.
            exhausted = (asked >= left) & (left > 0)
            through = np.where(exhausted, left + (vcpus - 1), np.minimum(asked, left))
            through = np.minimum(through, asked)
            done += through
            self._left[places] = np.where(exhausted, 0.0, left - through)
            self._end[places] += np.where(exhausted, (vcpus - 1) / self._quota * self._length, 0.0)
            at = np.maximum(at, np.minimum(self._end[places], end))
            if np.all(at >= end - 1e-12):
                return done
