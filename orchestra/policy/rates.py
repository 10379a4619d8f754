"""Limits that do not slow a guest that keeps to them."""

from __future__ import annotations

from typing import Final

import attrs

from ..model.spec import Limit

__all__ = ["FASTEST", "LATE", "LEAST_BURST", "SLOWEST", "paced", "unfelt", "within_reach"]

LEAST_BURST: Final = 2.0
"""Tokens. With a burst of 1 a guest waits after each event for the next token, and works only then. A guest that asks
for no more than its limit would get about half of it. With 2 the guest earns the next token while it works."""

LATE: Final = 0.05
"""Seconds by which a vCPU may come late to its turn and still catch up: the burst of a limit holds so many seconds of
its rate."""

SLOWEST: Final = 1e-9
FASTEST: Final = 1e9
"""Events per second: the range that `Limit` accepts for a rate."""


def within_reach(rate: float) -> float:
    """The nearest rate that a `Limit` accepts, in events per second."""
    return min(max(rate, SLOWEST), FASTEST)


def paced(rate: float, max_delay: float | None) -> Limit:
    """The limit by which policies hold a VM to a rate, with a burst for turns that come late.

    Parameters:
        rate: events per second; brought into the range that a limit accepts.
        max_delay: as of `Limit`, in seconds.
    """
    rate = within_reach(rate)
    return Limit(rate=rate, burst=min(max(LEAST_BURST, 1 + rate * LATE), FASTEST), max_delay=max_delay)


def unfelt(limit: Limit) -> Limit:
    """The same limit with a burst of at least `LEAST_BURST`, so that a guest that keeps to the rate does not wait."""
    return attrs.evolve(limit, burst=LEAST_BURST) if limit.tokens < LEAST_BURST else limit
