"""What a tick of the policies costs, and how much of it is for VMs that do nothing; what the journal takes in."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import trio

import orchestra as orc
from orchestra.backend.scripted import hlt
from orchestra.fleet.runner import PolicyRunner
from orchestra.host.observe import HostSignals, ThreadTimes
from orchestra.journal import Journal, read_journal
from orchestra.machine.vcpu import Vcpu
from orchestra.native import lib
from orchestra.native.records import BUS_LOCK, build
from orchestra.policy import Facts, HostFacts, VmFacts

from .row import Options, Row

__all__ = ["journal", "tick"]

ACTIVE = 50
INTERVAL = 0.1
LOCKS = 20
"""Bus locks of an active VM in a tick."""


def _policies() -> list[orc.Policy]:
    limit = orc.Limit(rate=5000)
    return [
        orc.StaticLimits({"busy-*": orc.Limit(rate=1000)}),
        orc.WeightedShare(limit),
        orc.BurstCredits(baseline=500, most=10_000),
        orc.Adaptive(),
        orc.Ladder(),
        orc.BusTime(0.05),
    ]


async def _no_ticks(governor: PolicyRunner) -> None:
    """They are taken by hand."""


@contextmanager
def _threads(busy: int) -> Iterator[Callable[[orc.Fleet, orc.VmSpec], Awaitable[None]]]:
    """Scripted VMs have no threads: active ones get this one, whose clock moves, the others one that sleeps.

    Gives what launches a VM with such threads. Once it is there, its vCPUs have their numbers as any have: asking for
    them costs a tick no more than it would.
    """
    release = threading.Event()
    sleeper = threading.Thread(target=release.wait)
    sleeper.start()

    def tid(vcpu: Vcpu) -> int | None:
        return busy if vcpu.host.name.startswith("busy") else sleeper.native_id

    async def launch(fleet: orc.Fleet, spec: orc.VmSpec) -> None:
        with mock.patch.object(Vcpu, "tid", property(tid)):
            vm = await fleet.launch(spec)
            for vcpu in vm._control.guest.vcpus:
                vcpu._tid = vcpu.tid

    try:
        with (
            mock.patch.object(PolicyRunner, "run", _no_ticks),
            # It visits every VM there is; threads are woken by the core, which visits those that wait.
            mock.patch.object(orc.ScriptedBackend, "limits_changed"),
        ):
            yield launch
    finally:
        release.set()
        sleeper.join()


async def _measure(vms: int, active: int, ticks: int, journal: Journal) -> dict[str, Any]:
    backend = orc.ScriptedBackend(lambda spec, vcpu: [hlt(after=1e9)])
    wall, cpu, actions = [], [], 0
    with _threads(threading.get_native_id()) as launch:
        async with orc.open_fleet(
            backend=backend, policies=_policies(), journal=journal, journal_interval=1.0
        ) as fleet:
            activity, governor = fleet._context.observer, fleet._context.runner
            activity.host, activity._threads, activity._absent = HostSignals(probe=True), ThreadTimes(), {}
            try:
                for number in range(vms):
                    name = f"{'busy' if number < active else 'idle'}-{number}"
                    await launch(fleet, orc.VmSpec(name=name, memory=orc.MiB, boot=orc.FlatImage(code=b"\xf4")))
                busy = [
                    vcpu.core
                    for vm in fleet.vms.values()
                    if vm.name.startswith("busy")
                    for vcpu in vm._control.guest.vcpus
                ]
                record = build("x86_bus_lock", flags=BUS_LOCK)
                for number in range(ticks + 3):
                    await trio.sleep(INTERVAL)
                    for core in busy:
                        for _ in range(LOCKS):
                            lib.orc_vcpu_account(core.handle, record, backend.now())
                    for state in governor._engine.states:
                        state.due = 0
                    before, begun, used = len(fleet.actions()), time.perf_counter(), time.thread_time()
                    await governor.tick()
                    if number >= 3:  # the first ones set all limits, and fill caches
                        wall.append(time.perf_counter() - begun)
                        cpu.append(time.thread_time() - used)
                        actions += len(fleet.actions()) - before
                assert all(status.on for status in fleet.statistics().policies), fleet.statistics().policies
            finally:
                activity.host.close()
    return {
        "vms": vms,
        "active": active,
        "ms": statistics.median(wall) * 1e3,
        "cpu_ms": statistics.median(cpu) * 1e3,
        "p99_ms": sorted(wall)[len(wall) * 99 // 100] * 1e3,
        "actions_per_tick": actions / ticks,
    }


async def tick(options: Options) -> list[Row]:
    """1000 VMs of which 50 are active; the same with fewer and more that are not."""
    ticks = options.pick(50, 5)
    rows = []
    for vms in (100, 200) if options.quick else (100, 1000, 10_000):
        with tempfile.TemporaryDirectory(dir=options.build) as folder:
            found = await _measure(vms, min(ACTIVE, vms), ticks, Journal(Path(folder) / "fleet.db"))
        rows.append(
            Row(
                what=f"tick of six policies, {vms} VMs, {found['active']} of them active",
                measured=f"{found['ms']:.2f} ms ({found['cpu_ms']:.2f} ms of CPU; p99 {found['p99_ms']:.1f} ms)",
                bound="2 ms" if vms <= 1000 else "as with 1000",
                ok=found["ms"] <= 2 if vms <= 1000 else found["cpu_ms"] <= 1.5 * rows[-1].details["cpu_ms"],
                note=f"Scripted VMs; the active ones account {LOCKS} bus locks a tick through the core, and have a "
                "thread whose clock moves. Policies: StaticLimits, WeightedShare, BurstCredits, Adaptive, Ladder, "
                "BusTime, each at each tick, through the guard, with the actions carried out; PSI, probe and journal.",
                details=found,
            )
        )
    return rows


def _facts(vms: int, time_ns: int) -> Facts:
    told = {
        f"vm-{n}": VmFacts(
            *(f"vm-{n}", "acme", 1.0, 1, 1000 + n, 5000 + n, 0.01 * n, n),
            **{"cpu": 0.1, "run_delay": 0.02, "by_reason": {"x86_bus_lock": 1000 + n, "io": 3000, "mmio": 1000}},
        )
        for n in range(vms)
    }
    host = HostFacts(cpus=os.cpu_count() or 1, cpu_pressure=0.2, lock_ns=6.0, memory_ns=90.0)
    return Facts(time_ns, 0.1, orc.Limit(rate=5000), None, {}, MappingProxyType(told), host)


async def journal(options: Options) -> list[Row]:
    """60,000 aggregates a second, and whether all of them are in the file."""
    seconds, each = options.pick(10, 1), 6000
    with tempfile.TemporaryDirectory(dir=options.build) as folder:
        path = Path(folder) / "fleet.db"
        kept = Journal(path)
        kept.begin(time.monotonic_ns(), "benchmark", None)
        longest, waiting, begun, used = 0.0, 0, time.perf_counter(), time.process_time()
        for number in range(seconds * 10):
            await trio.sleep(max(0.0, begun + number / 10 - time.perf_counter()))
            facts = _facts(each, time.monotonic_ns())
            start = time.perf_counter()
            kept.aggregate(facts)
            longest = max(longest, time.perf_counter() - start)
            waiting = max(waiting, kept.statistics().waiting)
        passed, cpu = time.perf_counter() - begun, time.process_time() - used
        kept.end(time.monotonic_ns())
        dropped, asked = kept.statistics().dropped, seconds * 10 * each
        with read_journal(path) as read:
            found = int(read.query("SELECT count(*) FROM aggregates")[0][0])
        size = path.stat().st_size
    return [
        Row(
            what=f"journal, {seconds} s",
            measured=f"{asked / passed:,.0f} aggregates/s, {asked - found} lost, {cpu / passed:.0%} of a core",
            bound="60,000/s, 0 lost",
            ok=found == asked and not dropped and asked / passed >= 0.95 * 10 * each,
            note=f"{each} VMs ten times a second, played. The longest that the fleet's thread was held up: "
            f"{longest * 1e3:.1f} ms; {waiting} rows waited at most; {size / found:.0f} bytes each.",
            details={"per_second": asked / passed, "lost": asked - found, "held_up": longest, "waiting": waiting},
        )
    ]
