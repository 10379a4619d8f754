"""The demo as plain lines: for pipes, files, logs and terminals that can't do more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TextIO

from ..fleet.fleet import Fleet
from ..model.actions import Applied
from ..model.spec import Meter
from ..output.numbers import shown
from . import words
from .account import Act, Result, Sample
from .story import EVENTS, Plan

__all__ = ["Plain", "cells", "columns", "summary"]

EVERY = 4
SHOWN = 3


class Plain:
    """An `Audience` that writes a line now and then."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._noun = ""
        self._seen = 0

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def opened(self, plan: Plan, fleet: Fleet, meter: Meter) -> None:
        self._noun = EVENTS[meter]
        for line in words.opening(plan, fleet, meter):
            self._say(line)

    def act(self, act: Act, time: float) -> None:
        self._seen = 0
        self._say("")
        self._say(words.act_line(act))

    def applied(self, applied: Applied, time: float) -> None:
        self._say(words.action_line(applied, time))

    def sample(self, sample: Sample) -> None:
        self._seen += 1
        if self._seen % EVERY == 0:
            self._say(f"{sample.time:5.1f} s  " + "; ".join(_phrases(sample, self._noun)))

    def ending(self, result: Result) -> None:
        for line in summary(result):
            self._say(line)

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)


def _phrases(sample: Sample, noun: str) -> Iterator[str]:
    noisy, quiet = [row for row in sample.rows if row.noisy], [row for row in sample.rows if not row.noisy]
    for row in noisy[:SHOWN]:
        ended = "" if row.state == "running" else f" [{row.state}]"
        waits = f", waits {row.throttled_share:.0%} of the time" if row.budget is not None else ""
        yield f"{row.name}{ended} {shown(row.rate)} {noun}/s{waits}"
    if len(noisy) > SHOWN:
        yield f"{len(noisy) - SHOWN} more noisy ones"
    if quiet:
        each = sum(row.work_rate for row in quiet) / len(quiet)
        gain = "" if sample.gain is None else f" ({words.change(sample.gain)} against act 1)"
        yield f"quiet VMs {shown(each)} work/s each{gain}"


def columns(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Cells in columns that fit, the first `left` ones to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def cells(result: Result) -> Iterator[tuple[str, ...]]:
    """The table at the end: two rows of headings, then a row for each VM."""
    acts = [f"act {act.number}" for act in result.acts]
    yield ("", EVENTS[result.meter], *("per s," for _ in acts), "", *("work/s," for _ in acts))
    yield ("VM", "in all", *acts, "waited", *acts)
    for vm in result.vms:
        spans = {span.act: span for span in vm.spans}  # an act that was not begun has no span
        rates = [shown(spans[act.number].rate) if act.number in spans else "-" for act in result.acts]
        works = [shown(spans[act.number].work_rate) if act.number in spans else "-" for act in result.acts]
        yield (vm.name, f"{vm.count:,}", *rates, f"{vm.throttled_seconds:.1f} s", *works)


def summary(result: Result) -> Iterator[str]:
    """What is said at the end."""
    yield ""
    yield "What happened" + ("" if result.complete else ", up to here") + ":"
    yield from columns(list(cells(result)), left=1)
    if result.actions:
        yield ""
        yield "What was done, when and why:"
        yield from (words.action_line(applied, result.time(applied)) for applied in result.actions)
    said = list(words.verdict(result))
    if said:
        yield ""
        yield from said
