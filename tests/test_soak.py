"""Many VMs at once, and VMs coming and going: nothing grows. `ORCHESTRA_SOAK=300` goes on for 300 seconds.

The suite takes half as long and has 200 VMs at once; with ORCHESTRA_SOAK there are 500, as in CI and in `nox -s soak`.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import trio
import trio.testing

import orchestra as orc
from benchmarks.rate import excess
from conftest import guest, word
from orchestra.native.core import FleetCore

pytestmark = [pytest.mark.slow, pytest.mark.timed]

SECONDS = float(os.environ.get("ORCHESTRA_SOAK", "1"))
MANY = 500 if "ORCHESTRA_SOAK" in os.environ else 200
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


@pytest.mark.kvm
async def test_many_vms_run_at_once_and_all_of_them_exit(nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        code = orc.FlatImage(code=ONE_EXIT)
        async with trio.open_nursery() as nursery:
            for index in range(MANY):
                nursery.start_soon(fleet.launch, orc.VmSpec(name=f"vm{index}", boot=code, memory=64 * orc.KiB))
        with trio.fail_after(60):
            for vm in fleet.vms.values():
                assert await vm.wait() == orc.Halted()
        statistics = fleet.statistics()
        assert statistics.exits == {"io": MANY, "hlt": MANY}
        assert statistics.launched == MANY


@pytest.mark.kvm
async def test_many_vms_that_are_paused_in_the_middle_of_a_storm_stop_together(nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off", exit_limit=orc.Limit(rate=2000)) as fleet:
        vms = [
            await fleet.launch(orc.VmSpec(name=f"vm{i}", boot=orc.FlatImage(code=STORM), memory=64 * orc.KiB))
            for i in range(MANY)
        ]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for vm in vms:
                    nursery.start_soon(vm.pause)
            assert fleet.statistics().states == {"paused": MANY}
            outcomes = await fleet.stop("enough")
        assert set(outcomes.values()) == {orc.Stopped("enough")}


@pytest.mark.kvm
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


# ---- kicks on the emulated backend

FINISH, ROUNDS, SHOWN, SPLIT = 0x8000, 0x8004, 0x8008, 0x903E  # tests/guests/soak.inc
CONSTANT = 0x1001  # in the first instruction of soak_rewritten
DEVICE = range(0xE0000000, 0xE0000008)
PORT = range(0x500, 0x501)
ENGINES = 16
PATIENCE = 60  # seconds that one kick may take, on a machine that does a lot besides
THROTTLED = orc.Limit(rate=500, burst=5)
KINDS: list[tuple[str, int, dict[str, object]]] = [
    ("spins", 16, {}),
    ("locks", 64, {"bus_lock_detection": "fault-like"}),
    ("locks", 64, {"bus_lock_detection": "trap-like"}),
    ("locks", 64, {"bus_lock_detection": "fault-like", "limit": THROTTLED}),
    ("locks", 64, {"bus_lock_detection": "trap-like", "limit": THROTTLED}),
    ("asks", 32, {}),
    ("modifies", 32, {}),
    ("rewritten", 64, {}),
]


@pytest.fixture
def watchdog(capfd: pytest.CaptureFixture[str]) -> Iterator[object]:
    """Call it now and then: if it is not called for long, all stacks are printed and the process ends, as what hangs in
    C can't be made to raise."""
    with capfd.disabled():
        stderr = os.dup(2)

    def alive() -> None:
        faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=stderr)

    alive()
    yield alive
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


class Mappings:
    """This process's mappings, and those that unicorn puts translated code in."""

    def __init__(self) -> None:
        with open("/proc/self/maps") as maps:
            lines = maps.readlines()
        self.all = len(lines)
        self.code = sum("rwxp" in line for line in lines)


async def answer(vm: orc.Vm, answered: dict[str, int]) -> None:
    """The device of soak_asks: gives a number, and takes it back."""
    async with vm.requests(mmio=DEVICE, ports=PORT) as requests:
        async for request in requests:
            number = answered.get(vm.name, 0)
            if not request.write:
                request.answer(number.to_bytes(4, "little"))
                continue
            assert request.data == number.to_bytes(4, "little")[: request.size]
            if request.address in PORT:
                answered[vm.name] = number + 1
            request.answer()


async def kick(vm: orc.Vm, dice: random.Random) -> None:
    """Once, at a moment that nobody chose; look whether it has stopped, and let it go on."""
    if dice.random() < 0.5:
        await trio.sleep(dice.random() / 500)
    if dice.random() < 0.4:
        registers = await vm.inspect()
        assert 0x1000 <= registers.rip < 0x1100
        return
    await vm.pause()
    if dice.random() < 0.2:
        seen = still(vm)
        await trio.sleep(dice.random() / 500)
        assert still(vm) == seen, "it went on, paused as it was"
    if vm.name.startswith("rewritten") and dice.random() < 0.2:
        await rewrite(vm, dice.randrange(1, 1 << 31))
        return
    await vm.resume()


def still(vm: orc.Vm) -> object:
    """What does not change while it is paused. An access that is answered meanwhile is completed, and no more."""
    memory = vm.read_memory(FINISH, 0x2000)
    return memory if vm.name.startswith("asks") else (memory, vm.registers())


async def rewrite(vm: orc.Vm, number: int) -> None:
    """Give a paused guest another constant: it must not go on with the code that was translated."""
    vm.write_memory(CONSTANT, struct.pack("<I", number))
    rounds = word(vm, ROUNDS)
    await vm.resume()
    while (word(vm, ROUNDS) - rounds) % (1 << 32) < 2:  # noqa: ASYNC110  # a guest tells nobody that it has gone on
        await trio.sleep(0.0001)
    await vm.pause()
    assert word(vm, SHOWN) == number
    await vm.resume()


