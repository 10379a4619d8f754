"""What needs rich: the demo's live table and the doctor's report. The only module that imports it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..actions import Applied
from ..doctor import Finding, Report
from ..fleet import Fleet
from ..spec import Meter
from . import words
from .account import Act, Result, Row, Sample
from .numbers import shown
from .plain import cells
from .story import EVENTS, Plan

__all__ = ["LiveTable", "show_report"]

AROUND: int = 8
"""Lines of the live picture that are no VM's."""
_BLANK = Row("vm", "tenant", True, "running", True, 0, 0.0, 0, 0.0, 0.0, 0.5, 1.0)
STATES = {"running": "green", "paused": "yellow", "failed": "red", "stopped": "dim"}


class LiveTable:
    """An `Audience` with a table that stays at the bottom of the terminal, under what was said so far."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False)
        # No thread of rich's own: frames are drawn as samples come, and only then.
        self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop", redirect_stderr=False)
        self._act: Act | None = None
        self._seconds = 0.0
        self._noun = ""
        self._said: list[RenderableType] = []

    def __enter__(self) -> LiveTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def opened(self, plan: Plan, fleet: Fleet, meter: Meter) -> None:
        self._noun, self._seconds = EVENTS[meter], plan.seconds
        for line in words.opening(plan, fleet, meter):
            self.console.print(Text(line))
        # Rich loads and works out things when they are first needed: better now than while guests run.
        self.console.render_lines(self._picture(Sample(0.0, 0, (_BLANK,))))
        self._live.start()

    def act(self, act: Act, time: float) -> None:
        self._act = act
        heading = Text(f"\nAct {act.number}, {act.title}. ", style="bold").append(act.text, style="not bold")
        self._said.append(heading)

    def applied(self, applied: Applied, time: float) -> None:
        self._said.append(Text(words.action_line(applied, time), style="red" if applied.error else "yellow"))

    def sample(self, sample: Sample) -> None:
        # What was said since the last frame goes out with this one: each print would draw the whole picture again.
        self._live.update(self._picture(sample), refresh=not self._said)
        self._flush()

    def _flush(self) -> None:
        if self._said:
            said, self._said = self._said, []
            self.console.print(Group(*said))

    def ending(self, result: Result) -> None:
        self._flush()
        self._live.stop()
        console = self.console
        console.print(Text("\nWhat happened" + ("" if result.complete else ", up to here"), style="bold"))
        above, below, *rows = cells(result)
        table = _table()
        for i, names in enumerate(zip(above, below, strict=True)):
            table.add_column("\n".join(names), justify="right" if i else "left", no_wrap=True)
        for vm, row in zip(result.vms, rows, strict=True):
            table.add_row(*row, style="bold" if vm.noisy else "")
        console.print(table)
        if result.actions:
            console.print(Text("\nWhat was done, when and why", style="bold"))
            for applied in result.actions:
                console.print(Text(words.action_line(applied, result.time(applied))))
        console.print()
        for line in words.verdict(result):
            console.print(Text(line, style="bold"))

    def _picture(self, sample: Sample) -> RenderableType:
        act = "" if self._act is None else f"act {self._act.number}, {self._act.title}"
        title = Text(f"{sample.time:.1f} of {self._seconds:g} s, {act}", style="bold")
        room = max(self.console.size.height - AROUND, 3)
        rows = _fitting(sample.rows, room)
        table = _table()
        table.add_column("VM", no_wrap=True)
        table.add_column("tenant", no_wrap=True)
        for name in (f"{self._noun}/s", "budget/s", "throttled", "work/s"):
            table.add_column(name, justify="right", no_wrap=True, min_width=8)
        table.add_column("state", no_wrap=True, min_width=9)
        for row in rows:
            table.add_row(*_live_cells(row))
        left_out = len(sample.rows) - len(rows)
        more = [Text(f"... and {left_out} more", style="dim")] if left_out else []
        return Padding(Group(title, table, *more), (1, 0, 0, 0))


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


def _fitting(rows: Sequence[Row], room: int) -> list[Row]:
    """As many rows as there is room for: of the quiet VMs, only the first ones, of the noisy ones half the room."""
    if len(rows) <= room:
        return list(rows)
    noisy = [row for row in rows if row.noisy][: max(room // 2, 1)]
    return [row for row in rows if not row.noisy][: room - len(noisy)] + noisy


def _live_cells(row: Row) -> tuple[RenderableType, ...]:
    style = "bold" if row.noisy else ""
    share = row.throttled_share
    state = "throttled" if share > 0.01 and row.state == "running" else row.state
    return (
        Text(row.name, style=style),
        Text(row.tenant),
        Text(shown(row.rate), style="red" if row.noisy and row.budget is None else style),
        Text("-" if row.budget is None else shown(row.budget)),
        Text("-" if share < 0.005 else f"{share:.0%}", style="yellow" if share >= 0.005 else "dim"),
        Text(shown(row.work_rate), style="cyan" if not row.noisy else ""),
        Text(state, style="yellow" if state == "throttled" else STATES.get(state, "")),
    )


MARKS = {"problem": ("problem", "bold red"), "note": ("note", "yellow"), "ok": ("ok", "green")}


def show_report(report: Report, capabilities: bool, console: Console | None = None) -> None:
    """The doctor's findings, problems first; and KVM's capabilities by the kernel's names."""
    console = console or Console(file=sys.stdout, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("looked at", overflow="fold", max_width=26)
    table.add_column("found, and what follows", overflow="fold")
    order = list(MARKS)
    for finding in sorted(report.findings, key=lambda finding: order.index(finding.status)):
        mark, style = MARKS[finding.status]
        table.add_row(Text(mark, style=style), Text(finding.check), _finding(finding))
    console.print(table)
    if capabilities:
        console.print()
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("capability", no_wrap=True)
        table.add_column("value", justify="right")
        for name, value in sorted(report.capabilities.items()):
            table.add_row(Text(name, style="" if value else "dim"), Text(str(value), style="" if value else "dim"))
        console.print(table if report.capabilities else "No capabilities: KVM could not be asked.")
    notes = sum(finding.status == "note" for finding in report.findings)
    count = len(report.problems)
    console.print(
        Text(f"\n{count or 'No'} problem{'s' * (count != 1)}, {notes} note{'s' * (notes != 1)}.", style="bold")
    )


def _finding(finding: Finding) -> Text:
    text = Text(finding.value, style="bold" if finding.status != "ok" else "")
    if finding.meaning:
        text.append(f"{': ' if finding.value else ''}{finding.meaning}", style="not bold")
    if finding.remedy:
        text.append(f"\nremedy: {finding.remedy}", style="not bold cyan")
    return text
