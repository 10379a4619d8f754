"""A process with eight greedy vCPUs under a host's budget that it shares: ``python -m benchmarks.sharer FD KIND WHAT``

WHAT is "steady": launch them, and for each line "BEGIN END" (seconds, CLOCK_MONOTONIC) print what each vCPU did in a
second of that time. Or "restless": for each line "fork" fork a process that does everything there is to do with a
budget until it is killed, and print its number; and for each line "reap" wait for it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

import orchestra as orc

from . import floor

__all__ = ["BURST", "KINDS", "RATE", "VCPUS", "Kind", "counts", "greedy", "rates"]

VCPUS = 8
RATE = 2000.0
BURST = 100.0
"""What 50 ms make: a machine that has no CPU for anybody for longer loses the rest, which is not what is measured."""


@attrs.frozen
class Kind:
    """Who is greedy, and for what.

    Attributes:
        vms: with how many vCPUs each: the emulated backend has one in each VM.
        boot: a guest that does nothing else.
        life: seconds in which a restless process attaches, launches, ends and begins again, on a machine that has much
            else to do.
    """

    backend: str
    meter: orc.Meter
    vms: tuple[int, ...]
    boot: orc.FlatImage
    life: float

    def create(self, rate: float = RATE) -> orc.HostBudget:
        budget = orc.HostBudget.create()
        self.limit(budget, rate)
        return budget

    def limit(self, budget: orc.HostBudget, rate: float | None) -> None:
        limit = None if rate is None else orc.Limit(rate=rate, burst=BURST, max_delay=None)
        budget.set_limit(limit, meter=self.meter)


KINDS = {
    "kvm": Kind("kvm", orc.Meter.EXITS, (VCPUS,), orc.FlatImage(code=floor.guest("write")), 0.3),
    "emulated": Kind("emulated", orc.Meter.BUS_LOCKS, (1,) * VCPUS, orc.FlatImage(code=floor.guest("buslock")), 0.8),
}


@asynccontextmanager
async def greedy(kind: Kind, budget: orc.HostBudget) -> AsyncIterator[orc.Fleet]:
    """A fleet with eight of them, which run."""
    async with orc.open_fleet(
        backend=kind.backend, host_budget=budget, bus_locks="off" if kind.meter is orc.Meter.EXITS else "require"
    ) as fleet:
        for number, vcpus in enumerate(kind.vms):
            await fleet.launch(orc.VmSpec(name=f"vm-{number}", boot=kind.boot, vcpus=vcpus))
        yield fleet


def counts(kind: Kind, fleet: orc.Fleet) -> list[int]:
    """What each vCPU did so far, of what is limited."""
    each = [vcpu for vm in fleet.vms.values() for vcpu in vm.statistics().vcpus]
    if kind.meter is orc.Meter.EXITS:
        return [sum(vcpu.exits.values()) for vcpu in each]
    return [vcpu.bus_locks or 0 for vcpu in each]


async def rates(kind: Kind, fleet: orc.Fleet, begin: float, end: float) -> list[float]:
    """What each vCPU did a second between two times of CLOCK_MONOTONIC, or between those, somewhat later, at which a
    busy machine let us look."""
    await trio.sleep(begin - fleet.now() / 1e9)
    before, since = counts(kind, fleet), fleet.now()
    await trio.sleep(end - fleet.now() / 1e9)
    after, seconds = counts(kind, fleet), (fleet.now() - since) / 1e9
    return [(now - was) / seconds for now, was in zip(after, before, strict=True)]


async def steady(kind: Kind, budget: orc.HostBudget) -> None:
    async with greedy(kind, budget) as fleet:
        print("ready", flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            begin, end = map(float, line.split())
            print(json.dumps(await rates(kind, fleet, begin, end)), flush=True)


async def restless(kind: Kind, fd: int) -> None:
    """Everything at once, for ever: attach, charge, wait, change limits, take them off, launch, stop, close."""

    async def change(budget: orc.HostBudget) -> None:
        for rate in itertools.cycle((RATE, RATE * 3, None, RATE / 3)):
            kind.limit(budget, rate)
            budget.statistics()
            await trio.lowlevel.checkpoint()

    while True:
        with orc.HostBudget.attach(fd) as budget:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(change, budget)
                async with greedy(kind, budget):
                    await trio.sleep(0.02)
                nursery.cancel_scope.cancel()


def main() -> None:
    fd, kind = int(sys.argv[1]), KINDS[sys.argv[2]]
    if sys.argv[3] == "steady":
        with orc.HostBudget.attach(fd) as budget:
            trio.run(steady, kind, budget)
        return
    pid = 0
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "reap\n":
            print(os.waitpid(pid, 0)[1], flush=True)
            continue
        pid = os.fork()
        if not pid:
            trio.run(restless, kind, fd)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
