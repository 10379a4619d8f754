"""How much of a CPU the thread of a back-end may have: a guest that resets its device for ever keeps it busy. Pure."""

from __future__ import annotations

from typing import Final

import attrs

__all__ = ["Pace"]

SHARE: Final = 1 / 20
"""Of a CPU, in the long run. The thread needs the interpreter, which all VMs share."""

BURST: Final = 0.2
"""Seconds of CPU time at once, after a rest. A driver's start and a pause take a few milliseconds together, on an
emulated host some tens."""


@attrs.define
class Pace:
    """A bucket of CPU time. `spent` says how long to rest."""

    _left: float = BURST
    _since: float = 0.0

    def spent(self, seconds: float, now: float) -> float:
        """So much CPU time was spent until now. Returns the seconds to rest; 0: none."""
        self._left = min(BURST, self._left + (now - self._since) * SHARE) - seconds
        self._since = now
        return max(0.0, -self._left / SHARE)
