"""A journal's tables as plain rows: filtered, for a person, JSON, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO, TypeAlias, get_args

import attrs

from ..model.actions import Action
from ..model.codec import encode
from ..model.errors import SpecError
from .reader import ActionRow, Aggregate, HostRow, JournalReader, ProfileRow, StateRow, VcpuRow

__all__ = ["KINDS", "TABLES", "iso", "plain", "rows", "write_csv"]

Row: TypeAlias = ActionRow | StateRow | Aggregate | VcpuRow | HostRow | ProfileRow

TABLES: Final[Mapping[str, type[Any]]] = {
    "actions": ActionRow,
    "states": StateRow,
    "aggregates": Aggregate,
    "vcpus": VcpuRow,
    "hosts": HostRow,
    "profiles": ProfileRow,
}
FILTERS: Final[Mapping[str, tuple[str, ...]]] = {
    "actions": ("vm", "tenant", "policy", "kind", "outcome"),
    "states": ("vm",),
    "aggregates": ("vm", "tenant"),
    "vcpus": ("vm",),
    "hosts": (),
    "profiles": ("vm",),
}
KINDS: Final = (*(kind.__name__ for kind in get_args(Action)), "PolicyError")
OUTCOMES: Final = ("done", "dry-run", "refused", "failed")


def rows(
    journal: JournalReader,
    table: str = "actions",
    *,
    since: int | None = None,
    until: int | None = None,
    **wanted: str | None,
) -> Iterator[Row]:
    """The rows of a table that fit, in the order of their time.

    Parameters:
        since, until: nanoseconds since the epoch; both ends are included.
        wanted: filters by vm, tenant, policy, kind and outcome, as far as the table has these columns.

    Raises:
        SpecError: there is no such table, or it has no such filter.
        JournalError: the journal can't be read.
    """
    if table not in TABLES:
        raise SpecError(f"table={table!r}: must be one of {', '.join(TABLES)}")
    given = {name: value for name, value in wanted.items() if value is not None}
    for name in given:
        if name not in FILTERS[table]:
            can = ", ".join(FILTERS[table]) or "time only"
            raise SpecError(f"{name}={given[name]!r}: the table {table} can be filtered by {can}")
    if "kind" in given:
        given["kind"] = _one_of("kind", given["kind"], KINDS)
    if "outcome" in given:
        given["outcome"] = _one_of("outcome", given["outcome"], OUTCOMES)
    # The reader's methods are named after the tables, and TABLES was checked above: no other attribute can be reached.
    read: Callable[..., Iterator[Row]] = getattr(journal, table)
    return read(since=since, until=until, **given)


def _one_of(field: str, value: str, known: Iterable[str]) -> str:
    for one in known:
        if one.lower() == value.lower():
            return one
    raise SpecError(f"{field}={value!r}: must be one of {', '.join(known)}")


def iso(time: int) -> str:
    """A time in nanoseconds since the epoch as ISO 8601 in UTC, to the nanosecond."""
    seconds, rest = divmod(time, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def plain(row: Row, *, flat: bool = False) -> dict[str, Any]:
    """A row as data for JSON: its time is in ISO 8601 in UTC, its code in hexadecimal digits.

    Parameters:
        flat: evidence and details become JSON text, for tables.
    """
    made: dict[str, Any] = encode(row)
    made["time"] = iso(row.time)
    if isinstance(row, ProfileRow):
        made["code"] = row.code.hex()
    for name, value in made.items():
        if flat and isinstance(value, Mapping | list):
            made[name] = json.dumps(value)
    return made


def write_csv(kind: type[Any], rows: Iterable[Row], file: TextIO) -> int:
    """Write rows of a class as CSV, with a line of names above. Returns how many rows there were.

    A value that is not known becomes an empty field.
    """
    writer = csv.DictWriter(file, [field.name for field in attrs.fields(kind)], lineterminator="\n")
    writer.writeheader()
    count = 0
    for row in rows:
        writer.writerow(plain(row, flat=True))
        count += 1
    return count


def write_parquet(kind: type[Any], rows: Iterable[Row], path: Path) -> int:
    """Write rows of a class as a Parquet file, a batch at a time. Returns how many rows there were.

    Raises:
        OrchestraError: pyarrow is missing. The message has the command that installs it.
        OSError: the file can't be written.
    """
    from .parquet import write

    return write(kind, rows, path)
