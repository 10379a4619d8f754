"""What is kept of a fleet's actions and states: the last ones here, all of them wherever a recorder puts them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, Protocol, runtime_checkable

import attrs

from ..model.actions import Applied, SetLimit
from ..policy import Facts
from ..profile import Row

__all__ = ["JournalStatistics", "Recorder", "Records"]

KEPT: Final = 10_000


@attrs.frozen
class JournalStatistics:
    """How the journal keeps up.

    Attributes:
        written, waiting: rows.
        dropped: rows that are lost: more waited than may, they could not be written, or (when the fleet is gone) the
            disk had no room for them.
        error: what goes wrong at present; None: nothing.
    """

    written: int
    waiting: int
    dropped: int
    error: str | None


@runtime_checkable
class Recorder(Protocol):
    """Somebody who writes down what a fleet saw and did, for ``open_fleet(journal=...)``: `orchestra.journal.Journal`.

    Times are nanoseconds on the fleet's clock. Nothing but `begin` and `end` may wait or raise: the fleet's own thread
    calls. `begin` and `end` are called on a worker thread. One that also has `statistics`, which returns
    `JournalStatistics`, shows in those of its fleet.
    """

    def begin(self, now: int, backend: str, detection: str | None) -> None:
        """A fleet opens. What it raises comes out of `open_fleet`."""

    def action(self, applied: Applied) -> None:
        """What was done, or tried. A limit with which a fleet or a VM begins comes as a `SetLimit` that has `given` in
        its evidence."""

    def state(self, now: int, vm: str, launch: int, tenant: str, state: str, reason: str) -> None: ...
    def aggregate(self, facts: Facts) -> None:
        """What the VMs that did something did since the last time, those that have ended meanwhile included."""

    def profile(self, now: int, vm: str, launch: int, rows: Iterable[Row]) -> None:
        """Bus locks of a VM that were sampled since the last time."""

    def end(self, now: int) -> None:
        """The fleet is gone; nothing comes any more."""


class Records:
    """Where a fleet's actions and states go."""

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        self._last: deque[Applied] = deque(maxlen=KEPT)

    def action(self, applied: Applied) -> Applied:
        self._last.append(applied)
        if self.recorder is not None:
            self.recorder.action(applied)
        return applied

    def given(self, now: int, limit: SetLimit) -> None:
        """A limit that is in force from a beginning on. It is written down like one that is set, but nobody did it."""
        if self.recorder is not None:
            self.recorder.action(Applied(time=now, action=limit))

    def actions(self) -> tuple[Applied, ...]:
        """The last of them, oldest first."""
        return tuple(self._last)

    def statistics(self) -> JournalStatistics | None:
        """Of the recorder, if it tells."""
        statistics = getattr(self.recorder, "statistics", None)
        told = None if statistics is None else statistics()
        return told if isinstance(told, JournalStatistics) else None

    def state(self, now: int, vm: str, launch: int, tenant: str, state: str, reason: str) -> None:
        if self.recorder is not None:
            self.recorder.state(now, vm, launch, tenant, state, reason)
