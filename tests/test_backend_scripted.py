"""The scripted backend by itself: exits at their times, accounted by the real core, answered, interrupted and bad."""

from __future__ import annotations

import errno
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from conftest import drained
from orchestra.backend import RunResult, choose
from orchestra.backend.entry import REAL, EntryState
from orchestra.backend.memory import GuestMemory
from orchestra.backend.registers import Registers
from orchestra.backend.scripted import (
    ScriptedBackend,
    ScriptedEngine,
    ScriptedExit,
    bus_lock,
    failed_run,
    hlt,
    io_read,
    io_write,
    mmio_read,
    mmio_write,
    triple_fault,
)
from orchestra.machine.devices.bus import Bus
from orchestra.model import exits
from orchestra.model.errors import SpecError
from orchestra.model.spec import FlatImage, Limit, Meter, VmSpec
from orchestra.native import ffi
from orchestra.native.core import Bucket, Command, FleetCore, VcpuCore
from orchestra.native.records import BUS_LOCK, GUEST_MODE, decode

Script = Iterable[ScriptedExit]
FLAGS = BUS_LOCK | GUEST_MODE


def spec(**more: object) -> VmSpec:
    return VmSpec(**{"name": "vm", "boot": FlatImage(code=b"\xf4"), **more})  # type: ignore[arg-type]


class Rig:
    """One machine of a scripted backend, and what its core needs."""

    def __init__(self, backend: ScriptedBackend, core: FleetCore, engines: list[ScriptedEngine]) -> None:
        self.backend = backend
        self.core = core
        self.engines = engines
        self.engine = engines[0]

    def exit(self) -> exits.Exit:
        return decode(self.engine.last_exit(), "vm", 0)

    async def runs(self, count: int) -> list[RunResult]:
        return [await self.engine.run() for _ in range(count)]


class Nobody:
    """A device that these tests stand in for."""

    def read(self, offset: int, size: int) -> int:
        raise AssertionError

    def write(self, offset: int, size: int, value: int) -> None:
        raise AssertionError


@asynccontextmanager
async def rig(
    script: Script | Callable[[VmSpec, int], Script] | None,
    *,
    limit: Limit | None = None,
    meter: Meter = Meter.EXITS,
    bus_locks: bool = True,
    vcpus: int = 1,
) -> AsyncIterator[Rig]:
    scripts = script if callable(script) or script is None else {"vm": script}
    backend = ScriptedBackend(scripts)
    fleet, bucket = FleetCore(), Bucket()
    cores = [VcpuCore(fleet, id) for id in range(vcpus)]
    bucket.set(limit, backend.now())
    for core in cores:
        core.set_bucket(meter, 2, bucket)
    wanted = spec(vcpus=vcpus)
    memory = GuestMemory(wanted)
    states = [EntryState(mode=REAL, registers=Registers(rip=0x1000, rsp=0x8000, rdi=id)) for id in range(vcpus)]
    machine = backend.create(wanted, cores, memory, states, bus_locks=bus_locks)
    # Python answers everywhere, so that each access comes back: what the core answers is tested with its buses.
    ports, mmio = Bus("ports", 1 << 16), Bus("mmio", 1 << 52)
    for core in cores:
        core.set_buses(ports.handle, mmio.handle)
    for bus in (ports, mmio):
        bus.claim(range(bus.size), Nobody())
    made = Rig(backend, fleet, list(machine.engines))
    made.bucket = bucket  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        for engine in machine.engines:
            engine.close()
        for core in cores:
            core.close()
        machine.close()
        memory.close()
        bucket.close()
        fleet.close()


# ---- exits and their times


async def test_vm_without_a_script_halts_at_once(autojump_clock):
    async with rig(None) as r:
        assert await r.engine.run() is RunResult.EXIT
        assert type(r.exit()) is exits.Hlt