async def soak(kicks: int, seconds: float, alive: object, seed: int) -> int:
    """So many kicks or seconds, whichever comes first, over 16 engines; then each guest ends, and its counts are looked
    at. Returns how many kicks."""
    answered: dict[str, int] = {}
    done = 0
    async with orc.open_fleet(backend="emulated") as fleet, trio.open_nursery() as devices:
        vms = []
        for number in range(ENGINES):
            kind, mode, more = KINDS[number % len(KINDS)]
            boot = orc.FlatImage(code=guest(f"soak_{kind}"), mode=mode)  # type: ignore[arg-type]
            spec = orc.VmSpec(name=f"{kind}-{number}", boot=boot, **more)  # type: ignore[arg-type]
            vm = await fleet.launch(spec, paused=True)
            if kind == "asks":
                devices.start_soon(answer, vm, answered)
                await trio.testing.wait_all_tasks_blocked(0.001)
            await vm.resume()
            vms.append(vm)
        end = trio.current_time() + seconds

        async def kicker(vm: orc.Vm, dice: random.Random) -> None:
            nonlocal done
            while done < kicks and trio.current_time() < end:
                done += 1
                with trio.fail_after(PATIENCE):
                    await kick(vm, dice)
                if done % 500 == 0:
                    alive()  # type: ignore[operator]

        async with trio.open_nursery() as nursery:
            for number, vm in enumerate(vms):
                nursery.start_soon(kicker, vm, random.Random(seed * ENGINES + number))
        for vm in vms:
            vm.write_memory(FINISH, struct.pack("<I", 1))
        for vm in vms:
            with trio.fail_after(PATIENCE):
                assert await vm.wait() == orc.Halted(), vm.name
            check_counts(vm, answered)
        devices.cancel_scope.cancel()
    return done


def check_counts(vm: orc.Vm, answered: dict[str, int]) -> None:
    statistics, rounds, kind = vm.statistics(), word(vm, ROUNDS), vm.name.partition("-")[0]
    assert rounds > 0
    assert statistics.missed == 0
    if kind == "locks":
        assert statistics.bus_locks == word(vm, SPLIT) == rounds
    elif kind == "modifies":
        assert word(vm, SPLIT) == rounds
        assert statistics.bus_locks == (rounds + 1) // 2
    else:
        assert statistics.bus_locks == 0
    exits = {"hlt": 1}
    if kind == "locks":
        exits["x86_bus_lock"] = rounds
    elif kind == "modifies":
        exits["x86_bus_lock"] = (rounds + 1) // 2
    elif kind == "asks":
        assert answered[vm.name] == rounds
        exits |= {"mmio": 2 * rounds, "io": rounds}
    assert statistics.exits == exits


@pytest.mark.emulated
@pytest.mark.parametrize("makes_way", [True, False])
async def test_no_kick_of_a_busy_emulated_guest_is_lost_and_all_counts_are_exact(
    makes_way, monkeypatch, watchdog, nothing_left
):
    """Guests that make way for each other are met asleep, most of the time; those that don't, wherever they are."""
    if not makes_way:
        monkeypatch.setattr(FleetCore, "urgently", lambda core: nullcontext())
    await soak(200, SECONDS / 2, watchdog, seed=0)  # caches, arenas and idle threads settle
    gc.collect()
    before, mappings, memory = holds(), Mappings(), resident()
    start = trio.current_time()
    kicks = await soak(100_000, SECONDS / 2, watchdog, seed=1)
    took = trio.current_time() - start
    gc.collect()
    after, now, grown = holds(), Mappings(), resident() - memory
    print(
        f"{kicks} kicks in {took:.0f} s over {ENGINES} engines; {grown / 1024:+.0f} KiB, {now.all - mappings.all:+d} "
        f"mappings, {after[0] - before[0]:+d} descriptors, {after[1] - before[1]:+d} threads",
        file=sys.stderr,
    )
    assert after[0] == before[0]
    assert after[1] <= before[1] + 4  # trio keeps idle threads for ten seconds
    assert now.code == mappings.code
    assert now.all <= mappings.all + 40  # the allocator's arenas, one at most for each thread there was
    assert grown < 4 * orc.MiB


@pytest.mark.emulated
async def test_300_emulated_vms_keep_to_a_fleets_limit_in_every_window(nothing_left):
    n, limit = 300, orc.Limit(rate=2000, burst=50, max_delay=None)
    times: list[float] = []

    async def listen(exits: orc.Exits) -> None:
        async for exit in exits:
            times.append(exit.time / 1e9)

    async with orc.open_fleet(backend="emulated", limit=limit) as fleet:
        code = orc.FlatImage(code=guest("soak_locks"), mode=64)
        detections = ["fault-like", "trap-like"] * (n // 2)
        specs = [orc.VmSpec(name=f"vm{i}", boot=code, bus_lock_detection=how) for i, how in enumerate(detections)]
        vms = [await fleet.launch(spec, paused=True) for spec in specs]
        async with fleet.exits(orc.BusLock) as exits, trio.open_nursery() as nursery:
            nursery.start_soon(listen, exits)
            for vm in vms:
                await vm.resume()
            await trio.sleep(SECONDS / 2)
            for vm in vms:
                await vm.pause()
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        assert fleet.statistics().bus_locks == len(times)
        # Of each vCPU one lock may be in flight when the burst is used up: it is charged when it is seen.
        assert excess(times, limit.rate, limit.tokens) <= n - 1 + 1e-6
        assert len(times) > 0.5 * limit.rate * (max(times) - min(times))
        for vm, how in zip(vms, detections, strict=True):
            seen, done = vm.statistics().bus_locks, word(vm, SPLIT)
            assert seen in ((done,) if how == "trap-like" else (done, done + 1)), vm.name
