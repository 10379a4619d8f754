"""The samples of a VM, summed over its vCPUs and restarts, and their form in the journal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

import attrs

from ..native.core import Sampled

__all__ = ["Place", "Row", "Samples", "Where", "from_rows"]

MOST: Final = 4096
"""Places kept for a VM. Without a bound, a guest that writes new code all the time would need ever more memory."""

Where: TypeAlias = Literal["on", "behind", "either"]
"""Where RIP is when a lock is reported: on the instruction (AMD), behind it (Intel), or that is not known."""
_WHERE: Final[tuple[Where, ...]] = ("on", "behind", "either")

Row: TypeAlias = tuple[int, int, int, int, int, int, bytes]
"""rip, mode, cpl, space, samples, weight, code: as the journal's table `profiles` has them.

`code` begins with two bytes of its own: how many of the others are before `rip`, and where `rip` is (0: on the
instruction, 1: behind it, 2: either; 4 more: in a nested guest).
"""
_NESTED: Final = 4


@attrs.frozen
class Place:
    """Where bus locks were reported: the key of a table of samples."""

    rip: int
    mode: int
    cpl: int
    space: int
    where: Where
    nested: bool = False


@attrs.define(eq=False)
class Sum:
    """The samples of one place. `code` has `before` bytes that come before `Place.rip`."""

    samples: int = 0
    weight: int = 0
    error: int = 0
    before: int = 0
    code: bytes = b""


class Samples:
    """Adds up what the vCPUs' tables held when they were emptied."""

    def __init__(self) -> None:
        self.places: dict[Place, Sum] = {}
        self.unplaced = 0
        self._new: dict[Place, Sum] = {}

    def add(self, sampled: Iterable[Sampled], lost: int, detection: str | None) -> None:
        """`detection`: how this VM's locks are reported. `lost`: weight without a place."""
        usual: Where = {"fault-like": "on", "trap-like": "behind"}.get(detection or "", "either")  # type: ignore[assignment]
        self.unplaced += lost
        for s in sampled:
            place = Place(s.rip, s.mode, s.cpl, s.space, "either" if s.rode else usual, s.nested)
            for sums in (self.places, self._new):
                put(sums, place, s.samples, s.weight, s.error, s.before, s.code)
        for sums in (self.places, self._new):
            self._prune(sums)

    def _prune(self, sums: dict[Place, Sum]) -> None:
        if len(sums) <= 2 * MOST:
            return
        lightest = sorted(sums, key=lambda place: sums[place].weight)
        for place in lightest[: len(sums) - MOST]:
            weight = sums.pop(place).weight
            if sums is self.places:
                self.unplaced += weight

    def rows(self) -> list[Row]:
        """What is new since this was asked last."""
        new, self._new = self._new, {}
        return [
            (p.rip, p.mode, p.cpl, p.space, s.samples, s.weight, bytes((s.before, _mark(p))) + s.code)
            for p, s in new.items()
        ]


def _mark(place: Place) -> int:
    return _WHERE.index(place.where) + (_NESTED if place.nested else 0)


def put(
    sums: dict[Place, Sum], place: Place, samples: int, weight: int, error: int = 0, before: int = 0, code: bytes = b""
) -> None:
    """Add samples to a place. The code is the newest that is known: it may have been written anew."""
    found = sums.get(place)
    if found is None:
        found = sums[place] = Sum()
    found.samples += samples
    found.weight += weight
    found.error += error
    if code:
        found.before, found.code = before, code


def from_rows(rows: Iterable[Row]) -> dict[Place, Sum]:
    """The sums of a journal's rows."""
    sums: dict[Place, Sum] = {}
    for rip, mode, cpl, space, samples, weight, blob in rows:
        nested, where = divmod(blob[1], _NESTED) if len(blob) >= 2 else (0, len(_WHERE))
        known = nested <= 1 and where < len(_WHERE)
        place = Place(rip, mode, cpl, space, _WHERE[where] if known else "either", known and nested == 1)
        put(sums, place, samples, weight, 0, blob[0] if known else 0, blob[2:] if known else b"")
    return sums
