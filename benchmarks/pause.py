"""How soon a VM is paused that waits for its turn."""

from __future__ import annotations

import time
from statistics import quantiles

import trio

import orchestra as orc

from . import floor
from .row import Options, Row

__all__ = ["pause"]

RATE = 0.01  # the first exit waits 100 s, so that more than 10 s lie ahead of every pause


async def pause(options: Options) -> list[Row]:
    took = []
    async with orc.open_fleet(backend="kvm") as fleet:
        limit = orc.Limit(rate=RATE, burst=1, max_delay=None)
        boot = orc.FlatImage(code=floor.guest("write"))
        vm = await fleet.launch(orc.VmSpec(name="slow", boot=boot, exit_limit=limit))
        opened = trio.current_time()
        for _ in range(options.pick(200, 20)):
            while not vm.throttled:  # noqa: ASYNC110  # a VM tells nobody that it begins to wait
                await trio.sleep(0.0005)
            start = time.perf_counter()
            await vm.pause()
            took.append((time.perf_counter() - start) * 1000)
            await vm.resume()
        assert trio.current_time() - opened < 1 / RATE - 10, "the wait ahead became shorter than 10 s"
        assert vm.statistics().exits["io"] == 1
    cuts = quantiles(took, n=100, method="inclusive")
    p50, p99 = cuts[49], cuts[98]
    return [
        Row(
            what=f"pause of a throttled VM with more than 10 s ahead ({len(took)} times)",
            measured=f"p50 {p50:.2f} ms, p99 {p99:.2f} ms",
            bound="p99 5 ms",
            ok=p99 <= 5,
            details={"p50_ms": p50, "p99_ms": p99, "max_ms": max(took)},
        )
    ]
