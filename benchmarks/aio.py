"""What the bridge between asyncio and trio costs: a call, and a stream of exits."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Awaitable, Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import trio

import orchestra as orc
import orchestra.aio

from . import floor
from .played import SETTLE, Tally, compiled, production
from .row import Options, Row

__all__ = ["aio"]

ADDED = 200  # microseconds that a call may cost more
RATE = 100_000  # exits per second


async def _calls(
    times: int, vm: orc.Vm | orc.aio.Vm, fleet: orc.Fleet | orc.aio.Fleet, rest: Callable[[], Awaitable[None]]
) -> dict[str, list[float]]:
    """Microseconds of each call; the same code under trio and asyncio."""

    async def change() -> None:
        await fleet.set_limit(None)

    async def turn() -> None:
        await vm.pause()
        await vm.resume()

    async def rested() -> None:
        await fleet.set_limit(None)

    took: dict[str, list[float]] = {"set_limit": [], "pause + resume": [], "set_limit after 1 ms of rest": []}
    for name, call in zip(took, (change, turn, rested), strict=True):
        for _ in range(times):
            if call is rested:
                await rest()
            start = time.perf_counter()
            await call()
            took[name].append((time.perf_counter() - start) * 1e6)
    return took


def _spec() -> orc.VmSpec:
    """A guest that waits for its turn, for ever: it costs no CPU, and a pause has to reach it all the same."""
    limit = orc.Limit(rate=0.001, burst=1, max_delay=None)
    return orc.VmSpec(name="vm", boot=orc.FlatImage(code=floor.guest("write")), exit_limit=limit)


async def _under_trio(times: int) -> dict[str, list[float]]:
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        return await _calls(times, await fleet.launch(_spec()), fleet, partial(trio.sleep, 0.001))


async def _under_asyncio(times: int, thread: bool) -> dict[str, list[float]]:
    async with orc.aio.open_fleet(backend="kvm", bus_locks="off", thread=thread) as fleet:
        return await _calls(times, await fleet.launch(_spec()), fleet, partial(asyncio.sleep, 0.001))


async def _call_rows(options: Options) -> list[Row]:
    rounds, times = options.pick(5, 1), options.pick(400, 40)
    kinds = ("trio", "guest of the loop", "own thread")
    took: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    for _ in range(rounds):  # in turns, as the machine's mood changes
        for kind in kinds:
            if kind == "trio":
                round_ = await _under_trio(times)
            else:
                main = _under_asyncio(times, thread=kind == "own thread")
                round_ = await trio.to_thread.run_sync(asyncio.run, main)
            for name, values in round_.items():
                took[kind].setdefault(name, []).extend(values)
    rows = []
    for kind in kinds[1:]:
        for name, values in took[kind].items():
            calls = 2 if "+" in name else 1
            measured, under_trio = median(values) / calls, median(took["trio"][name]) / calls
            added = measured - under_trio
            rows.append(
                Row(
                    what=f"aio, {kind}: {name}",
                    measured=f"{measured:.0f} us a call, + {added:.0f} us",
                    floor=f"{under_trio:.0f} us under trio",
                    bound=f"+ {ADDED} us",
                    ok=added <= ADDED,
                    details={
                        "us": measured,
                        "us_under_trio": under_trio,
                        "p99_us": quantiles(values, n=100)[98] / calls,
                        "p99_us_under_trio": quantiles(took["trio"][name], n=100)[98] / calls,
                    },
                )
            )
    return rows


async def _consume(exits: orc.aio.Exits, tally: Tally) -> None:
    async for exit in exits:
        if exit.vm:
            tally.received += 1


async def _stream(options: Options, produce: Any, thread: bool) -> Row:
    """A C thread that accounts and tells at RATE, as in told.py; the subscriber is an asyncio task."""
    tally, seconds = Tally(), options.pick(5, 1)
    async with orc.aio.open_fleet(backend="kvm", bus_locks="off", thread=thread) as fleet:
        spec = orc.VmSpec(name="played", boot=orc.FlatImage(code=floor.guest("write")))
        vm = await fleet.launch(spec, paused=True)
        async with fleet.exits(orc.Io) as exits:
            work = production(vm, orc.Io, RATE, RATE * seconds)
            consumer = asyncio.create_task(_consume(exits, tally))
            cpu = time.process_time()
            await asyncio.to_thread(produce, ctypes.byref(work))
            try:
                async with asyncio.timeout(SETTLE):
                    while tally.received < work.total:  # noqa: ASYNC110  # how soon does not matter
                        await asyncio.sleep(0.01)
            except TimeoutError:
                pass
            cpu = time.process_time() - cpu
            missed = vm.statistics().missed + exits.missed
            consumer.cancel()
            await asyncio.wait([consumer])
    rate, share = work.total / work.took * 1e9, cpu / work.took * 1e9
    return Row(
        what=f"aio, {'own thread' if thread else 'guest of the loop'}: exits to an async for, {seconds} s",
        measured=f"{rate:,.0f}/s, {missed} missed, {share:.0%} of a core",
        note="A C thread stands in for KVM_RUN, as in `told`; its own CPU is part of the figure.",
        bound=f"{RATE:,}/s, 0 missed",
        ok=rate >= 0.99 * RATE and not missed and tally.received == work.total,
        details={"rate": rate, "received": tally.received, "missed": missed, "cpu_share": share},
    )


async def aio(options: Options) -> list[Row]:
    rows, produce = await _call_rows(options), compiled(options.build)
    for thread in (False, True):
        rows.append(await trio.to_thread.run_sync(asyncio.run, _stream(options, produce, thread)))
    return rows
