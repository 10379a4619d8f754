"""Exits told to a subscriber: by real guests, and by a C thread at a rate that this host's guests may not reach."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import trio

import orchestra as orc

from . import floor
from .played import SETTLE, Tally, compiled, production
from .row import Options, Row

__all__ = ["told"]

RATE = 400_000
"""A second, one by one."""
BATCHED = 1_000_000
"""A second, in batches."""


async def _consume(exits: orc.Exits, tally: Tally) -> None:
    async for exit in exits:
        if exit.bus_lock or exit.vm:
            tally.received += 1


async def _consume_batches(exits: orc.Exits, tally: Tally) -> None:
    """Looks at the columns that one who counts by VM, place and time would hand to his arrays."""
    async for batch in exits.batches():
        columns = batch.time, batch.vm, batch.vcpu, batch.kind, batch.rip, batch.address
        tally.received += min(map(len, columns))


async def _settle(tally: Tally, expected: int) -> None:
    with trio.move_on_after(SETTLE):
        while tally.received < expected:  # noqa: ASYNC110  # how soon does not matter
            await trio.sleep(0.01)


async def _guests(options: Options) -> Row:
    """Two guests, all of whose exits are told."""
    tally, seconds = Tally(), options.pick(100, 5) / 10
    async with orc.open_fleet(backend="kvm") as fleet:
        boot = orc.FlatImage(code=floor.guest("write"))
        vms = [await fleet.launch(orc.VmSpec(name=f"vm-{n}", boot=boot), paused=True) for n in range(2)]
        async with fleet.exits(orc.Io) as exits, trio.open_nursery() as nursery:
            nursery.start_soon(_consume, exits, tally)
            cpu, start = time.thread_time(), trio.current_time()
            for vm in vms:
                await vm.resume()
            await trio.sleep(seconds)
            for vm in vms:
                await vm.pause()
            made = sum(vm.statistics().exits["io"] for vm in vms)
            await _settle(tally, made)
            cpu, passed = time.thread_time() - cpu, trio.current_time() - start
            nursery.cancel_scope.cancel()
            in_ring, in_channel = sum(vm.statistics().missed for vm in vms), exits.missed
    each, missed = cpu / tally.received, in_ring + in_channel
    return Row(
        what="told exits, 2 real guests, as many as they make",
        measured=f"{made / passed:,.0f}/s, {made - tally.received} missed",
        bound="0 missed",
        ok=missed == 0 and made == tally.received,
        note="The consumer's thread (drain task and subscriber, trio included) took "
        f"{each * 1e6:.2f} us of CPU for each exit: {1 / each:,.0f}/s would fill its core.",
        details={
            "made": made,
            "received": tally.received,
            "missed_in_ring": in_ring,
            "missed_in_channel": in_channel,
            "cpu_us_each": each * 1e6,
        },
    )


async def _produced(options: Options, produce: Any, kind: type[orc.Exit], vcpus: int, *, batches: bool = False) -> Row:
    """A C thread that accounts and tells at RATE, or at BATCHED to a subscriber that takes batches."""
    target, consume, how = (BATCHED, _consume_batches, "in batches, ") if batches else (RATE, _consume, "")
    tally, seconds = Tally(), options.pick(10, 1)
    async with orc.open_fleet(backend="kvm") as fleet:
        spec = orc.VmSpec(name="played", vcpus=vcpus, boot=orc.FlatImage(code=floor.guest("write")))
        vm = await fleet.launch(spec, paused=True)
        async with fleet.exits(kind) as exits, trio.open_nursery() as nursery:
            nursery.start_soon(consume, exits, tally)
            work = production(vm, kind, target, target * seconds)
            cpu = time.thread_time()
            await trio.to_thread.run_sync(produce, ctypes.byref(work))
            await _settle(tally, work.total)
            cpu = time.thread_time() - cpu
            in_ring, in_channel = vm.statistics().missed, exits.missed
            nursery.cancel_scope.cancel()
    missed = in_ring + in_channel
    rate, share = work.total / work.took * 1e9, cpu / work.took * 1e9
    each = cpu / max(tally.received, 1)
    return Row(
        what=f"told exits, {how}{kind.__name__} from {vcpus} played vCPU{'s' if vcpus > 1 else ''}, {seconds} s",
        measured=f"{rate:,.0f}/s, {missed} missed, {share:.0%} of a core",
        bound=f"{target:,}/s, 0 missed, <100 %",
        ok=rate >= 0.99 * target and not missed and tally.received == work.total and share < 1,
        note="A C thread stands in for KVM_RUN, which takes too long for this rate here; account, ring, eventfd, drain "
        "task and channel are orchestra's own.",
        details={
            "rate": rate,
            "missed_in_ring": in_ring,
            "missed_in_channel": in_channel,
            "received": tally.received,
            "cpu_share": share,
            "cpu_us_each": each * 1e6,
            "could_sustain": 1 / each,
            "producer_late_ms": work.latest / 1e6,
        },
    )


async def told(options: Options) -> list[Row]:
    produce = compiled(options.build)
    return [
        await _guests(options),
        await _produced(options, produce, orc.BusLock, 8),
        await _produced(options, produce, orc.Io, 1),
        await _produced(options, produce, orc.BusLock, 8, batches=True),
        await _produced(options, produce, orc.Io, 8, batches=True),
    ]
