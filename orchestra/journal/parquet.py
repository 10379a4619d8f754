"""The only module that imports pyarrow: a table of the journal as a Parquet file."""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from ..model.errors import OrchestraError
from ..model.extras import install

try:
    # mypy may well be run where this extra is not installed.
    import pyarrow  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from pyarrow import parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError as error:
    raise OrchestraError(f"Parquet needs pyarrow ({error}): {install('parquet')}") from None

__all__ = ["write"]

BATCH: Final = 50_000
"""Rows that are in memory at once, and of one row group of the file."""


def write(kind: type[Any], rows: Iterable[Any], path: Path) -> int:
    """Write rows of an attrs class as a Parquet file. Returns how many rows there were.

    Times become timestamps in UTC, in microseconds. Evidence and details become JSON text.

    Raises:
        OSError: the file can't be written.
    """
    schema = _schema(kind)
    left = iter(rows)
    count = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(itertools.islice(left, BATCH)):
            columns = {name: [_value(name, getattr(row, name)) for row in batch] for name in schema.names}
            writer.write_table(pyarrow.Table.from_pydict(columns, schema))
            count += len(batch)
    return count


def _schema(kind: type[Any]) -> Any:
    attrs.resolve_types(kind)
    fields = []
    for field in attrs.fields(kind):
        known = [one for one in typing.get_args(field.type) if one is not type(None)] or [field.type]
        whole = pyarrow.uint64() if field.name in ("rip", "space") else pyarrow.int64()
        types = {int: whole, float: pyarrow.float64(), str: pyarrow.string(), bytes: pyarrow.binary()}
        type_ = types.get(known[0], pyarrow.string())
        fields.append((field.name, pyarrow.timestamp("us", "UTC") if field.name == "time" else type_))
    return pyarrow.schema(fields)


def _value(name: str, value: Any) -> Any:
    if name == "time":
        return value // 1000  # few readers of Parquet accept nanoseconds
    return json.dumps(value) if isinstance(value, Mapping | list) else value
