"""Makes rows of what SQLite gives out, and checks their types.

SQLite keeps any type in any column, and so does what is left of a damaged file. A value of a wrong type is refused
here, where the error can still name the file.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Final, Generic, TypeVar

__all__ = ["LAST", "UNREADABLE", "Maker", "mapping"]

T = TypeVar("T")

UNREADABLE: Final = (sqlite3.Error, ValueError, TypeError, OverflowError)
"""The errors that a damaged file can lead to: SQLite's own, and those of values that are not what they should be."""

LAST: Final = 253_402_300_799_000_000_000
"""Nanoseconds since the epoch: the end of the year 9999, the last one that Python's datetime can write."""

_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "int": (int,),
    "int | None": (int, NoneType),
    "float": (float, int),
    "float | None": (float, int, NoneType),
    "str": (str,),
    "str | None": (str, NoneType),
    "bytes": (bytes,),
    "Mapping[str, Any]": (str,),
    "Mapping[str, Any] | None": (str, NoneType),
}


class Maker(Generic[T]):
    """Makes rows of one class, and refuses values that such a row can't have.

    Calling it raises `ValueError` for a value of a wrong type, or for a time or an interval out of its range.
    """

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        # The annotations and not attrs' types: `attrs.resolve_types` changes the latter in place.
        self._names: dict[str, str] = kind.__annotations__
        self._known: set[tuple[type, ...]] = set()
        self._interval = next((i for i, name in enumerate(self._names) if name == "interval"), None)

    def __call__(self, row: Sequence[Any]) -> T:
        values = tuple(row)
        types = tuple(map(type, values))
        if types not in self._known:  # few combinations of types occur, and a check costs more than this look
            self._check(values)
            self._known.add(types)
        if not 0 <= values[1] <= LAST:
            raise ValueError(f"time={values[1]!r}")
        if self._interval is not None and not 0 < values[self._interval] < math.inf:
            raise ValueError(f"interval={values[self._interval]!r}")
        return self._made(values)

    def _check(self, values: Sequence[Any]) -> None:
        for (name, annotation), value in zip(self._names.items(), values, strict=True):
            if not isinstance(value, _TYPES[annotation]):
                raise ValueError(f"{name}={value!r:.80}")

    def _made(self, values: tuple[Any, ...]) -> T:
        return self._kind(*values)


def mapping(text: str) -> Mapping[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text!r:.80} is no object")
    return value
