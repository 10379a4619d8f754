"""What sampling bus locks costs a guest that does nothing else."""

from __future__ import annotations

import time
from statistics import median

import trio

import orchestra as orc

from . import floor
from .machine import sees_bus_locks
from .row import Options, Row

__all__ = ["profile"]

BOUND = 1.02
EVERY = (0, 100, 1)


async def profile(options: Options) -> list[Row]:
    """CPU time of a bus lock: not sampled, every 100th sampled (the default), and each."""
    backend = "kvm" if sees_bus_locks() else "emulated"
    runs: dict[int, list[float]] = {every: [] for every in EVERY}
    seconds = options.pick(4, 1) / 10
    async with orc.open_fleet(backend=backend, bus_locks="require") as fleet:
        spec = orc.VmSpec(name="locker", boot=orc.FlatImage(code=floor.guest("buslock")))
        vm = await fleet.launch(spec)
        await trio.sleep(seconds)

        def read() -> tuple[int, int]:
            return vm.statistics().bus_locks or 0, time.process_time_ns()

        for turn in range(options.pick(30, 3)):
            order = EVERY if turn % 2 else EVERY[::-1]  # whoever comes first in a round has no advantage
            for every in order:
                vm.set_sampling(every)
                before = read()
                await trio.sleep(seconds)
                locks, cpu = (b - a for a, b in zip(before, read(), strict=True))
                runs[every].append(cpu / locks)
        seen = vm.profile()
        await vm.stop()
    # Of each round by itself, as the machine is faster in one than in another.
    ratios = {every: median(b / a for a, b in zip(runs[0], runs[every], strict=True)) for every in EVERY[1:]}
    base = median(runs[0])
    rows = []
    for every, ratio in ratios.items():
        rows.append(
            Row(
                what=f"bus lock, {'each' if every == 1 else f'one of {every}'} sampled ({backend})",
                measured=f"{median(runs[every]) / 1000:.2f} us",
                floor=f"{base / 1000:.2f} us",
                ratio=ratio,
                bound=f"{BOUND}x" if every == 100 else "",
                ok=ratio <= BOUND if every == 100 else None,
                note="Floor: the same with sampling off. CPU time, rounds of all three; median of the rounds' ratios.",
                details={"runs": runs, "instructions": [i.as_dict() for i in seen.instructions]},
            )
        )
    return rows
