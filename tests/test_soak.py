"""Many VMs at once, and VMs coming and going: nothing grows. `ORCHESTRA_SOAK=300` goes on for 300 seconds."""

from __future__ import annotations

import gc
import os
import sys
import threading

import pytest
import trio

import orchestra as orc

pytestmark = [pytest.mark.kvm, pytest.mark.slow]

SECONDS = float(os.environ.get("ORCHESTRA_SOAK", "4"))
STORM = b"\xe6\x80\xeb\xfc"  # out 0x80, al / jmp
ONE_EXIT = b"\xe6\x80\xf4"  # out 0x80, al / hlt
SPECS = [
    ("halts", ONE_EXIT, {}),
    ("storms", STORM, {"exit_limit": orc.Limit(rate=200)}),
    ("two", STORM, {"vcpus": 2, "exit_limit": orc.Limit(rate=200)}),
    ("fails", b"\xcd\x03", {}),
]


def resident() -> int:
    """Bytes of memory that are this process's own."""
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon"))


def holds() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


async def test_500_vms_run_at_once_and_all_of_them_exit(nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        code = orc.FlatImage(code=ONE_EXIT)
        async with trio.open_nursery() as nursery:
            for index in range(500):
                nursery.start_soon(fleet.launch, orc.VmSpec(name=f"vm{index}", boot=code, memory=64 * orc.KiB))
        with trio.fail_after(60):
            for vm in fleet.vms.values():
                assert await vm.wait() == orc.Halted()
        statistics = fleet.statistics()
        assert statistics.exits == {"io": 500, "hlt": 500}
        assert statistics.launched == 500


async def test_500_vms_that_are_paused_in_the_middle_of_a_storm_stop_together(nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off", exit_limit=orc.Limit(rate=2000)) as fleet:
        vms = [
            await fleet.launch(orc.VmSpec(name=f"vm{i}", boot=orc.FlatImage(code=STORM), memory=64 * orc.KiB))
            for i in range(500)
        ]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for vm in vms:
                    nursery.start_soon(vm.pause)
            assert fleet.statistics().states == {"paused": 500}
            outcomes = await fleet.stop("enough")
        assert set(outcomes.values()) == {orc.Stopped("enough")}


async def test_vms_that_come_and_go_leave_memory_descriptors_and_threads_as_they_were(nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:

        async def churn(rounds: int, worker: int) -> None:
            for number in range(rounds):
                name, code, more = SPECS[(number + worker) % len(SPECS)]
                mode = 32 if name == "fails" else 16
                boot = orc.FlatImage(code=code, mode=mode)
                vm = await fleet.launch(orc.VmSpec(name=f"{name}-{worker}", boot=boot, **more))
                if name in ("halts", "fails"):
                    await vm.wait()
                else:
                    async with fleet.exits(orc.Io, vm=vm, capacity=16) as exits:
                        await exits.receive()
                    await vm.pause()
                await vm.stop()

        async def batch(rounds: int) -> int:
            async with trio.open_nursery() as nursery:
                for worker in range(4):
                    nursery.start_soon(churn, rounds, worker)
            gc.collect()
            return rounds * 4

        await batch(100)  # caches, arenas and idle threads settle
        before, memory, done = holds(), resident(), 0
        end = trio.current_time() + SECONDS
        while trio.current_time() < end:
            done += await batch(25)
        after = holds()
        grown = resident() - memory
        print(f"{done} VMs in {SECONDS:g} s, {grown / done:.0f} bytes each", file=sys.stderr)
        assert dict(fleet.vms) == {}
        assert after[0] == before[0]
        assert after[1] <= before[1] + 4  # trio keeps idle threads for ten seconds
        assert grown < 2 * orc.MiB + done * 64
