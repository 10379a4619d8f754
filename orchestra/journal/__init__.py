"""The journal: what was seen and done, in one SQLite file, so that "why is my VM slow?" has an answer.

async with orchestra.open_fleet(journal=Journal("fleet.db"), ...) as fleet: ...

with read_journal("fleet.db") as journal:
    for row in journal.actions(vm="web-1"): ...

It may import the profile, the machine's statistics and the words.
The one to copy: `coverage.py`.
"""

from __future__ import annotations

from .reader import ActionRow, Aggregate, HostRow, JournalReader, StateRow, VcpuRow, read_journal
from .victims import suspects
from .writer import Journal, JournalStatistics

__all__ = [
    "ActionRow",
    "Aggregate",
    "HostRow",
    "Journal",
    "JournalReader",
    "JournalStatistics",
    "StateRow",
    "VcpuRow",
    "read_journal",
    "suspects",
]
