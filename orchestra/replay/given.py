"""The limits that no policy had set: those that a fleet, its tenants and its VMs began with, and those that callers
set. They are there in a replay as they were, but for those that its rules name."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import Rules
from ..journal import ActionRow, JournalReader
from ..journal.schema import JournalError
from ..model.actions import SetLimit
from ..model.spec import Meter

__all__ = ["Given"]


class Given:
    """Reads along in the limits of one fleet.

    Attributes:
        knows_host: one of them, so far, was a limit of the host on bus locks.
    """

    def __init__(self, journal: JournalReader, session: int, rules: Rules) -> None:
        self.knows_host = False
        self._rules = rules
        self._rows = journal.limits_set(session)
        self._next = next(self._rows, None)

    def until(self, time: int) -> Iterator[SetLimit]:
        """Those that came into force by then, since this was asked last."""
        while self._next is not None and self._next.time <= time:
            row, self._next = self._next, next(self._rows, None)
            if (limit := self._limit(row)) is not None:
                yield limit

    def _limit(self, row: ActionRow) -> SetLimit | None:
        action = row.action
        if not isinstance(action, SetLimit):
            raise JournalError(f"a limit in the journal can't be: {dict(row.details)}")
        if action.vcpu is not None:
            return None  # a VM's vCPUs are taken as alike
        if action.vm is None and action.tenant is None:
            self.knows_host = self.knows_host or action.meter is Meter.BUS_LOCKS
            if getattr(self._rules, action.meter.field) is not None:
                return None
        elif action.tenant is not None and action.tenant in self._rules.tenants:
            return None
        return action
