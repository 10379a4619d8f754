"""Runs a scenario: once under its policies, once without them, with the same guests."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import attrs

from ..policy import Guard
from .arrays import np
from .engines import ActionRecord
from .layout import Layout
from .policies import Factory, QemuWindow, maker
from .scenario import Scenario
from .world import World

__all__ = ["Progress", "Result", "WorldResult", "run_world", "simulate"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told now and then: which world, how many ticks are done, of how many."""

WITH, WITHOUT = "with policies", "without policies"


@attrs.frozen
class WorldResult:
    """One world at its end.

    Attributes:
        label: "with policies" or "without policies", or what `run_world` was given.
        figures, series, histogram: see docs/simulate.md.
        deeds: the first actions, one by one.
        errors: why policies were switched off, and on how many hosts.
        decisions: how often a policy was asked.
        seconds, cpu_seconds: what it took to simulate it.
    """

    label: str
    figures: Mapping[str, Any]
    series: Mapping[str, Any]
    histogram: Sequence[float]
    deeds: Sequence[ActionRecord]
    errors: Mapping[str, int]
    decisions: int
    released: float
    seconds: float
    cpu_seconds: float


@attrs.frozen
class Result:
    """What `simulate` found out.

    Attributes:
        seed: the one that was used.
        policies: names.
        with_policies, without: the two worlds; `with_policies` is None if the scenario has no policies.
        peak_memory: bytes that the process had at most.
    """

    scenario: Scenario
    seed: int
    policies: tuple[str, ...]
    with_policies: WorldResult | None
    without: WorldResult
    peak_memory: int

    @property
    def worlds(self) -> tuple[WorldResult, ...]:
        return (self.without,) if self.with_policies is None else (self.with_policies, self.without)


def simulate(
    scenario: Scenario,
    *,
    seed: int | None = None,
    policies: Sequence[Factory] | None = None,
    guard: Guard | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run a scenario with and without its policies. Takes as long as it takes; nothing else runs meanwhile.

    Parameters:
        seed: in the place of the scenario's.
        policies: in the place of the scenario's: each makes a policy for one host, given its CPU.
        guard: in the place of the scenario's: its settings, for a guard of its own on each host.
        progress: called about 100 times for each world. An exception that it raises ends the simulation.
    """
    seed = scenario.seed if seed is None else seed
    window, factories = _policies(scenario, policies)
    layout = Layout(scenario, seed)
    names = tuple(factory(layout.models[0]).name for factory in factories)
    names += () if window is None else (window.name,)
    ruled = None
    if names:
        ruled = run_world(layout, seed, WITH, factories, window, guard, progress=progress)
    free = run_world(layout, seed, WITHOUT, progress=progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Result(scenario, seed, names, ruled, free, peak)


def run_world(
    layout: Layout,
    seed: int,
    label: str,
    factories: Sequence[Factory] = (),
    window: QemuWindow | None = None,
    guard: Guard | None = None,
    *,
    progress: Progress | None = None,
) -> WorldResult:
    """One world from its beginning to its end."""
    begun, cpu = time.perf_counter(), time.process_time()
    ticks = layout.scenario.ticks
    # Dividing by nothing is nowhere meant; numpy would only warn.
    with np.errstate(divide="raise", invalid="raise"):
        world = World(layout, seed, factories, window, guard)
        every = max(1, ticks // 100)
        for tick in range(ticks):
            if progress is not None and tick % every == 0:
                progress(label, tick, ticks)
            world.step()
        world.tally.finish(world.now)
    if progress is not None:
        progress(label, ticks, ticks)
    tally = world.tally
    return WorldResult(
        label=label,
        figures=tally.facts(),
        series=tally.series(),
        histogram=tally.slow.sum(axis=0).tolist(),
        deeds=tally.deeds,
        errors=dict(world.engines.errors),
        decisions=world.hosts.decisions,
        released=world.released,
        seconds=time.perf_counter() - begun,
        cpu_seconds=time.process_time() - cpu,
    )


def _policies(scenario: Scenario, given: Sequence[Factory] | None) -> tuple[QemuWindow | None, list[Factory]]:
    if given is not None:
        return None, list(given)
    window: QemuWindow | None = None
    factories: list[Factory] = []
    for spec in scenario.policies:
        make = maker(spec)
        made = make(scenario.cpu_of(scenario.hosts[0]))
        if isinstance(made, QemuWindow):
            window = made
        else:
            factories.append(cast(Factory, make))
    return window, factories
