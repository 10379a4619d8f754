"""The limits that no policy set: those with which a fleet, its tenants and its VMs began, and those that callers set.
In a replay they are in force as they were, except for those that the rules of the replay name."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import Rules
from ..journal import ActionRow, JournalReader
from ..journal.schema import JournalError
from ..model.actions import SetLimit
from ..model.spec import Meter

__all__ = ["Given"]


class Given:
    """Reads the limits of one fleet, as time goes on.

    Attributes:
        knows_host: a limit of the host on bus locks was among the limits so far.
    """

    def __init__(self, journal: JournalReader, session: int, rules: Rules) -> None:
        self.knows_host = False
        self._rules = rules
        self._rows = journal.limits_set(session)
        self._next = next(self._rows, None)

    def until(self, time: int) -> Iterator[SetLimit]:
        """The limits that came into force since the last call, up to `time` (nanoseconds since the epoch)."""
        while self._next is not None and self._next.time <= time:
            row, self._next = self._next, next(self._rows, None)
            if (limit := self._limit(row)) is not None:
                yield limit

    def _limit(self, row: ActionRow) -> SetLimit | None:
        action = row.action
        if not isinstance(action, SetLimit):
            raise JournalError(f"a limit in the journal can't be: {dict(row.details)}")
        if action.vcpu is not None:
            return None  # the model takes all vCPUs of a VM as alike
        if row.given == "host_budget":
            return None  # this journal does not have what other processes used of the budget
        if action.vm is None and action.tenant is None:
            self.knows_host = self.knows_host or action.meter is Meter.BUS_LOCKS
            if getattr(self._rules, action.meter.field) is not None:
                return None
        elif action.tenant is not None and action.tenant in self._rules.tenants:
            return None
        return action
