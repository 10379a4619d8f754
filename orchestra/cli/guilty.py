"""``orchestra guilty``: which instructions of a VM lock the bus, by a fleet's journal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..journal import Aggregate, JournalReader, read_journal
from ..model.errors import OrchestraError, SpecError, UnknownVm
from ..model.printable import printable
from ..output.times import duration
from ..profile import Profile, Symbols, disassembly, from_rows, make_profile
from ..profile.folded import folded

__all__ = ["NotSeen", "guilty", "lines", "profile_of"]

RINGS = {0: "kernel", 3: "user"}
NESTED = "nested guest's"
MOST = 20


class NotSeen(OrchestraError):
    """The fleet did not see the VM's bus locks, or the journal has no row about the VM, so its locks are not known."""


def profile_of(journal: JournalReader, vm: str, symbols: Sequence[Symbols] = (), last: float | None = None) -> Profile:
    """What a journal has of a VM, of all its generations.

    Parameters:
        last: only the last so many seconds of the journal.

    Raises:
        UnknownVm: the journal knows of no such VM.
        NotSeen: its bus locks were not seen.
    """
    since = _since(journal, last)
    rows = [
        (row.rip, row.mode, row.cpl, row.space, row.samples, row.weight, row.code)
        for row in journal.profiles(vm=vm, since=since)
    ]
    if not rows and vm not in journal.vms():
        raise UnknownVm(f"vm={vm!r}: the journal knows none of that name; there are: {journal.some_vms()}")
    counts = [row.bus_locks for row in journal.aggregates(vm=vm, since=since)]
    counted = [count for count in counts if count is not None]
    if not (rows or counted):
        raise NotSeen(f"vm={vm!r}: {_unseen(journal, vm, last, intervals=bool(counts))}")
    return make_profile(vm, from_rows(rows), symbols=symbols, bus_locks=sum(counted) if counted else None)


def _since(journal: JournalReader, last: float | None) -> int | None:
    span = journal.span()
    return None if last is None or span is None else span[1] - round(last * 1e9)


def _unseen(journal: JournalReader, vm: str, last: float | None, *, intervals: bool) -> str:
    """Says why nothing is known of the VM's bus locks."""
    query = (
        "SELECT count(*) FROM sessions WHERE detection IS NOT NULL AND id IN (SELECT session FROM states WHERE vm = ?)"
    )
    if intervals or not journal.query(query, (vm,))[0][0]:
        return (
            "its bus locks were not seen: the fleet ran on a host or a backend that reports none, so whether it made "
            "any is not known; `orchestra doctor` says what can see them here"
        )
    return f"the journal has nothing of it in its last {last:g} s" if last else "the journal has no interval of it"


def _blind(row: Aggregate) -> bool:
    return row.bus_locks is None


def lines(profile: Profile) -> Iterator[str]:
    """The profile as a table for a person."""
    counted = "" if profile.bus_locks is None else f"{profile.bus_locks:,} bus locks, "
    if not profile.instructions:
        yield f"{profile.vm}: {counted}none of them sampled"
        return
    yield f"{profile.vm}: {counted}{profile.samples:,} sampled, which stand for {profile.weight:,}"
    yield ""
    shown = profile.instructions[:MOST]
    cells = [("share", "locks", "ring", "bits", "space", "where", "instruction")]
    for i in shown:
        what = i.text or "?"
        if not i.exact:
            what += "   (near it: the bytes there do not tell which)" if i.text else "   (RIP as it was reported)"
        where = i.place if i.symbol is None else f"{i.place} ({i.address:#x})"
        ring, bits = RINGS.get(i.cpl, str(i.cpl)), str(i.mode or "?")
        ring = f"{NESTED} {ring}" if i.nested else ring
        cells.append((f"{i.share:.1%}", f"{i.weight:,}", ring, bits, f"{i.space:#x}" if i.space else "-", where, what))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        parts = [
            cell.rjust(width) if n < 2 else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(parts).rstrip()
    if len(profile.instructions) > len(shown):
        yield f"and {len(profile.instructions) - len(shown)} more: --json has them all"
    if profile.unplaced:
        yield f"{profile.unplaced:,} more locks could not be put to an instruction"
    if not disassembly.available():
        yield f"No disassembly: `{disassembly.INSTALL}`"


def guilty(
    vm: str,
    journal: Path,
    *,
    symbols: Sequence[Path] = (),
    slide: int = 0,
    last: float | None = None,
    as_json: bool = False,
    as_folded: bool = False,
) -> int:
    """Show the profile. Returns the exit status: 1 if the VM's bus locks were not seen.

    Raises:
        OrchestraError: it can't be done; the message says why.
    """
    if as_json and as_folded:
        raise SpecError("--json can't be combined with --folded")
    tables = [Symbols.load(path, slide) for path in symbols]
    with read_journal(journal) as reader:
        profile = profile_of(reader, vm, tables, last)
        unseen = sum(row.interval for row in reader.aggregates(vm=vm, since=_since(reader, last)) if _blind(row))
    if unseen and not as_json:
        about = f"orchestra: for {duration(unseen)} of that time the bus locks of {printable(vm)} were not seen"
        print(about, file=sys.stderr)
    if as_json:
        print(json.dumps({**profile.as_dict(), "unseen_seconds": unseen}, indent=2))
    else:
        for line in folded(profile) if as_folded else lines(profile):
            print(printable(line))
    return 0
