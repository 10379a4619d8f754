"""A journal as data: its file, how long rows are kept, and the statistics of the writer."""

from __future__ import annotations

from typing import Any

import attrs

from .checks import fail, whole
from .decoding import BAD, Reading
from .errors import SpecError
from .mistakes import At
from .spec import GiB, MiB

__all__ = ["JournalSpec", "JournalStatistics"]


@attrs.frozen
class JournalSpec:
    """A journal as data: the fleet that is opened with it makes the `orchestra.journal.Journal`, and closes it.

    As data, in a file or a document, the file's name alone will do.

    Parameters:
        path: the file; made if it is not there, continued if it is.
        keep_days: older rows are removed.
        keep_bytes: beyond this the oldest rows are removed. The file and its write-ahead log together stay below it,
            but for what is just being written, or if a reader holds the log.

    Raises:
        SpecError: a bound that can't be.
    """

    path: str
    keep_days: float = 30.0
    keep_bytes: int = 1 * GiB

    @classmethod
    def from_data(cls, data: object, reading: Reading, at: At) -> Any:
        """For the codec."""
        given = reading.table({"path": data} if isinstance(data, str) else data, at)
        return BAD if given is BAD else reading.build(cls, given, at)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise SpecError(f"path={self.path!r}: must be the name of a file")
        days = self.keep_days
        if isinstance(days, bool) or not isinstance(days, int | float):
            raise fail("keep_days", days, "must be a number of days")
        if not 0 < days <= 36500:
            raise fail("keep_days", days, "must be more than 0 and at most 36500")
        whole("keep_bytes", self.keep_bytes, MiB, 1 << 46, " bytes")


@attrs.frozen
class JournalStatistics:
    """How the journal keeps up.

    Attributes:
        written, waiting: numbers of rows.
        dropped: how many rows are lost: too many waited, SQLite refused them, or the disk had no room when the fleet
            ended.
        error: the present error. None: there is none.
    """

    written: int
    waiting: int
    dropped: int
    error: str | None
