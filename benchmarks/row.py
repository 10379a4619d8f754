"""One line of the table, and the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

__all__ = ["Options", "Row", "table"]


@attrs.frozen
class Options:
    """How to run.

    Attributes:
        quick: short runs and few VMs: shows that it works, and nothing about speed.
        floor: the compiled floor.c.
        build: a directory for what else is compiled.
    """

    quick: bool
    floor: Path
    build: Path

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@attrs.frozen(kw_only=True)
class Row:
    """What was measured, against what.

    Attributes:
        ok: within the bound; None if no bound is set for it.
        ratio: measured / floor, where there is a floor in the same unit.
        note: what a reader must know to read the figure right.
        details: all figures, for the JSON file.
    """

    what: str
    measured: str
    floor: str = ""
    ratio: float | None = None
    bound: str
    ok: bool | None
    note: str = ""
    details: dict[str, Any] = attrs.field(factory=dict)

    def cells(self) -> tuple[str, ...]:
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        return self.what, self.measured, self.floor, ratio, self.bound, {True: "yes", False: "NO", None: ""}[self.ok]


_HEAD = ("what", "measured", "floor", "ratio", "bound", "ok")


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table that is also readable as it is, with the notes below."""
    rows = list(rows)
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    lines: list[Sequence[str]] = [_HEAD]
    for row in rows:
        cells = list(row.cells())
        if row.note:
            cells[0] += f" [{notes.index(row.note) + 1}]"
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = [f"| {' | '.join(line)} |" for line in padded]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    if notes:
        text += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(text)
