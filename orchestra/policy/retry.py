"""What a policy asks for once, and again only if it was refused."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Final

__all__ = ["FIRST_WAIT", "MOST_WAIT", "Once"]

FIRST_WAIT: Final = 1_000_000_000
MOST_WAIT: Final = 64_000_000_000
"""Nanoseconds before what was refused, or failed, is tried again: doubled each time, up to the most."""


class Once:
    """What was refused is due again after a second, and each time after twice as long, up to 64 s: each refusal is a
    row in the journal. Times are nanoseconds on the fleet's clock."""

    def __init__(self) -> None:
        self._due: dict[Hashable, tuple[float, int]] = {}  # when it is due, and how long it waited for that

    def __len__(self) -> int:
        return len(self._due)

    @property
    def waiting(self) -> bool:
        """Something was refused and is not asked for again yet. Looks at everything."""
        return any(due < math.inf for due, _ in self._due.values())

    def due(self, what: Hashable, time: int) -> bool:
        """Whether to ask for it now. It counts as asked for then."""
        due, wait = self._due.get(what, (0, 0))
        if time < due:
            return False
        self._due[what] = math.inf, wait
        return True

    def refused(self, what: Hashable, time: int) -> None:
        """It was asked for, at that time."""
        due, wait = self._due.get(what, (0, 0))
        if due == math.inf:  # else that is known
            wait = min(max(FIRST_WAIT, 2 * wait), MOST_WAIT)
            self._due[what] = time + wait, wait

    def forget(self, these: Iterable[Hashable]) -> None:
        """They are gone."""
        for what in these:
            self._due.pop(what, None)
