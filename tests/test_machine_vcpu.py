"""What exits mean, and a vCPU's life between run, answer, pause and end."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

import orchestra as orc
from conftest import Stage, blank, play
from orchestra.backend.scripted import ScriptedExit, bus_lock, failed_run, hlt, io_read, io_write, mmio_read, mmio_write
from orchestra.machine.vcpu import Vcpu

BUS_LOCK = 2
FUTURE = 60
STORM = b"\xe6\x80\xeb\xfc"  # out 0x80, al / jmp


async def outcome_of(*script: ScriptedExit, **options: object) -> tuple[orc.Outcome, orc.VmStatistics]:
    async with play(script, **options) as fleet:
        vm = await fleet.launch(blank(devices=[orc.ExitPort()]))
        return await vm.wait(), vm.statistics()


# ---- ends, over all backends


async def test_hlt_without_an_irqchip_ends_as_halted(stage: Stage):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("halt"))
        assert await vm.wait() == orc.Halted()
        assert vm.state == "stopped"
        assert vm.statistics().exits == {"hlt": 1}


async def test_the_exit_port_ends_it_with_the_guests_code(stage: Stage):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("exit_port"))
        assert await vm.wait() == orc.Shutdown("exit port", 42)


async def test_a_triple_fault_is_a_shutdown(stage: Stage):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("triple_fault", mode=32))
        assert await vm.wait() == orc.Shutdown("triple fault", None)


@pytest.mark.kvm
async def test_an_instruction_that_kvm_cant_emulate_fails_it_with_where_it_was(nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        # A jump to where no memory is: nothing can be fetched, so nothing can be emulated.
        code = bytes.fromhex("b878563412 bb000000d0 ffe3")
        vm = await fleet.launch(orc.VmSpec(name="lost", boot=orc.FlatImage(code=code, mode=32)))
        outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert "internal error" in outcome.reason
        assert outcome.vcpu == 0
        assert outcome.registers["rip"] == 0xD0000000
        assert outcome.registers["rax"] == 0x12345678
        assert outcome.registers["cr0"] & 1
        assert vm.state == "failed"
        assert "vCPU 0" in str(outcome)


# ---- ends, as the kernel can't be made to show them


@pytest.mark.parametrize(
    ("exit", "reason"),
    [
        (ScriptedExit("internal_error", args=(1,), data=b"\x0f\x0b"), "can't emulate an instruction, bytes 0f 0b"),
        (ScriptedExit("internal_error", args=(3,)), "event delivery"),
        (ScriptedExit("internal_error", args=(77,)), "internal error 77"),
        (ScriptedExit("fail_entry", args=(0x80000021, 1)), "refused to enter the guest: hardware reason 0x80000021"),
        (ScriptedExit(FUTURE), "exit reason 60"),
        (ScriptedExit(1000), "exit reason 1000"),
        (ScriptedExit("dirty_ring_full"), "dirty_ring_full"),
        (ScriptedExit("notify", args=(1,)), "notify"),
        (ScriptedExit("unknown", args=(5,)), "unknown"),
        (ScriptedExit("debug", args=(1, 0x1000, 0, 0)), "debug"),
        (ScriptedExit("hypercall", args=(9, 1, 2, 3)), "hypercall"),
        (ScriptedExit("x86_rdmsr", args=(0x10, 1)), "x86_rdmsr"),
        (ScriptedExit("memory_fault", args=(8, 0x5000, 4096)), "memory fault at 0x5000, 4096 bytes, flags 0x8"),
        (ScriptedExit("system_event", args=(3, 0)), "crash"),
        (ScriptedExit("system_event", args=(99, 0)), "system event 99"),
        (failed_run(errno.EFAULT), "EFAULT"),
        (failed_run(errno.EIO), "EIO"),
    ],
)
async def test_an_exit_that_nobody_handles_fails_it_with_the_reason(exit, reason):
    outcome, statistics = await outcome_of(exit)
    assert isinstance(outcome, orc.Failed)
    assert reason in outcome.reason
    assert outcome.vcpu == 0
    assert statistics.state == "failed"


@pytest.mark.parametrize(("type", "what"), [(1, "shutdown"), (2, "reset")])
async def test_a_system_event_of_the_guests_own_is_a_shutdown(type, what):
    outcome, _ = await outcome_of(ScriptedExit("system_event", args=(type, 0)))
    assert outcome == orc.Shutdown(f"system event: {what}")


@pytest.mark.parametrize(
    "exit",
    [
        ScriptedExit("notify", args=(0,)),
        ScriptedExit("intr"),
        ScriptedExit("irq_window_open"),
        ScriptedExit("set_tpr", args=(3,)),
        ScriptedExit("tpr_access", args=(0x1000, 1)),
        ScriptedExit("ioapic_eoi", args=(4,)),
        bus_lock(),
    ],
)
async def test_an_exit_that_needs_nothing_lets_the_guest_go_on(exit):
    outcome, statistics = await outcome_of(exit, exit, hlt())
    assert outcome == orc.Halted()
    assert statistics.exits[str(exit.reason)] == 2


async def test_an_exit_number_from_the_future_is_counted_under_its_number():
    _, statistics = await outcome_of(ScriptedExit(FUTURE))
    assert statistics.exits == {"exit_60": 1}
    _, statistics = await outcome_of(ScriptedExit(1000))
    assert statistics.exits == {"other": 1}


# ---- bus locks: by the flag, and by nothing else


async def test_a_bus_lock_exit_is_one_lock():
    _, statistics = await outcome_of(*[bus_lock()] * 3)
    assert statistics.bus_locks == 3


async def test_reason_33_without_the_flag_is_no_lock():
    _, statistics = await outcome_of(ScriptedExit("x86_bus_lock"), ScriptedExit(33), hlt())
    assert statistics.bus_locks == 0
    assert statistics.exits["x86_bus_lock"] == 2


async def test_the_flag_with_reason_0_is_one_lock():
    outcome, statistics = await outcome_of(ScriptedExit("unknown", flags=BUS_LOCK))
    assert isinstance(outcome, orc.Failed)
    assert statistics.bus_locks == 1


@pytest.mark.parametrize("flags", [BUS_LOCK, BUS_LOCK | 1, BUS_LOCK | 4, BUS_LOCK | 1 | 4])
async def test_a_lock_in_smm_or_in_a_guest_of_the_guest_is_one_lock(flags):
    async with play([ScriptedExit("x86_bus_lock", flags=flags), hlt(after=1)]) as fleet:
        async with fleet.exits(orc.BusLock) as exits:
            vm = await fleet.launch(blank())
            exit = await exits.receive()
            assert (exit.smm, exit.guest_mode, exit.bus_lock) == (bool(flags & 1), bool(flags & 4), True)
        assert vm.statistics().bus_locks == 1


async def test_the_flag_on_port_io_is_one_lock_and_the_access_is_answered():
    backend = orc.ScriptedBackend({"guest": [io_read(0x500, 4, flags=BUS_LOCK), io_write(0xF4, b"\7", flags=BUS_LOCK)]})
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(
            blank(devices=[orc.ExitPort()]), devices=[(range(0x500, 0x504), None, Constant(0x1234))]
        )
        assert await vm.wait() == orc.Shutdown("exit port", 7)
        assert vm.statistics().bus_locks == 2
        assert vm.statistics().exits == {"io": 2}
        assert backend.machines["guest"].engines[0].answers == [(0x500, b"\x34\x12\0\0")]


async def test_the_flag_on_mmio_is_one_lock_and_the_access_is_answered():
    script = [mmio_read(0xD0000000, 8, flags=BUS_LOCK), mmio_write(0xD0000000, b"x", flags=BUS_LOCK)]
    backend = orc.ScriptedBackend({"guest": script})
    device = Constant(7)
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(blank(), devices=[(None, range(0xD0000000, 0xD0001000), device)])
        assert await vm.wait() == orc.Halted()
        assert vm.statistics().bus_locks == 2
        assert backend.machines["guest"].engines[0].answers == [(0xD0000000, b"\7" + bytes(7))]
        assert device.written == [(0, 1, ord("x"))]


async def test_flags_left_by_a_failed_run_are_not_counted():
    outcome, statistics = await outcome_of(bus_lock(), failed_run(errno.EFAULT, flags=BUS_LOCK, reason="x86_bus_lock"))
    assert isinstance(outcome, orc.Failed)
    assert statistics.bus_locks == 1
    assert statistics.exits == {"x86_bus_lock": 1}


async def test_a_host_that_reports_none_counts_none_and_says_so():
    script = [bus_lock(), io_write(0x80, b"x", flags=BUS_LOCK), hlt()]
    async with orc.open_fleet(backend=orc.ScriptedBackend({"guest": script}, detection=None)) as fleet:
        vm = await fleet.launch(blank())
        assert await vm.wait() == orc.Halted()
        assert vm.statistics().bus_locks is None
        assert vm.statistics().exits == {"io": 1, "hlt": 1}


# ---- devices


class Constant:
    """Reads as a number, remembers writes."""

    def __init__(self, value: object) -> None:
        self.value = value
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return self.value  # type: ignore[return-value]  # some tests give it what is no number

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


class Broken:
    def read(self, offset: int, size: int) -> int:
        raise ValueError("a bug of yours")

    def write(self, offset: int, size: int, value: int) -> None:
        raise ValueError("a bug of yours")


@pytest.mark.parametrize("exit", [io_read(0x500), io_write(0x500, b"x"), mmio_read(0x500, 4), mmio_write(0x500, b"x")])
async def test_a_device_that_raises_fails_that_vm_alone(exit):
    async with play({"broken": [exit], "other": [hlt(after=1e9)]}) as fleet:
        other = await fleet.launch(blank("other"))
        vm = await fleet.launch(blank("broken"), devices=[(range(0x500, 0x504), range(0x500, 0x504), Broken())])
        outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert "Broken" in outcome.reason
        assert "a bug of yours" in outcome.reason
        assert "0x500" in outcome.reason
        assert other.state == "running"


@pytest.mark.kvm
async def test_a_device_that_raises_on_a_vcpu_thread_fails_that_vm_alone(nothing_left):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        other = await fleet.launch(stage.spec("spin", "other"))
        vm = await fleet.launch(stage.spec("ports", "broken"), devices=[(range(0x500, 0x504), None, Broken())])
        outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert "a bug of yours" in outcome.reason
        assert outcome.registers["rdx"] == 0x500
        assert other.state == "running"


@pytest.mark.parametrize("value", [None, "seven", 1.5])
async def test_a_device_that_reads_as_no_number_fails_the_vm(value):
    async with play([io_read(0x500)]) as fleet:
        vm = await fleet.launch(blank(), devices=[(range(0x500, 0x501), None, Constant(value))])
        assert isinstance(await vm.wait(), orc.Failed)


@pytest.mark.parametrize(("value", "size", "read"), [(-1, 1, b"\xff"), (-1, 4, b"\xff" * 4), (1 << 70 | 5, 2, b"\5\0")])
async def test_what_a_device_reads_as_is_cut_to_the_access(value, size, read):
    backend = orc.ScriptedBackend({"guest": [io_read(0x500, size)]})
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(blank(), devices=[(range(0x500, 0x504), None, Constant(value))])
        await vm.wait()
        assert backend.machines["guest"].engines[0].answers == [(0x500, read)]


async def test_an_access_that_reaches_beyond_a_claim_finds_nobody_there_and_the_device_before():
    backend = orc.ScriptedBackend({"guest": [io_read(0x503, 2), io_write(0x503, b"xy")]})
    device = Constant(0)
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(blank(), devices=[(range(0x500, 0x504), None, device)])
        await vm.wait()
        assert backend.machines["guest"].engines[0].answers == [(0x503, b"\0\xff")]
        assert device.written == [(3, 1, ord("x"))]
        assert vm.statistics().unclaimed == 2


async def test_a_wide_write_to_a_device_of_one_port_reaches_it():
    async with play([io_write(0xE9, b"hi"), hlt()]) as fleet:
        vm = await fleet.launch(blank(devices=[orc.DebugConsole()]))
        await vm.wait()
        assert vm.console.log() == b"h"


# ---- several vCPUs


@pytest.mark.smp
async def test_it_halts_when_the_last_vcpu_has(stage: Stage):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("halt", vcpus=3))
        assert await vm.wait() == orc.Halted()
        assert [vcpu.exits for vcpu in vm.statistics().vcpus] == [{"hlt": 1}] * 3


@pytest.mark.smp
async def test_a_vcpu_that_halted_leaves_the_others_running(stage: Stage):
    async with stage.open() as fleet:
        async with fleet.exits(orc.Hlt) as exits:
            vm = await fleet.launch(stage.spec("first_spins", vcpus=3))
            assert sorted([(await exits.receive()).vcpu for _ in range(2)]) == [1, 2]
        await vm.pause()
        assert vm.state == "paused"
        assert [vcpu.state for vcpu in vm.statistics().vcpus] == ["paused", "stopped", "stopped"]
        assert await vm.stop() == orc.Stopped("stop()")


async def test_a_vcpu_that_fails_ends_those_that_run(autojump_clock):
    async with play({"guest": []}) as fleet:
        fleet.backend._scripts = lambda spec, vcpu: [ScriptedExit(FUTURE, after=1) if vcpu == 2 else hlt(after=1e9)]
        with trio.fail_after(5):
            vm = await fleet.launch(blank(vcpus=4))
            outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert outcome.vcpu == 2


async def test_the_first_end_counts():
    async with play([io_write(0xF4, b"\1"), io_write(0xF4, b"\2")]) as fleet:
        vm = await fleet.launch(blank(devices=[orc.ExitPort()]))
        assert await vm.wait() == orc.Shutdown("exit port", 1)


async def test_a_runner_that_breaks_fails_its_vm_alone(autojump_clock):
    def broken():
        yield bus_lock()
        raise RuntimeError("a bug of ours")

    async with play({"guest": broken(), "other": [hlt(after=1e9)]}) as fleet:
        other = await fleet.launch(blank("other"))
        vm = await fleet.launch(blank())
        with trio.fail_after(5):
            outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert "a bug of ours" in outcome.reason
        assert other.state == "running"


@pytest.mark.kvm
async def test_a_vcpu_that_gets_no_thread_fails_its_launch_and_all_of_it_is_rolled_back(monkeypatch, nothing_left):
    stage = Stage("kvm")
    real = Vcpu.spawn

    def spawn(vcpu: Vcpu) -> None:
        if vcpu.index == 1:
            raise orc.ResourceLimit(errno.EAGAIN, "see pids.max")
        real(vcpu)

    async with stage.open() as fleet:
        other = await fleet.launch(stage.spec("spin", "other"))
        monkeypatch.setattr(Vcpu, "spawn", spawn)
        with trio.fail_after(10), pytest.raises(orc.ResourceLimit, match=r"pids\.max"):
            await fleet.launch(stage.spec("spin", vcpus=2))
        monkeypatch.undo()
        assert list(fleet.vms) == ["other"]
        assert other.state == "running"
        again = await fleet.launch(stage.spec("spin", vcpus=2))
        assert again.state == "running"


@pytest.mark.kvm
async def test_a_guest_that_needs_no_answer_keeps_its_thread_out_of_the_interpreter(nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet, fleet.exits(orc.Io) as exits:
        vm = await fleet.launch(orc.VmSpec(name="vm", boot=orc.FlatImage(code=STORM)))
        for _ in range(100):
            await exits.receive()
        (vcpu,) = vm._control.guest.vcpus
        assert str(vcpu.tid) in os.listdir("/proc/self/task")
        assert all(frame.f_code is not Vcpu.proceed.__code__ for frame in sys._current_frames().values())


@pytest.mark.kvm
async def test_what_watches_threads_watches_those_of_the_core(monkeypatch, nothing_left):
    stage, traced = Stage("kvm"), []

    def trace(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code is Vcpu.proceed.__code__:
            traced.append(event)

    threading.settrace(trace)
    try:
        async with stage.open() as fleet:
            vm = await fleet.launch(stage.spec("spin"))
            await vm.stop()
    finally:
        threading.settrace(None)
    assert traced == ["call"]


def thread_name(tid: int | None) -> str:
    return Path(f"/proc/self/task/{tid}/comm").read_text().strip()


@pytest.mark.kvm
@pytest.mark.parametrize(("name", "thread"), [("web-1", "web-1/0"), ("a-name-that-is-long", "a-name-that-i/0")])
async def test_a_thread_has_the_name_of_its_vcpu(name, thread, nothing_left):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin", name))
        await vm.pause()  # it has begun
        with vm._control.guest.vcpus[0].living() as tid:
            assert thread_name(tid) == thread


# ---- floods: what Python answers has a budget

STRING_READS = bytes.fromhex("fc ba0005 bf0040 b90002 f36c ebf6")
"""Reads port 0x500 by REP INSB, 512 bytes at a time, for ever."""
NEVER_AGAIN = orc.Limit(rate=0.001, burst=2, max_delay=None)


class Counting:
    """Counts what it is asked, and says when it is asked first."""

    def __init__(self) -> None:
        self.asked = 0
        self.first = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def read(self, offset: int, size: int) -> int:
        self.asked += 1
        if self.asked == 1:
            self._token.run_sync_soon(self.first.set)
        return 0x2A

    def write(self, offset: int, size: int, value: int) -> None: ...


async def asking(fleet: orc.Fleet, spec: orc.VmSpec, paused: bool = False) -> orc.Vm:
    """A VM with a device in Python at port 0x500."""
    vm = await fleet.launch(spec, paused=True)
    vm.attach(Counting(), ports=range(0x500, 0x501))
    if not paused:
        await vm.resume()
    return vm


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("kvm", "emulated")]
)
async def test_a_flood_of_string_reads_is_charged_by_its_elements_and_others_are_answered_meanwhile(
    backend, nothing_left
):
    def spec(name: str, code: bytes, **more: object) -> orc.VmSpec:
        return orc.VmSpec(name=name, boot=orc.FlatImage(code=code), **more)  # type: ignore[arg-type]

    with trio.fail_after(20):
        async with orc.open_fleet(
            backend=backend, tenants=dict.fromkeys(["hostile", "innocent"]), bus_locks="off"
        ) as fleet:
            flood = await fleet.launch(
                spec("flood", STRING_READS, tenant="hostile", answer_limit=NEVER_AGAIN), paused=True
            )
            device = Counting()
            flood.attach(device, ports=range(0x500, 0x501))
            other = await fleet.launch(spec("other", b"\xe4\x80\xeb\xfc", tenant="innocent"), paused=True)
            async with other.requests(ports=range(0x80, 0x81)) as requests:
                await flood.resume()
                await device.first.wait()
                await other.resume()
                # A vCPU counts an answer when it takes it, so the 101st access tells that 100 are counted.
                for _ in range(101):
                    (await anext(requests)).answer(b"\1")
            await flood.pause()
            seen = flood.statistics()
            # One exit, which is more than the burst: the next has to wait for minutes.
            assert seen.exits["io"] == 1
            assert seen.answers == device.asked > 2
            assert seen.throttled_seconds > 0
            assert seen.answer_limit == NEVER_AGAIN
            assert other.statistics().answers >= 100

            await flood.set_limit(None, meter="answers")
            await flood.resume()
            while device.asked < 5000:
                await trio.lowlevel.checkpoint()


async def test_answers_keep_to_their_limit_and_whoever_answers_counts(autojump_clock):
    script = [io_read(0x500) for _ in range(21)]
    async with play(script) as fleet:
        begun = trio.current_time()
        vm = await asking(fleet, blank(answer_limit=orc.Limit(rate=10, burst=1)))
        await vm.wait()
        assert trio.current_time() - begun == pytest.approx(2.1, abs=0.01)
        assert vm.statistics().answers == fleet.statistics().answers == 21
        assert fleet.statistics().tenants["default"].answers == 21


async def test_policies_hear_of_answers_and_share_them_out(autojump_clock):
    """Two VMs of a tenant that each ask 1,000 times a second, and a policy that shares 1,000 a second."""
    script = [io_read(0x500, after=0.001) for _ in range(20_000)]
    share = orc.WeightedShare(orc.Limit(rate=1000), meter="answers")
    scripts = dict.fromkeys(("a", "b"), script)
    async with play(scripts, policies=[share]) as fleet, fleet.watch(interval=1.0) as watch:
        for name in scripts:
            await asking(fleet, blank(name, answer_limit=None))
        first = await anext(watch)
        assert 0 < first.vms["a"].answers == first.vms["a"].exits
        assert first.by_tenant["default"].answers == first.vms["a"].answers + first.vms["b"].answers
        await trio.sleep(8)
        before = {name: fleet.vms[name].statistics().answers for name in scripts}
        await trio.sleep(4)
        for name in scripts:
            assert fleet.vms[name].statistics().answers - before[name] == pytest.approx(2000, rel=0.1)


async def test_every_vm_has_a_limit_on_answers_unless_it_says_otherwise(autojump_clock):
    script = [io_read(0x500) for _ in range(6001)]
    took = {}
    async with play(script) as fleet:
        for name, more in (("default", {}), ("none", {"answer_limit": None})):
            begun = trio.current_time()
            vm = await asking(fleet, blank(name, **more))
            await vm.wait()
            took[name] = trio.current_time() - begun
        assert "answer_limit=Limit(rate=2000" in repr(fleet.vms["default"].spec)
        assert fleet.vms["default"].statistics().answer_limit == orc.Limit(rate=2000, burst=2000)
    assert took["none"] == 0
    assert took["default"] == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("where", [{"vm": "guest"}, {"tenant": "default"}, {}])
async def test_a_throttle_holds_answers_at_each_level_and_goes(autojump_clock, where):
    async with play([io_read(0x500) for _ in range(1000)]) as fleet:
        limit = orc.Limit(rate=1, burst=1, max_delay=None)
        vm = await asking(fleet, blank(answer_limit=None), paused=True)
        await fleet.apply(orc.Throttle(limit=limit, meter="answers", reason="test", **where))
        await vm.resume()
        await trio.sleep(10.5)
        assert vm.statistics().answers == pytest.approx(11, abs=1)
        assert vm.state == "throttled" or vm.statistics().throttled
        await fleet.apply(orc.Unthrottle(meter="answers", reason="test", **where))
        with trio.fail_after(1):
            assert await vm.wait() == orc.Halted()
