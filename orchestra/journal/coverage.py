"""Which part of a time the intervals of a journal cover. Of the rest nothing is known, so nothing may be said of it."""

from __future__ import annotations

from typing import Final

import attrs

from .reader import HostRow, JournalReader

__all__ = ["Coverage", "cover"]

SLACK: Final = 1_000_000
"""Nanoseconds that may lie between an interval and the next one: the journal keeps intervals in seconds, rounded."""


@attrs.frozen
class Coverage:
    """The whole intervals that cover a time. Times are nanoseconds since the epoch.

    Attributes:
        asked: begin and end of the time that was asked for.
        hosts: one row for each interval.
        gaps: the parts of that time that no interval covers.
    """

    asked: tuple[int, int]
    hosts: tuple[HostRow, ...]
    gaps: tuple[tuple[int, int], ...]

    @property
    def begin(self) -> int:
        return begin_of(self.hosts[0]) if self.hosts else self.asked[0]

    @property
    def end(self) -> int:
        return self.hosts[-1].time if self.hosts else self.asked[0]

    def seconds(self, begin: int, end: int) -> float:
        """How many seconds of the intervals lie between two times."""
        return sum(max(0, min(end, row.time) - max(begin, begin_of(row))) for row in self.hosts) / 1e9


def begin_of(row: HostRow) -> int:
    return row.time - round(row.interval * 1e9)


def cover(journal: JournalReader, session: int, begin: int, end: int) -> Coverage:
    """The intervals of one fleet that cover a time. Intervals that cross an end of the time are kept whole.

    Parameters:
        session: the fleet's.
        begin, end: nanoseconds since the epoch.

    Raises:
        JournalError: the journal can't be read.
    """
    removed = journal.removed()
    rows = [row for row in journal.hosts(since=max(begin, removed) + 1, until=end) if row.session == session]
    if (last := journal.interval_after(session, max(end, removed))) is not None and begin_of(last) + SLACK < end:
        rows.append(last)
    gaps, at = [], begin
    for row in rows:
        if begin_of(row) - at > SLACK:
            gaps.append((at, begin_of(row)))
        at = row.time
    if end - at > SLACK:
        gaps.append((at, end))
    return Coverage((begin, end), tuple(rows), tuple(gaps))
