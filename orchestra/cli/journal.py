"""``orchestra journal``: prints rows of a journal as lines, JSON, CSV or Parquet, and upgrades old journals."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from ..journal import ActionRow, StateRow, read_journal
from ..journal.export import TABLES, Row, plain, rows, write_csv, write_parquet
from ..journal.schema import upgrade
from ..model.errors import SpecError
from ..model.printable import printable
from ..output.target import check_target
from ..output.times import day_and_time

__all__ = ["journal", "line"]


@attrs.frozen
class Wanted:
    """Which rows."""

    table: str = "actions"
    vm: str | None = None
    tenant: str | None = None
    policy: str | None = None
    kind: str | None = None
    outcome: str | None = None
    since: int | None = None
    until: int | None = None


def journal(
    path: Path,
    wanted: Wanted,
    *,
    last: int | None,
    as_json: bool,
    csv: Path | None,
    parquet: Path | None,
    upgrades: bool,
) -> int:
    """Show, export or upgrade a journal. Returns the exit status.

    Raises:
        OrchestraError: it can't be done; the message says why.
    """
    if upgrades:
        before, after = upgrade(path)
        print(f"{path}: of version {after}" + ("" if before == after else f", and was of {before}"))
        return 0
    if as_json and (csv or parquet):
        raise SpecError("--json can't be combined with --csv or --parquet: they write files")
    if last is not None and last < 1:
        raise SpecError(f"--last {last}: must be 1 or more")
    for option, target in (("--csv", csv), ("--parquet", parquet)):
        if target is not None:
            check_target(option, target)
    with read_journal(path) as reader:
        asked = attrs.asdict(wanted)
        found: Iterable[Row] = rows(reader, asked.pop("table"), **asked)
        if last is not None:
            found = deque(found, last)
        kind = TABLES[wanted.table]
        if csv is not None and parquet is not None:
            found = list(found)
        if csv is not None:
            with open(csv, "w", newline="") as file:
                _report(csv, write_csv(kind, found, file))
        if parquet is not None:
            _report(parquet, write_parquet(kind, found, parquet))
        if as_json:
            _json(wanted.table, found)
        elif csv is None and parquet is None:
            _lines(found)
    return 0


def _report(path: Path, count: int) -> None:
    print(f"orchestra: wrote {count} row{'s' * (count != 1)} to {path}", file=sys.stderr)


def _json(table: str, found: Iterable[Row]) -> None:
    """Write one document row by row while the journal is read: a journal may be larger than memory."""
    print(json.dumps({"table": table})[:-1] + ', "rows": [', end="")
    for i, row in enumerate(found):
        print(",\n " * bool(i) + json.dumps(plain(row)), end="")
    print("]}")


def _lines(found: Iterable[Row]) -> None:
    count = 0
    for row in found:
        print(printable(line(row)))
        count += 1
    if not count:
        print("orchestra: no row of the journal matches", file=sys.stderr)


def line(row: Row) -> str:
    """A row for a person."""
    time = day_and_time(row.time)
    if isinstance(row, ActionRow):
        return f"{time}  {_action(row)}"
    if isinstance(row, StateRow):
        return f"{time}  {row.vm} ({row.tenant}): {row.state}" + (f": {row.reason}" if row.reason else "")
    return f"{time}  {'  '.join(_figures(row))}"


def _action(row: ActionRow) -> str:
    where = row.vm or (f"tenant {row.tenant}" if row.tenant else "host")
    where += "" if row.details.get("vcpu") is None else f" vCPU {row.details['vcpu']}"
    what = row.kind
    details = row.details
    if details.get("limit") is not None:
        what += f" {details['limit']['rate']:g} {details.get('meter', '')}/s"
    elif row.kind == "SetLimit":
        what += f" none on {details.get('meter', '')}"
    elif details.get("share") is not None:
        what += f" {details['share']:.0%}"
    by = f" by {row.policy}" if row.policy else ""
    came = "" if row.outcome == "done" else f" [{row.outcome}{': ' + row.error if row.error else ''}]"
    return f"{where}: {what}{by}{came}" + (f": {row.reason}" if row.reason else "")


def _figures(row: Any) -> Iterator[str]:
    for field in attrs.fields(type(row)):
        value = getattr(row, field.name)
        if field.name in ("session", "time", "generation", "weight") or value is None:
            continue
        if field.name == "vm":
            yield f"{value}:"
        elif isinstance(value, bytes):
            yield f"{field.name}={value.hex()}"
        else:
            yield f"{field.name}={value:.6g}" if isinstance(value, float) else f"{field.name}={value}"