async def test_script_is_played_in_order_and_ends_in_a_halt(autojump_clock):
    async with rig([bus_lock(rip=0x1234), triple_fault(), ScriptedExit("debug", args=(1, 2, 3, 4))]) as r:
        seen = []
        for _ in range(5):
            await r.engine.run()
            seen.append(type(r.exit()))
        assert seen == [exits.BusLock, exits.ShutdownExit, exits.Debug, exits.Hlt, exits.Hlt]
        assert r.engine.core.counters(1).exits == {"x86_bus_lock": 1, "shutdown": 1, "debug": 1, "hlt": 2}


async def test_exits_come_after_their_times_on_the_trio_clock(autojump_clock):
    async with rig([hlt(after=3600), hlt(after=0.25), hlt()]) as r:
        r.engine.core.subscribe((1 << 64) - 1)
        begun = r.backend.now()
        await r.runs(3)
        assert [record.time - begun for record in drained(r.core)] == pytest.approx(
            [3600e9, 3600.25e9, 3600.25e9], abs=1e3
        )


async def test_exit_carries_its_flags_and_rip(autojump_clock):
    async with rig([ScriptedExit("hlt", flags=FLAGS, rip=5), bus_lock(), hlt()]) as r:
        await r.engine.run()
        assert (r.exit().bus_lock, r.exit().guest_mode, r.exit().rip) == (True, True, 5)
        await r.engine.run()
        assert (r.exit().bus_lock, r.exit().guest_mode, r.exit().rip) == (True, False, None)
        await r.engine.run()
        assert r.exit().bus_lock is False


async def test_each_vcpu_plays_a_list_from_its_start_and_a_function_tells_them_apart(autojump_clock):
    async with rig([triple_fault()], vcpus=2) as r:
        for engine in r.engines:
            await engine.run()
            assert engine.core.counters(1).exits == {"shutdown": 1}
    async with rig(lambda spec, vcpu: [hlt(), triple_fault()][vcpu:], vcpus=2) as r:
        for engine, name in zip(r.engines, ["hlt", "shutdown"], strict=True):
            await engine.run()
            assert engine.core.counters(1).exits == {name: 1}


# ---- bus locks: counted by the flag (rule 1)


@pytest.mark.parametrize(
    ("step", "locks"),
    [
        (bus_lock(), 1),
        (ScriptedExit("x86_bus_lock"), 0),  # the reason without the flag
        (io_write(0x80, b"\1", flags=BUS_LOCK), 1),
        (mmio_read(1 << 32, 4, flags=BUS_LOCK), 1),
        (ScriptedExit("unknown", flags=BUS_LOCK), 1),  # reason 0
        (ScriptedExit("dirty_ring_full", flags=BUS_LOCK), 1),
        (ScriptedExit("notify", flags=BUS_LOCK, args=(0,)), 1),
        (ScriptedExit(60000, flags=BUS_LOCK), 1),  # a number from the future
        (failed_run(errno.EIO, flags=BUS_LOCK), 0),  # stale flags of a failed call
        (ScriptedExit("memory_fault", flags=BUS_LOCK, errno=errno.EFAULT), 0),
    ],
    ids=str,
)
async def test_bus_lock_counts_by_the_flag_of_a_run_that_returned_0(step, locks, autojump_clock):
    async with rig([step]) as r:
        await r.engine.run()
        assert r.engine.core.counters(1).bus_locks == locks


async def test_host_that_sees_no_bus_locks_has_no_such_exits_and_no_flags(autojump_clock):
    script = [bus_lock(after=1), io_write(0x80, b"\1", flags=FLAGS)]
    async with rig(script, bus_locks=False) as r:
        assert await r.engine.run() is RunResult.IO
        assert (r.exit().bus_lock, r.exit().guest_mode) == (False, True)
        assert r.engine.core.counters(1).exits == {"io": 1}
        assert trio.current_time() == pytest.approx(1, abs=1e-6)  # the guest ran all the same


