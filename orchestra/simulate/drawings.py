"""The report's drawings. Colours are the page's own, so that they are right in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from ..output import colours
from ..output.figures import Figure, fit_scale, inline_svg, rc_context
from .metrics import EDGES
from .run import Result, WorldResult

__all__ = ["drawings"]

INK, MUTED, GRID = (colour.stand_in for colour in (colours.INK, colours.MUTED, colours.GRID))
WITH, WITHOUT = colours.WITH.stand_in, colours.WITHOUT.stand_in
GROUPS: Final = tuple(colour.stand_in for colour in colours.GROUPS)
COLOURS: Final = colours.variables(colours.PAGE)
STYLE: Final[Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
}
WIDTH, HEIGHT = 6.6, 2.7
MOST_GROUPS: Final = len(GROUPS)


def drawings(result: Result) -> Iterator[tuple[str, str, str]]:
    """Title, explanation and SVG of each."""
    first = result.worlds[0]
    scenario = result.scenario
    unit, per = _time_unit(scenario.duration)
    time = [t / per for t in first.series["time"]]

    def over_time(salt: str, draw: Callable[[Any], None], label: str, height: float = HEIGHT) -> str:
        with rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            axes = figure.subplots()
            draw(axes)
            axes.set_xlabel(unit)
            axes.set_ylabel(label)
            axes.set_xlim(0, scenario.duration / per)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0, handlelength=1.2)
        return inline_svg(figure, salt, COLOURS)

    def both(axes: Any, key: str, scale: float = 1.0) -> None:
        for world, colour in _coloured(result):
            axes.plot(time, [_scaled(v, scale) for v in world.series[key]], color=colour, label=world.label)

    def slow(axes: Any) -> None:
        for world, colour in _coloured(result):
            axes.plot(time, world.series["slowdown_mean"], color=colour, label=world.label)
            tail = world.series["slowdown_p99"]
            axes.plot(time, tail, color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.set_ylim(bottom=1)
        keys = ("slowdown_mean", "slowdown_p99")
        fit_scale(axes, *(world.series[key] for world, _ in _coloured(result) for key in keys), least=1.0)

    yield (
        "Victims' slow-down",
        "How many times as long the innocent groups take for their work. Solid: the mean of all; dashed: the one in a"
        " hundred that fares worst.",
        over_time("slow", slow, "times as long"),
    )
    yield (
        "How the slow-down is spread",
        "The part of the victims' time in which they are at least so much slower.",
        _tail(result),
    )

    groups = [i for i, vms in enumerate(scenario.vms) if any(first.series["wanted"][i])]
    groups.sort(key=lambda i: -sum(first.series["wanted"][i]))
    groups = groups[:MOST_GROUPS]
    if groups:
        yield (
            "Locks per second, by group",
            "Solid: locks made; dotted: what the group would have made had nothing held it."
            + (f" World: {first.label}." if result.with_policies else ""),
            over_time("rates", lambda axes: _rates(axes, first, scenario.vms, groups, time), "locks a second"),
        )
        yield (
            "Who gets the bus",
            "Each group's part of all locks made.",
            over_time("shares", lambda axes: _shares(axes, first, scenario.vms, groups, time), "part of all locks"),
        )

    def bus(axes: Any) -> None:
        both(axes, "bus_worst", 100)
        axes.axhline(100 * scenario.budget.bus_share, color=MUTED, linewidth=0.9, linestyle=":", label="the budget")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 110)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")

    yield (
        "Bus time taken on the worst host",
        "The largest part of any host's bus time that locks took in one tick.",
        over_time("bus", bus, "of the bus' time"),
    )
    yield (
        "Hosts over budget",
        "Hosts whose guests made more locks in a second than the budget and a tenth.",
        over_time("over", lambda axes: both(axes, "over_budget_hosts"), "hosts"),
    )
    if groups and any(sum(first.series["waited"][i]) for i in groups):
        yield (
            "Throttled time, by group",
            "vCPUs that are throttled at any time (seconds waited per second).",
            over_time("waited", lambda axes: _waits(axes, first, scenario.vms, groups, time), "vCPUs waiting"),
        )

    def fairness(axes: Any) -> None:
        both(axes, "jain")
        axes.set_ylim(0, 1.02)

    if any(value is not None for world in result.worlds for value in world.series["jain"]):
        yield (
            "Fairness",
            "Jain's index over the VMs of contended hosts: locks made, relative to the fair share of the budget."
            " 1: each gets its due.",
            over_time("jain", fairness, "Jain's index"),
        )
    if any(first.series["actions"]):
        yield (
            "Actions",
            "What the policies asked for.",
            over_time("actions", lambda axes: _actions(axes, first, time), "actions", 2.0),
        )


def _coloured(result: Result) -> Iterator[tuple[WorldResult, str]]:
    if result.with_policies is not None:
        yield result.with_policies, WITH
    yield result.without, WITHOUT


def _scaled(value: float | None, scale: float) -> float:
    return math.nan if value is None else value * scale


def _time_unit(duration: float) -> tuple[str, float]:
    if duration > 4 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if duration > 600 else ("seconds", 1.0)


def _short(value: float, _: object = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _rates(axes: Any, world: WorldResult, vms: Sequence[Any], groups: Sequence[int], time: Sequence[float]) -> None:
    for i, colour in zip(groups, GROUPS, strict=False):
        axes.plot(time, world.series["done"][i], color=colour, label=vms[i].name)
        axes.plot(time, world.series["wanted"][i], color=colour, linewidth=0.9, linestyle=":")
    axes.set_ylim(bottom=0)
    fit_scale(axes, *(world.series[key][i] for i in groups for key in ("done", "wanted")), least=1.0)
    axes.yaxis.set_major_formatter(_short)


def _shares(axes: Any, world: WorldResult, vms: Sequence[Any], groups: Sequence[int], time: Sequence[float]) -> None:
    done = [world.series["done"][i] for i in groups]
    total = [max(sum(values), 1e-300) for values in zip(*done, strict=True)]
    parts = [[value / all_ for value, all_ in zip(values, total, strict=True)] for values in done]
    names = [vms[i].name for i in groups]
    axes.stackplot(time, parts, colors=GROUPS[: len(groups)], labels=names, linewidth=0, alpha=0.85)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _waits(axes: Any, world: WorldResult, vms: Sequence[Any], groups: Sequence[int], time: Sequence[float]) -> None:
    for i, colour in zip(groups, GROUPS, strict=False):
        axes.plot(time, world.series["waited"][i], color=colour, label=vms[i].name)
    axes.set_ylim(bottom=0)
    fit_scale(axes, *(world.series["waited"][i] for i in groups))
    axes.yaxis.set_major_formatter(_short)


def _actions(axes: Any, world: WorldResult, time: Sequence[float]) -> None:
    width = time[1] - time[0] if len(time) > 1 else 1.0
    axes.bar(time, world.series["actions"], width=width * 0.9, color=WITH, label="with policies")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _tail(result: Result) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        largest = 1.1
        least = 0.1
        for world, colour in _coloured(result):
            total = sum(world.histogram) or 1.0
            above, at_least = 0.0, []
            for count in reversed(world.histogram):
                above += count
                at_least.append(above / total)
            at_least.reverse()
            shown = [(edge, part) for edge, part in zip(EDGES, at_least, strict=True) if part > 1e-9]
            if len(shown) > 1:
                largest = max(largest, shown[-1][0])
                least = min(least, shown[-1][1])
            axes.plot([s[0] for s in shown], [100 * s[1] for s in shown], color=colour, label=world.label)
        axes.set_yscale("log")
        axes.set_ylim(max(100 * least * 0.7, 1e-6), 100)
        axes.set_xlim(1, largest * 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.set_xlabel("times as long")
        axes.set_ylabel("of the victims' time")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0, handlelength=1.2)
    return inline_svg(figure, "tail", COLOURS)
