"""The demo's live table, the doctor's report, a simulation's progress. Only this module imports rich."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress as RichProgress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..demo import words
from ..demo.account import Act, Result, Row, Sample
from ..demo.plain import cells
from ..demo.story import EVENTS, Plan
from ..fleet.fleet import Fleet
from ..host.doctor import Finding, Report
from ..model.actions import Applied
from ..model.spec import Meter
from ..output.numbers import shown

__all__ = ["LiveTable", "Progress", "show_report"]

AROUND: int = 12
"""Lines of the live picture that belong to no VM."""
BARS = " ▁▂▃▄▅▆▇█"
"""The characters of trends, from zero to the highest value."""
WIDEST = 48
_BLANK = Row("vm", "tenant", True, "running", True, 0, 0.0, 0, 0.0, 0.0, 0.5, 1.0)
STATES = {"running": "green", "paused": "yellow", "waiting": "yellow", "failed": "red", "stopped": "dim"}


class LiveTable:
    """An `Audience` with a table that stays at the bottom of the terminal, under what was said so far."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False)
        # Without a thread of rich: frames are drawn only when samples come.
        self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop", redirect_stderr=False)
        self._act: Act | None = None
        self._seconds = 0.0
        self._noun = ""
        self._said: list[RenderableType] = []
        self._trends = Trends()

    def __enter__(self) -> LiveTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def opened(self, plan: Plan, fleet: Fleet, meter: Meter) -> None:
        self._noun, self._seconds = EVENTS[meter], plan.seconds
        self._trends = Trends(plan.seconds, self._noun)
        for line in words.opening(plan, fleet, meter):
            self.console.print(Text(line))
        # Rich loads modules at their first use: better now than while guests run.
        self.console.render_lines(self._picture(Sample(0.0, 0, (_BLANK,))))
        self._live.start()

    def act(self, act: Act, time: float) -> None:
        self._act = act
        heading = Text(f"\nAct {act.number}, {act.title}. ", style="bold").append(act.text, style="not bold")
        self._said.append(heading)
        self._trends.begun(act, time)

    def applied(self, applied: Applied, time: float) -> None:
        self._said.append(Text(words.action_line(applied, time), style="red" if applied.error else "yellow"))

    def sample(self, sample: Sample) -> None:
        self._trends.add(sample)
        # Lines since the last frame are printed with this frame: each print would draw the whole picture again.
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
        for name in (f"{self._noun}/s", "budget/s"):
            table.add_column(name, justify="right", no_wrap=True, min_width=8)
        table.add_column("state", no_wrap=True, min_width=10)
        table.add_column("own work/s", justify="right", no_wrap=True)
        table.add_column("since act 1", justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*_live_cells(row))
        left_out = len(sample.rows) - len(rows)
        more = [Text(f"... and {left_out} more", style="dim")] if left_out else []
        wide = min(self.console.width - Trends.BESIDE, WIDEST)
        trends = self._trends.lines(wide) if wide >= 8 and self.console.encoding.startswith("utf") else []
        return Padding(Group(title, table, *more, *trends), (1, 0, 0, 0))


class Trends:
    """Two lines from the beginning to now: what the noisy VMs did together, and what the quiet ones got done."""

    BESIDE = 30
    """Columns that belong to no bar."""

    def __init__(self, seconds: float = 1.0, noun: str = "") -> None:
        self._seconds = seconds
        self._noun = noun
        self._seen: list[tuple[float, float, float]] = []
        self._gain: float | None = None
        self._acts: list[tuple[str, float]] = []

    def begun(self, act: Act, time: float) -> None:
        self._acts.append((f"act {act.number}", time))

    def add(self, sample: Sample) -> None:
        noisy = sum(row.rate for row in sample.rows if row.noisy)
        quiet = sum(row.work_rate for row in sample.rows if not row.noisy)
        self._seen.append((sample.time, noisy, quiet))
        self._gain = sample.gain

    def lines(self, wide: int) -> list[RenderableType]:
        gain = "" if self._gain is None else f" {words.change(self._gain)}"
        style = "" if self._gain is None else "bold green" if self._gain >= words.SAME else "bold"
        noisy = Text(f"noisy: {self._noun}".ljust(18), style="dim").append(self._bars(1, wide), style="not dim red")
        quiet = Text("quiet: own work".ljust(18), style="dim").append(self._bars(2, wide), style="not dim cyan")
        quiet.append(gain, style=f"not dim {style}")
        acts = " " * 18
        for name, time in self._acts:
            acts = acts.ljust(18 + min(round(time / self._seconds * wide), wide - 1)) + name
        return [Text(), noisy, quiet, Text(acts, style="dim")]

    def _bars(self, which: int, wide: int) -> str:
        """One character for each part of the time so far, as high as the mean in it."""
        most = max((seen[which] for seen in self._seen), default=0.0)
        parts: list[list[float]] = [[] for _ in range(wide)]
        for seen in self._seen:
            parts[min(int(seen[0] / self._seconds * wide), wide - 1)].append(seen[which])
        bars, empty = "", 0
        for part in parts:
            if part:  # where no sample fell, it is as in the next one: that looked back
                mean = sum(part) / len(part)
                bars += BARS[max(round(mean / most * (len(BARS) - 1)), 1) if mean else 0] * (empty + 1)
            empty = 0 if part else empty + 1
        return bars.ljust(wide)


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
    waits = row.throttled_share > 0.01 and row.state == "running"
    state = f"waits {row.throttled_share:.0%}" if waits else row.state
    better = row.gain is not None and row.gain >= words.SAME
    return (
        Text(row.name, style=style),
        Text(row.tenant),
        Text(shown(row.rate), style="red" if row.noisy and row.budget is None else style),
        Text("-" if row.budget is None else shown(row.budget)),
        Text(state, style="yellow" if waits else STATES.get(state, "")),
        Text(shown(row.work_rate), style="cyan" if not row.noisy else ""),
        Text(words.change(row.gain), style="green" if better else "" if row.gain is not None else "dim"),
    )


class Progress:
    """A bar for each part of something that takes long, on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            auto_refresh=False,
        )
        self._parts: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, label: str, done: int, of: int) -> None:
        if label not in self._parts:
            self._parts[label] = self._bars.add_task(label, total=of)
        self._bars.update(self._parts[label], completed=done)
        self._bars.refresh()


MARKS = {"problem": ("problem", "bold red"), "note": ("note", "yellow"), "ok": ("ok", "green")}


def show_report(report: Report, capabilities: bool, console: Console | None = None) -> None:
    """The doctor's verdict; the findings, problems first; and KVM's capabilities by the kernel's names."""
    console = console or Console(file=sys.stdout, highlight=False)
    if report.verdict is not None:
        for line in report.verdict.lines:
            console.print(Text(line, style="bold"), soft_wrap=not console.is_terminal)
        console.print()
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
