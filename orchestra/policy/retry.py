"""Actions that a policy asks for once, and again only if they were refused."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Final

__all__ = ["FIRST_WAIT", "MOST_WAIT", "Once"]

FIRST_WAIT: Final = 1_000_000_000
MOST_WAIT: Final = 64_000_000_000
"""Nanoseconds before an action that was refused or failed is tried again. Each time doubles the wait, up to this one.
Each refusal is a row in the journal, and an action that is refused for good must not fill the journal."""


class Once:
    """Keeps what was asked for. What was refused is due again after a second, then after twice as long each time.

    The wait ends at 64 s. Times are nanoseconds on the fleet's clock.
    """

    def __init__(self) -> None:
        self._due: dict[Hashable, tuple[float, int]] = {}  # when it is due, and how long it waited for that

    def __len__(self) -> int:
        return len(self._due)

    @property
    def waiting(self) -> bool:
        """Whether anything was refused and not asked for again yet. Costs O(all that was asked for)."""
        return any(due < math.inf for due, _ in self._due.values())

    def due(self, what: Hashable, time: int) -> bool:
        """Whether to ask for `what` now. If so, it counts as asked for from now on."""
        due, wait = self._due.get(what, (0, 0))
        if time < due:
            return False
        self._due[what] = math.inf, wait
        return True

    def refused(self, what: Hashable, time: int) -> None:
        """Note that `what` was asked for and refused."""
        due, wait = self._due.get(what, (0, 0))
        if due == math.inf:  # else the refusal is known already, and must not double the wait again
            wait = min(max(FIRST_WAIT, 2 * wait), MOST_WAIT)
            self._due[what] = time + wait, wait

    def forget(self, these: Iterable[Hashable]) -> None:
        """Forget what belongs to VMs that are gone."""
        for what in these:
            self._due.pop(what, None)
