"""Limits that whoever keeps to them doesn't feel."""

from __future__ import annotations

from typing import Final

import attrs

from ..model.spec import Limit

__all__ = ["FASTEST", "LATE", "LEAST_BURST", "SLOWEST", "paced", "unfelt"]

LEAST_BURST: Final = 2.0
"""With a burst of 1 a guest waits after each event until the next has been earned, and works only then: one that asks
for no more than its limit would get half of it."""

LATE: Final = 0.05
"""Seconds by which a vCPU may come late to its turn and still catch up."""

SLOWEST: Final = 1e-9
FASTEST: Final = 1e9


def paced(rate: float, max_delay: float | None) -> Limit:
    """What policies hold a VM to: a rate, brought into its range, with a burst for turns that come late."""
    rate = min(max(rate, SLOWEST), FASTEST)
    return Limit(rate=rate, burst=min(max(LEAST_BURST, 1 + rate * LATE), FASTEST), max_delay=max_delay)


def unfelt(limit: Limit) -> Limit:
    """The same limit, with a burst that whoever keeps to it doesn't wait for."""
    return attrs.evolve(limit, burst=LEAST_BURST) if limit.tokens < LEAST_BURST else limit
