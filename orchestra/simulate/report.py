"""A simulation's result as a JSON document and as a few plain lines."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import attrs

from .arrays import np
from .engines import ActionRecord
from .metrics import EDGES
from .run import Result, WorldResult
from .scenario import Scenario

__all__ = ["action_row", "document", "kind_of", "percent", "seconds", "summary", "times"]

SHOWN = 200
"""Actions that the document holds."""


def document(result: Result) -> dict[str, Any]:
    """For JSON. Holds the same for the same seed, but for `cost`."""
    return {
        "program": "orchestra simulate",
        "scenario": _scenario(result.scenario),
        "seed": result.seed,
        "policies": list(result.policies),
        "worlds": {("without" if world is result.without else "with"): _world(world) for world in result.worlds},
        "slowdown_edges": EDGES,
        "cost": {
            "seconds": sum(world.seconds for world in result.worlds),
            "cpu_seconds": sum(world.cpu_seconds for world in result.worlds),
            "peak_memory": result.peak_memory,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def _world(world: WorldResult) -> dict[str, Any]:
    return {
        "label": world.label,
        "figures": world.figures,
        "series": world.series,
        "slowdown_histogram": list(world.histogram),
        "decisions": world.decisions,
        "released": world.released,
        "errors": world.errors,
        "actions": [action_row(deed) for deed in world.deeds[:SHOWN]],
    }


def _plain(_: object, __: object, value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def action_row(deed: ActionRecord) -> dict[str, Any]:
    """One action, flat."""
    fields = attrs.asdict(deed.action, value_serializer=_plain)
    return {
        "time": deed.time,
        "host": deed.host,
        "policy": deed.policy,
        "action": type(deed.action).__name__,
        **fields,
        "error": deed.error,
        "refused": deed.refused,
    }


def _scenario(scenario: Scenario) -> dict[str, Any]:
    plain = attrs.asdict(
        scenario,
        filter=lambda field, _: not field.name.startswith("_"),
        value_serializer=lambda _, __, value: _finite(value),
    )
    for vms, one in zip(plain["vms"], scenario.vms, strict=True):
        vms["behaviour"] = {"kind": one.behaviour.kind, **vms["behaviour"]}
    return plain


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return None if value == float("inf") else value


# ---- in words -------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}x"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"


def kind_of(scenario: Scenario) -> str:
    """What is simulated, in a line."""
    hosts = sum(one.count for one in scenario.hosts)
    return (
        f"{scenario.size:,} VMs on {hosts:,} host{'s' * (hosts != 1)}, {scenario.duration:g} s in ticks of "
        f"{scenario.tick:g} s"
    )


ROWS: Final[tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...]] = (
    ("bus time taken, mean", lambda f: percent(f["bus_share"]["mean"])),
    ("bus time taken, worst host and tick", lambda f: percent(f["bus_share"]["worst"])),
    ("host-seconds over budget", lambda f: f"{f['bus_share']['over_budget_host_seconds']:,.0f}"),
    ("victims' slow-down, mean", lambda f: times(f["slowdown"]["mean"])),
    ("victims' slow-down, p99", lambda f: times(f["slowdown"]["p99"])),
    ("victims' slow-down, p99.9", lambda f: times(f["slowdown"]["p99.9"])),
    ("victims' slow-down, worst", lambda f: times(f["slowdown"]["worst"])),
    ("Jain's index (1: all get their fair share)", lambda f: "-" if f["jain"] is None else f"{f['jain']:.3f}"),
    ("the guilty get, for each lock of their fair share", lambda f: _two(f["guilty"]["locks_per_fair_lock"])),
    ("the guilty wait", lambda f: seconds(f["guilty"]["throttled_seconds"])),
    ("the innocent wait", lambda f: seconds(f["false_positives"]["throttled_seconds"])),
    ("time to detect, mean (p90)", lambda f: _spread(f["time_to_detect"])),
    ("episodes never acted on", lambda f: f"{f['time_to_detect']['missed']:,} of {f['guilty']['episodes']:,}"),
    ("time to recover, mean (p90)", lambda f: _spread(f["time_to_recover"])),
    ("time to release, mean (p90)", lambda f: _spread(f["time_to_release"])),
    ("false positives: VMs held that took no more than theirs", lambda f: f"{f['false_positives']['vms']:,}"),
    ("actions", lambda f: f"{f['actions']['total']:,}"),
    ("refused by the guard", lambda f: f"{f['actions']['refused']:,}"),
)
"""The table of figures: what it is, and how it is shown."""


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(values: Mapping[str, Any]) -> str:
    return "-" if not values["count"] else f"{seconds(values['mean'])} ({seconds(values['p90'])})"


def summary(result: Result) -> Iterator[str]:
    """The figures as a table in plain text."""
    yield f"{result.scenario.name}: {kind_of(result.scenario)}, seed {result.seed}"
    yield f"policies: {', '.join(result.policies) or 'none'}"
    yield ""
    columns = [["", *(name for name, _ in ROWS)]]
    for world in result.worlds:
        columns.append([world.label, *(show(world.figures) for _, show in ROWS)])
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))  # noqa: B905  # as many
        yield "  ".join([first, *rest]).rstrip()
    for world in result.worlds:
        for error, hosts in world.errors.items():
            yield f"switched off on {hosts} host{'s' * (hosts != 1)}: {error}"
    yield ""
    took = sum(world.seconds for world in result.worlds)
    cpu = sum(world.cpu_seconds for world in result.worlds)
    yield f"simulated in {took:.1f} s ({cpu:.1f} s of CPU time), at most {result.peak_memory / 2**20:,.0f} MiB"
