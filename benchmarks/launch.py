"""From nothing to the first exit of many VMs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import trio

import orchestra as orc

from . import floor
from .machine import sees_bus_locks
from .row import Options, Row

__all__ = ["launch"]

CONCURRENT = 8
# After its first exit a vCPU sleeps, as the floor's threads do.
ONE_EXIT = orc.Limit(rate=1e-6, burst=1, max_delay=None)


async def launch_all(vms: int, concurrent: int, idle: int = 0) -> tuple[float, float]:
    """Seconds to the first exit of all, by that many tasks that launch one after the other: wall, CPU.

    `idle`: so many VMs are in the fleet already, and do nothing any more.
    """
    boot = orc.FlatImage(code=floor.guest("write"))
    specs = iter([orc.VmSpec(name=f"vm-{n}", boot=boot, exit_limit=ONE_EXIT) for n in range(vms)])

    async with orc.open_fleet(backend="kvm") as fleet:

        async def launcher(specs: Iterator[orc.VmSpec]) -> None:
            for spec in specs:
                await fleet.launch(spec)

        async with fleet.exits(orc.Io) as exits, trio.open_nursery() as nursery:
            for n in range(idle):
                await fleet.launch(orc.VmSpec(name=f"idle-{n}", boot=boot, exit_limit=ONE_EXIT))
            for _ in range(idle):
                await exits.receive()
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(concurrent):
                nursery.start_soon(launcher, specs)
            for _ in range(vms):
                await exits.receive()
            return time.perf_counter() - start, time.process_time() - cpu


async def launch(options: Options) -> list[Row]:
    vms, locks = options.pick(500, 20), sees_bus_locks()
    bare: list[tuple[float, float]] = []
    ours: dict[tuple[int, int], list[tuple[float, float]]] = {(1, 0): [], (CONCURRENT, 0): [], (1, vms): []}
    for _ in range(options.pick(5, 1)):
        bare.append(await floor.launch(options.floor, "write", vms, locks))
        for (concurrent, idle), seconds in ours.items():
            seconds.append(await launch_all(vms, concurrent, idle))
    what = f"launch of {vms} VMs to their first exit"
    rows = []
    for concurrent, how, bound in ((1, "one after the other", 1.3), (CONCURRENT, f"{CONCURRENT} at a time", 1.1)):
        note = (
            "By the clock, 1 MiB and one vCPU each, all alive until the last had its first exit; the floor makes them "
            "one after the other, with a thread each."
        )
        rows.append(_row(f"{what}, {how}", ours[concurrent, 0], bare, bound, note))
    note = "Against the same with nobody there; by the clock, one after the other."
    rows.append(_row(f"{what}, {vms} idle ones are there", ours[1, vms], ours[1, 0], 1.2, note))
    return rows


def _row(what: str, ours: list[tuple[float, float]], base: list[tuple[float, float]], bound: float, note: str) -> Row:
    (wall, cpu), (base_wall, base_cpu) = (
        [median(column) for column in zip(*times, strict=True)] for times in (ours, base)
    )
    return Row(
        what=what,
        measured=f"{wall:.3f} s ({cpu:.3f} s CPU)",
        floor=f"{base_wall:.3f} s ({base_cpu:.3f} s CPU)",
        ratio=wall / base_wall,
        bound=f"{bound}x",
        ok=wall / base_wall <= bound,
        note=note,
        details={"wall_and_cpu": ours, "floor_wall_and_cpu": base, "cpu_ratio": cpu / base_cpu},
    )