async def test_endless_locks_that_nobody_sees_can_be_cancelled(autojump_clock):
    scope = trio.CancelScope()

    def script() -> Iterator[ScriptedExit]:
        for played in range(1000):  # if it were endless, a backend that never looks up would hang here
            if played == 100:
                scope.cancel()
            yield bus_lock()

    async with rig(script(), bus_locks=False) as r:
        with scope:
            await r.engine.run()
        assert scope.cancelled_caught


# ---- failures


async def test_failed_run_gives_its_errno_and_counts_nothing(autojump_clock):
    async with rig([failed_run(errno.EIO), hlt()]) as r:
        assert await r.engine.run() is RunResult.ERROR
        assert "EIO" in r.engine.error()
        assert r.engine.core.counters(1).exits == {}
        assert await r.engine.run() is RunResult.EXIT


async def test_memory_fault_comes_with_efault_and_is_an_exit_all_the_same(autojump_clock):
    async with rig([ScriptedExit("memory_fault", args=(8, 0x5000, 4096), errno=errno.EFAULT)]) as r:
        assert await r.engine.run() is RunResult.EXIT
        exit = r.exit()
        assert isinstance(exit, exits.MemoryFault)
        assert (exit.flags, exit.address, exit.size) == (8, 0x5000, 4096)


# ---- accesses


async def test_port_write_comes_back_with_its_bytes(autojump_clock):
    async with rig([io_write(0x3F8, b"ab")]) as r:
        assert await r.engine.run() is RunResult.IO
        access = r.engine.access
        assert (access.address, access.size, access.count, access.write) == (0x3F8, 2, 1, 1)
        assert ffi.buffer(access.data, 2)[:] == b"ab"
        assert r.exit().data == b"ab"  # type: ignore[attr-defined]
        await r.engine.run()
        assert r.engine.answers == []


@pytest.mark.parametrize(
    ("step", "why", "address", "size"),
    [(io_read(0x60, 2), RunResult.IO, 0x60, 2), (mmio_read(0xFEC0_0000, 8), RunResult.MMIO, 0xFEC0_0000, 8)],
)
async def test_read_keeps_what_it_was_answered(step, why, address, size, autojump_clock):
    async with rig([step, hlt()]) as r:
        assert await r.engine.run() is why
        access = r.engine.access
        assert (access.address, access.size, access.count, access.write) == (address, size, 1, 0)
        ffi.memmove(access.data, b"answered", size)
        assert r.engine.answers == []
        await r.engine.run()
        assert r.engine.answers == [(address, b"answered"[:size])]


async def test_string_read_keeps_the_answers_of_all_its_elements(autojump_clock):
    async with rig([ScriptedExit("io", args=(0x60, 2, 3, 0))]) as r:
        await r.engine.run()
        assert (r.engine.access.size, r.engine.access.count) == (2, 3)
        ffi.memmove(r.engine.access.data, b"abcdef", 6)
        await r.engine.run()
        assert r.engine.answers == [(0x60, b"abcdef")]


async def test_string_write_may_be_a_page(autojump_clock):
    page = bytes(range(256)) * 16
    async with rig([ScriptedExit("io", args=(0x60, 4, 1024, 1), data=page)]) as r:
        seen = b""
        while await r.engine.run() is RunResult.IO:
            access = r.engine.access
            assert access.count <= 64  # a chunk, between which it looks at its commands
            seen += ffi.buffer(access.data, 4 * access.count)[:]
        assert seen == page


