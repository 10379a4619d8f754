"""A picture of a demo's run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..output.colours import EVENT, LIMIT, NOISY, QUIET
from ..output.figures import Figure, rc_context
from ..output.numbers import shown
from ..output.svg import LEGEND, STYLE, heading, save
from .account import Act, Result
from .story import EVENTS
from .words import change

__all__ = ["draw"]


def draw(result: Result, path: Path) -> None:
    """Write an SVG: above, the noisy VMs' events a second and their budgets; below, what the quiet ones got done.

    Raises:
        FileError: the file can't be written.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5.4), layout="constrained")
        heading(figure, _title(result))
        above, below = figure.subplots(2, 1, sharex=True)
        _acts(result, above, below)
        _noisy(result, above)
        _quiet(result, below)
        below.set_xlabel("seconds")
        below.set_xlim(0, max(sample.time for sample in result.samples))
        for axes in (above, below):
            axes.yaxis.set_major_formatter(lambda value, _: shown(value) if value >= 0 else "")
            axes.yaxis.set_minor_formatter(lambda _, __: "")
        save(figure, path)


def _title(result: Result) -> str:
    cpus = "" if result.cpus is None else f" on {result.cpus} CPU{'s' * (result.cpus != 1)}"
    return f"orchestra demo: {len(result.quiet)} quiet and {len(result.noisy)} noisy VMs{cpus}; {result.why}"


def _acts(result: Result, above: Any, below: Any) -> None:
    """The acts' names above, and a line where each begins."""
    for act, (begin, _) in _played(result):
        _write(above, begin, f"{act.number}: {act.title}")
        if begin:
            for axes in (above, below):
                axes.axvline(begin, color=EVENT, linewidth=0.8)


def _played(result: Result) -> Iterator[tuple[Act, tuple[float, float]]]:
    """The acts, with the seconds that each began and ended at."""
    begin = 0.0
    for act, span in zip(result.acts, result.vms[0].spans, strict=False):  # one may have ended before it was begun
        yield act, (begin, begin + span.seconds)
        begin += span.seconds


def _write(axes: Any, time: float, text: str, **style: Any) -> None:
    """At the top, right of that time."""
    axes.annotate(text, (time, 0.97), (4, 0), ("data", "axes fraction"), "offset points", va="top", **style)


def _noisy(result: Result, axes: Any) -> None:
    times = [sample.time for sample in result.samples]
    drawn = result.noisy[: len(NOISY)]
    for i, vm in enumerate(drawn):
        rows = [next(row for row in sample.rows if row.name == vm.name) for sample in result.samples]
        axes.plot(times, [max(row.rate, 0.1) for row in rows], color=NOISY[i], linewidth=1.8, label=vm.name)
        budgets = [float("nan") if row.budget is None else row.budget for row in rows]
        label = "budgets" if vm is drawn[-1] else None
        axes.plot(times, budgets, color=LIMIT, linestyle=":", linewidth=1, drawstyle="steps-pre", label=label)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 2, high * (high / low) ** 0.2)  # room for the acts' names
    axes.set_title(f"noisy VMs: {EVENTS[result.meter]} a second")
    axes.legend(**LEGEND)


def _quiet(result: Result, axes: Any) -> None:
    times = [sample.time for sample in result.samples]
    for vm in result.quiet:
        rows = [next(row for row in sample.rows if row.name == vm.name) for sample in result.samples]
        label = "each" if vm is result.quiet[0] else None
        axes.plot(times, [row.work_rate for row in rows], color=QUIET, linewidth=0.7, alpha=0.5, label=label)
    axes.set_title("quiet VMs: own work done a second")
    if not result.quiet:
        return
    each = [[row.work_rate for row in sample.rows if not row.noisy] for sample in result.samples]
    axes.plot(times, [sum(rates) / len(rates) for rates in each], color=QUIET, linewidth=2, label="their mean")
    free = result.work_rate(1)
    for act, (begin, end) in _played(result):
        total = result.work_rate(act.number)
        if total and free:
            mean = total / len(result.quiet)
            axes.hlines(mean, begin, end, color=LIMIT, linewidth=1, linestyle="--", zorder=3)
            text = f"{shown(mean)}/s each" + (f", {change(total / free - 1)}" if act.number > 1 else "")
            _write(axes, begin, text, fontweight="bold")
    if any(map(any, each)):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    else:  # scripted: scripts do no work
        axes.set_yticks([0])
    axes.legend(**LEGEND)
