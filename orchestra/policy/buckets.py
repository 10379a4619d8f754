"""The token bucket in Python: the arithmetic by which replay, dry run and simulator say what a limit would let through.

The C core's bucket (`native/bucket.c`) counts event by event. This one is its fluid: parts of events, an interval at a
time. Both keep to the same rules, and `tests/test_policy_buckets.py` drives them side by side:

    tokens
    burst |      ____        full at the first limit; `rate` tokens a second, up to the burst
          |     /    \\       events take one each
        0 |____/      \\___   never less: a guest that `max_delay` lets go before its turn owes nothing for that

- A limit that changes keeps the tokens that are left, up to the new burst. A larger burst has to be earned.
- A limit that is taken off goes on as it was, unused. If one is set again, its tokens are those that the old one would
  have by then. So changing a limit to and fro makes no tokens.

The core differs in two ways, which a fluid can't know. It charges an event when it sees it, before the vCPU waits, so
with n vCPUs it is up to n events ahead. And it remembers for at most `max_delay` seconds what `max_delay` let go early.
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
    """The tokens of a bucket that was left alone for so long. Arrays need ``least=numpy.minimum``."""
    return least(tokens + rate * seconds, burst)


def spent(
    room: Any,
    events: Any,
    burst: Any,
    least: Callable[[Any, Any], Any] = min,
    most: Callable[[Any, Any], Any] = max,
) -> Any:
    """The tokens at the end of an interval that had `room` for events and saw so many."""
    return least(most(room - events, 0.0), burst)


@attrs.define(eq=False)
class Bucket:
    """One bucket.

    Attributes:
        limit: that is in force; None: none.
        rate, burst: of the limit, or of the last one; a rate of 0: there never was any.
        tokens: those of the time `at`, in seconds on the caller's clock.
    """

    limit: Limit | None = None
    rate: float = 0.0
    burst: float = 0.0
    tokens: float = 0.0
    at: float = 0.0

    def put(self, limit: Limit | None, now: float) -> None:
        """Put a limit in force, or take it off."""
        self._settle(now)
        if limit is not None:
            self.tokens = min(self.tokens, limit.tokens) if self.rate else limit.tokens
            self.rate, self.burst = limit.rate, limit.tokens
        self.limit = limit

    def room(self, now: float, seconds: float) -> float:
        """Events that may happen in an interval that begins now: there are tokens, and the interval brings more."""
        self._settle(now)
        return self.tokens + self.rate * seconds

    def take(self, events: float, now: float, seconds: float) -> None:
        """So many happened in that interval."""
        self.tokens = spent(self.room(now, seconds), events, self.burst)
        self.at = now + seconds

    def _settle(self, now: float) -> None:
        if now > self.at:
            self.tokens = earned(self.tokens, self.rate, self.burst, now - self.at)
            self.at = now