async def test_mmio_write_comes_back_with_its_bytes(autojump_clock):
    async with rig([mmio_write(0xFEE0_0000, b"1234")]) as r:
        assert await r.engine.run() is RunResult.MMIO
        assert ffi.buffer(r.engine.access.data, 4)[:] == b"1234"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScriptedExit("buslock"), r"reason='buslock': must be .* x86_bus_lock"),
        (lambda: ScriptedExit(-1), "reason=-1"),
        (lambda: ScriptedExit(1 << 16), "reason=65536: must be a number from 0 to 65535"),
        (lambda: ScriptedExit(None), "reason=None"),  # type: ignore[arg-type]
        (lambda: hlt(after=-1), "after=-1: must be seconds"),
        (lambda: hlt(after=math.nan), "after=nan"),
        (lambda: hlt(after=math.inf), "after=inf"),
        (lambda: ScriptedExit("hlt", args=(1, 2, 3, 4, 5, 6)), "5 at most"),
        (lambda: ScriptedExit("io", args=(1, 1)), r"\(port, size, count, write\)"),
        (lambda: ScriptedExit("mmio"), r"\(address, size, write\)"),
        (lambda: io_write(1, b"abc"), "1, 2, 4 or 8 bytes"),
        (lambda: io_write(1, b""), "1, 2, 4 or 8 bytes"),
        (lambda: mmio_read(1, 16), "1, 2, 4 or 8 bytes"),
        (lambda: ScriptedExit("io", args=(1, 4, 1025, 0)), "up to 4096 bytes"),
        (lambda: ScriptedExit("io", args=(1, 1, 1, 1), data=b"12"), "size \\* count"),
        (lambda: ScriptedExit("io", args=(1, 1, 1, 0), data=b"1"), "a read none"),
    ],
)
def test_exit_that_no_guest_could_do_is_refused_when_it_is_written(make, message):
    with pytest.raises(SpecError, match=message):
        make()


# ---- waits for a turn, commands, kicks

STRICT = Limit(rate=1, burst=1, max_delay=None)


async def test_guest_over_its_limit_waits_for_its_turn_by_the_clock(autojump_clock):
    async with rig([hlt()] * 4, limit=STRICT) as r:
        await r.runs(4)
        assert trio.current_time() == pytest.approx(3, abs=1e-5)
        counters = r.engine.core.counters(r.backend.now())
        assert (counters.waits, counters.released) == (3, 0)
        assert counters.throttled == pytest.approx(3e9, rel=1e-5)


async def test_wait_is_no_part_of_the_time_that_the_guest_runs(autojump_clock):
    async with rig([hlt(), hlt(after=10)], limit=STRICT) as r:
        await r.runs(2)
        assert trio.current_time() == pytest.approx(11, abs=1e-5)


async def test_max_delay_releases_and_is_counted(autojump_clock):
    async with rig([hlt()] * 2, limit=Limit(rate=0.001, burst=1, max_delay=2)) as r:
        await r.runs(2)
        assert trio.current_time() == pytest.approx(2, abs=1e-5)
        assert r.engine.core.counters(r.backend.now()).released == 1


@pytest.mark.parametrize("limit", [None, Limit(rate=1000, burst=1, max_delay=None)], ids=["none", "a higher one"])
async def test_changed_limit_ends_a_wait_at_once_and_only_what_was_waited_counts(limit, autojump_clock):
    async with rig([hlt()] * 2, limit=Limit(rate=0.001, burst=1, max_delay=None)) as r:
        await r.engine.run()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.engine.run)
            await trio.sleep(5)
            r.bucket.set(limit, r.backend.now())  # type: ignore[attr-defined]
            r.core.limits_changed()
            r.backend.limits_changed()
        assert trio.current_time() == pytest.approx(5, abs=0.01)
        counters = r.engine.core.counters(r.backend.now())
        assert counters.throttled == pytest.approx(5e9, rel=0.01)
        assert counters.throttled_since is None


