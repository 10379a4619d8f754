"""A fleet's actions and states: the last actions are kept here, and a recorder gets all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, Protocol, runtime_checkable

from ..model.actions import Applied, SetIoLimit, SetLimit
from ..model.journalspec import JournalStatistics
from ..policy import Facts
from ..profile import Row

__all__ = ["Recorder", "Records"]

KEPT: Final = 10_000
"""Actions that are kept at most, as `Fleet.actions` promises: a fleet that runs for years must not grow."""


@runtime_checkable
class Recorder(Protocol):
    """Records what a fleet saw and did, for ``open_fleet(journal=...)``: `orchestra.journal.Journal` is one.

    Times are nanoseconds on the fleet's clock. Only `begin` and `end`, which are called on a worker thread, may wait or
    raise: the fleet's own thread calls the others. If a recorder has a method `statistics` that returns
    `JournalStatistics`, the fleet's statistics show them.
    """

    def begin(self, now: int, backend: str, detection: str | None) -> None:
        """A fleet opens. An exception of this method comes out of `open_fleet`."""

    def action(self, applied: Applied) -> None:
        """An action was done, tried or refused. A limit with which a fleet or a VM begins comes as a `SetLimit` or
        `SetIoLimit` that has `given` in its evidence."""

    def state(self, now: int, vm: str, generation: int, tenant: str, state: str, reason: str) -> None: ...
    def aggregate(self, facts: Facts) -> None:
        """What the active VMs did since the last call, including VMs that have ended meanwhile."""

    def profile(self, now: int, vm: str, generation: int, rows: Iterable[Row]) -> None:
        """Bus locks of a VM that were sampled since the last call."""

    def end(self, now: int) -> None:
        """The fleet has ended; no other call follows."""


class Records:
    """Keeps a fleet's last actions, and passes actions and states on to the recorder."""

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        self._last: deque[Applied] = deque(maxlen=KEPT)

    def action(self, applied: Applied) -> Applied:
        self._last.append(applied)
        if self.recorder is not None:
            self.recorder.action(applied)
        return applied

    def given(self, now: int, limit: SetLimit | SetIoLimit) -> None:
        """Record a limit with which a fleet, a tenant or a VM begins. It is no action, so `actions` does not have
        it."""
        if self.recorder is not None:
            self.recorder.action(Applied(time=now, action=limit))

    def actions(self) -> tuple[Applied, ...]:
        """The last actions, oldest first."""
        return tuple(self._last)

    def statistics(self) -> JournalStatistics | None:
        """The recorder's statistics; None: it has none."""
        statistics = getattr(self.recorder, "statistics", None)
        told = None if statistics is None else statistics()
        return told if isinstance(told, JournalStatistics) else None

    def state(self, now: int, vm: str, generation: int, tenant: str, state: str, reason: str) -> None:
        if self.recorder is not None:
            self.recorder.state(now, vm, generation, tenant, state, reason)
