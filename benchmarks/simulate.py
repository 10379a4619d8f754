"""The simulator's speed and memory: an hour of ten thousand VMs, and of a million."""

from __future__ import annotations

import time
from pathlib import Path

import attrs

from .row import Options, Row

__all__ = ["simulate"]

SCENARIOS = Path(__file__).parent.parent / "examples" / "scenarios"
BOUNDS = {"ten-thousand": (10.0, 1.0), "million": (600.0, 8.0)}
"""Seconds and GiB."""


async def simulate(options: Options) -> list[Row]:
    """Both worlds, with policies and without: what `orchestra simulate` does before it writes the report."""
    from orchestra.simulate import read_scenario, simulate

    rows = []
    for name, (most_seconds, most_memory) in BOUNDS.items():  # the small one first: memory is the process' most
        scenario = read_scenario(SCENARIOS / f"{name}.toml")
        if options.quick:
            scenario = attrs.evolve(scenario, duration=10.0)
        start, cpu = time.perf_counter(), time.process_time()
        result = simulate(scenario)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        memory = result.peak_memory / 2**30
        ruled = result.worlds[0]
        rows.append(
            Row(
                what=f"simulate {name}: {scenario.size:,} VMs, {scenario.ticks} ticks",
                measured=f"{seconds:.1f} s, {cpu:.1f} s of CPU, {memory:.2f} GiB",
                bound=f"{most_seconds:g} s, {most_memory:g} GiB",
                ok=seconds <= most_seconds and memory <= most_memory,
                note="one thread: on a machine that does other things too, CPU time tells what it costs by itself",
                details={
                    "seconds": seconds,
                    "cpu_seconds": cpu,
                    "peak_memory": result.peak_memory,
                    "decisions": ruled.decisions,
                    "actions": ruled.figures["actions"]["total"],
                    "cpu_seconds_by_world": {world.label: world.cpu_seconds for world in result.worlds},
                },
            )
        )
    return rows