async def test_command_comes_through_in_the_middle_of_a_wait_and_the_turn_is_kept(autojump_clock):
    async with rig([hlt()] * 2, limit=Limit(rate=0.1, burst=1, max_delay=None)) as r:
        await r.engine.run()
        seen: list[RunResult] = []

        async def run() -> None:
            seen.append(await r.engine.run())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(4)
            r.engine.core.command(set=Command.PAUSE)
            r.engine.kick()
        assert seen == [RunResult.COMMAND]
        assert trio.current_time() == pytest.approx(4, abs=1e-5)
        r.engine.core.command(clear=Command.PAUSE)
        await r.engine.run()
        assert trio.current_time() == pytest.approx(10, abs=1e-5)
        assert r.engine.core.counters(r.backend.now()).throttled == pytest.approx(10e9, rel=1e-5)


async def test_command_comes_through_while_the_guest_runs_and_it_runs_the_rest_later(autojump_clock):
    async with rig([hlt(after=10)]) as r:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.engine.run)
            await trio.sleep(4)
            r.engine.core.command(set=Command.PAUSE)
            r.engine.kick()
        await trio.sleep(100)
        r.engine.core.command(clear=Command.PAUSE)
        assert await r.engine.run() is RunResult.EXIT
        assert trio.current_time() == pytest.approx(110, abs=1e-5)


async def test_kick_without_a_command_changes_nothing(autojump_clock):
    async with rig([hlt(after=10)]) as r:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.engine.run)
            for _ in range(3):
                await trio.sleep(1)
                r.engine.kick()
        assert trio.current_time() == pytest.approx(10, abs=1e-5)
        assert r.engine.core.counters(1).exits == {"hlt": 1}


async def test_cancelled_wait_is_a_wait_that_ended(autojump_clock):
    async with rig([hlt()] * 2, limit=Limit(rate=0.1, burst=1, max_delay=None)) as r:
        await r.engine.run()
        with trio.move_on_after(3):
            await r.engine.run()
        counters = r.engine.core.counters(r.backend.now())
        assert counters.throttled_since is None
        assert counters.throttled == pytest.approx(3e9, rel=1e-5)


async def test_sleeping_vcpu_is_woken_once_and_not_before(autojump_clock):
    async with rig([]) as r:
        awake: list[bool] = []

        async def sleep() -> None:
            await r.engine.sleep(r.engine.core.wakes())
            awake.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleep)
            await wait_all_tasks_blocked()
            assert awake == []
            r.engine.wake()
        assert awake == [True]


async def test_wake_up_before_the_sleep_is_not_lost(autojump_clock):
    async with rig([]) as r:
        seen = r.engine.core.wakes()
        r.engine.wake()
        with trio.fail_after(1):
            await r.engine.sleep(seen)


async def test_answer_after_the_end_wakes_nobody(autojump_clock):
    async with rig([]) as r:
        engine = r.engine
    engine.wake()  # its core is gone


# ---- the backend


async def test_registers_are_those_of_the_entry():
    async with rig([], vcpus=2) as r:
        engine = r.engines[1]
        registers = engine.registers()
        assert (registers.rip, registers.rsp, registers.rdi, registers.rax, registers.rflags) == (
            0x1000,
            0x8000,
            1,
            0,
            2,
        )
        with pytest.raises(NotImplementedError):
            engine.special_registers()


async def test_backend_says_what_it_pretends_to_be(autojump_clock):
    assert choose("scripted").name == "scripted"
    backend = ScriptedBackend(detection=None)
    assert backend.bus_lock_detection() is None
    assert ScriptedBackend(detection="trap-like").bus_lock_detection() == "trap-like"
    assert choose(backend) is backend
    assert not backend.blocking
    assert backend.now() == 1  # never 0, which the core reads as "not waiting"


async def test_machines_are_listed_by_name_until_the_backend_is_closed():
    async with rig([]) as r:
        assert list(r.backend.machines) == ["vm"]
        assert r.backend.machines["vm"].engines == r.engines
        r.backend.close()
        assert r.backend.machines == {}


def test_script_takes_no_interrupts():
    with pytest.raises(SpecError, match="irqchip=True needs backend='kvm'"):
        ScriptedBackend().check(spec(irqchip=True))
