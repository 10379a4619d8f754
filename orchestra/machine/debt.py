"""What the work of devices on the fleet's thread has cost, and is not paid for yet to the buckets above a VM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..native.core import Charged

__all__ = ["PIECE", "Debt", "Owed"]

PIECE: Final = 64
"""Tokens that are reserved at once, as many as a string instruction's chunk has elements. Tickets are served in order:
one of thousands of tokens would make all that share the bucket wait for it, and these are other VMs."""


class Debt:
    """Pays for the work of one source (a doorbell, or the timers of a VM), in pieces: a piece is reserved once the turn
    of the last has come. For the fleet's thread.

    Parameters:
        buckets: the host's, the fleet's, the tenant's and the VM's, on answers. The slowest counts.
    """

    __slots__ = ("_buckets", "_tickets", "unpaid")

    def __init__(self, buckets: Sequence[Charged]) -> None:
        self._buckets = buckets
        self._tickets: list[tuple[Charged, Any]] = []
        self.unpaid = 0

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return any(bucket.limited for bucket in self._buckets)

    def add(self, tokens: int) -> None:
        self.unpaid += tokens

    def due(self, now: int) -> int:
        """When the turn of the piece comes that waits, by the limits in force now. `now` or less: all is paid."""
        while True:
            turn = max((bucket.turn(ticket) for bucket, ticket in self._tickets), default=now)
            if turn > now:
                return turn
            self.leave()
            if not self.limited:
                self.unpaid = 0
            if not self.unpaid:
                return now
            piece = min(self.unpaid, PIECE)
            self.unpaid -= piece
            for bucket in self._buckets:
                if (ticket := bucket.charge(now, piece)) is not None:
                    self._tickets.append((bucket, ticket))

    def leave(self) -> None:
        """Wait no more: for those who stop in the middle of a wait. What is not paid yet stays owed."""
        for bucket, ticket in self._tickets:
            bucket.leave(ticket)
        self._tickets.clear()


class Owed:
    """What the devices of a VM have not paid for yet when a run ends. The next run pays it: otherwise a guest that
    resets itself would go free. For the fleet's thread."""

    def __init__(self) -> None:
        self._tokens = 0

    def debt(self, buckets: Sequence[Charged]) -> Debt:
        """A debt of a source of the present run. The first one has all that is owed."""
        debt = Debt(buckets)
        debt.add(self._tokens)
        self._tokens = 0
        return debt

    def keep(self, debt: Debt) -> None:
        """That source is served no more."""
        debt.leave()
        self._tokens += debt.unpaid
        debt.unpaid = 0
