"""The token bucket in Python: replay, dry run and simulator compute with it what a limit would let through.

The bucket of the C core (`native/bucket.c`) counts event by event. This bucket is a fluid model: it counts parts of
events, one interval at a time. Both follow the same rules, and `tests/test_policy_buckets.py` drives them side by side:

    tokens
    burst |      ____        full at the first limit; `rate` tokens a second, up to the burst
          |     /    \\       events take one each
        0 |____/      \\___   never less: a guest that `max_delay` lets go before its turn owes nothing for that

- When a limit changes, the bucket keeps the tokens that are left, up to the new burst. The bucket has to earn the
  tokens of a larger burst.
- When a limit is taken off, the bucket goes on earning at the old rate, unused. If a limit is set again, the bucket has
  the tokens that it would have under the old limit. So changing a limit to and fro makes no tokens.
- A bucket may have tokens beside the limit's, which are used first and never made again (`TokenBucket.one_time_burst`).
  Of these too, changing to and fro makes none: what was given before counts.

The core differs in two ways, which a fluid model can't follow. The core charges an event when it sees the event, before
the vCPU waits, so with n vCPUs the core is up to n events ahead. And for events that `max_delay` released early, the
core remembers a debt, for at most `max_delay` seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import attrs

from ..model.spec import Limit

__all__ = ["Bucket", "earned", "spent"]

Amount = TypeVar("Amount")
"""Tokens: a number, or an array of them with elementwise `least` and `most`."""


def earned(tokens: Any, rate: Any, burst: Any, seconds: Any, least: Callable[[Any, Any], Amount] = min) -> Amount:
    """The tokens of a bucket after `seconds` without an event. Arrays need ``least=numpy.minimum``."""
    return least(tokens + rate * seconds, burst)


def spent(
    room: Any,
    events: Any,
    burst: Any,
    least: Callable[[Any, Any], Any] = min,
    most: Callable[[Any, Any], Any] = max,
) -> Any:
    """The tokens at the end of an interval that had room for `room` events and saw `events`."""
    return least(most(room - events, 0.0), burst)


@attrs.define(eq=False)
class Bucket:
    """One bucket.

    Attributes:
        limit: the limit in force. None: no limit.
        rate, burst: events per second and tokens of the limit, or of the last limit. A rate of 0: there never was one.
        tokens: the tokens at the time `at`.
        at: seconds on the caller's clock.
        once: what is left of the tokens that are given once; `given`: the most that there ever were.
    """

    limit: Limit | None = None
    rate: float = 0.0
    burst: float = 0.0
    tokens: float = 0.0
    at: float = 0.0
    once: float = 0.0
    given: float = 0.0

    def give_once(self, tokens: float) -> None:
        """Have that many tokens beside the limit's: what was given before counts, and no more than these are kept."""
        self.once = min(self.once + max(0.0, tokens - self.given), tokens)
        self.given = max(self.given, tokens)

    def put(self, limit: Limit | None, now: float) -> None:
        """Put a limit in force at the time `now`. None: take the limit off."""
        self._settle(now)
        if limit is not None:
            self.tokens = min(self.tokens, limit.tokens) if self.rate else limit.tokens
            self.rate, self.burst = limit.rate, limit.tokens
        self.limit = limit

    def room(self, now: float, seconds: float) -> float:
        """Events that may happen in an interval that begins now: the tokens there are, and those that it earns."""
        self._settle(now)
        return self.once + self.tokens + self.rate * seconds

    def tokens_at(self, now: float) -> float:
        """The limit's own tokens, without those that are given once."""
        self._settle(now)
        return self.tokens

    def take(self, events: float, now: float, seconds: float) -> None:
        """Charge the events that happened in an interval of `seconds` that began at `now`."""
        room, first = self.room(now, seconds), min(self.once, events)
        self.tokens = spent(room - self.once, events - first, self.burst)
        self.once -= first
        self.at = now + seconds

    def _settle(self, now: float) -> None:
        if now > self.at:
            self.tokens = earned(self.tokens, self.rate, self.burst, now - self.at)
            self.at = now
