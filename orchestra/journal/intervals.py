"""Joins the rows of intervals that were cut short. The end of a fleet cuts its last interval at any length, and the
counts of a very short interval say nothing about a rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import attrs

from .reader import Aggregate

__all__ = ["SHORT", "join", "whole"]

SHORT: Final = 0.1
"""Part of the interval before. A shorter interval is added to the one before it."""


PARTS: Final = ("by_reason", "throttled_by")
KEYS: Final = ("session", "time", "interval", "vm", "generation", "tenant", "weight", "vcpus", *PARTS)
SUMS: Final = tuple(field.name for field in attrs.fields(Aggregate) if field.name not in KEYS)


def join(one: Aggregate, other: Aggregate) -> Aggregate:
    """What a VM did in two intervals together. `other` is the later one."""
    sums: dict[str, Any] = {name: _sum(getattr(one, name), getattr(other, name)) for name in SUMS}
    for part in PARTS:
        known = [getattr(row, part) for row in (one, other) if getattr(row, part) is not None]
        names = {name: sum(each.get(name, 0) for each in known) for each in known for name in each}
        sums[part] = names if known else None
    return attrs.evolve(other, interval=one.interval + other.interval, **sums)


def _sum(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other


def whole(rows: Iterable[Aggregate]) -> Iterator[Aggregate]:
    """One VM's rows, in the order of their time. Short intervals are added to the ones before them."""
    before: Aggregate | None = None
    for row in rows:
        if before is not None and _is_rest(before, row):
            row = join(before, row)
        elif before is not None:
            yield before
        before = row
    if before is not None:
        yield before


def _is_rest(before: Aggregate, row: Aggregate) -> bool:
    of_one = (before.session, before.generation) == (row.session, row.generation)
    between = (row.time - before.time) / 1e9 - row.interval
    return of_one and row.interval < SHORT * before.interval and between < SHORT * before.interval
