"""One run of a VM on its buses: memory regions, devices, consoles, and the sources of all test guests."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

import orchestra as orc
from conftest import GUESTS, Stage, blank, guest, play, word
from orchestra.backend.kvm.dirty import DirtyLog
from orchestra.backend.kvm.machine import KvmBackend, KvmEngine, KvmMachine
from orchestra.backend.kvm.system import Kvm
from orchestra.backend.kvm.vcpu import KvmVcpu
from orchestra.backend.kvm.vm import KvmVm
from orchestra.backend.memory import Region
from orchestra.backend.scripted import hlt
from orchestra.fleet.channels import Dispatcher
from orchestra.fleet.context import FleetContext
from orchestra.fleet.observer import Observer
from orchestra.fleet.recording import Recording
from orchestra.host.control.caps import RunLoopCaps
from orchestra.machine import workers
from orchestra.machine.calls import Calls
from orchestra.machine.cores import Cores
from orchestra.machine.devices.console import Console
from orchestra.machine.instance import Instance
from orchestra.machine.pause_levels import PauseLevels
from orchestra.machine.vcpu import Vcpu
from orchestra.native import ffi, lib
from orchestra.native.core import VcpuCore

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("nothing_left")]
KVM = Stage("kvm")
ROM, RAM = 0x200000, 0x300000


def regions(**more: object) -> orc.VmSpec:
    rom = orc.MemoryRegion(ROM, 0x1000, readonly=True, contents=b"ROM!")
    return KVM.spec("regions_32", mode=32, regions=[rom, orc.MemoryRegion(RAM, 0x2000)], **more)


class Recorder:
    """Remembers accesses; reads as a value that tells the offset."""

    def __init__(self) -> None:
        self.accesses: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size, 0))
        return 0x8070605040302010 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


async def test_the_guest_reads_and_writes_its_regions():
    async with KVM.open() as fleet:
        vm = await fleet.launch(regions())
        assert await vm.wait() == orc.Halted()
        assert vm.read_memory(RAM, 4) == b"ROM!"


async def test_a_write_to_a_read_only_region_is_mmio_and_changes_nothing():
    async with KVM.open() as fleet:
        async with fleet.exits(orc.Mmio, vm="guest") as exits:
            vm = await fleet.launch(regions())
            assert await vm.wait() == orc.Halted()
            (exit,) = [exit async for exit in exits]
        assert (exit.address, exit.size, exit.write, exit.data) == (ROM + 4, 4, True, bytes.fromhex("78563412"))
        assert vm.read_memory(ROM, 8) == b"ROM!" + bytes(4)
        assert word(vm, RAM + 4) == 0  # what the guest read there afterwards


async def test_a_device_may_sit_behind_a_read_only_region():
    device = Recorder()
    async with KVM.open() as fleet:
        vm = await fleet.launch(regions(), devices=[(None, range(ROM, ROM + 0x1000), device)])
        await vm.wait()
    assert device.accesses == [("write", 4, 4, 0x12345678)]


async def test_we_may_write_to_what_is_read_only_for_the_guest():
    async with KVM.open() as fleet:
        vm = await fleet.launch(regions(), paused=True)
        vm.write_memory(ROM, b"ours")
        await vm.resume()
        await vm.wait()
        assert vm.read_memory(RAM, 4) == b"ours"


async def test_an_mmio_device_gets_offset_size_and_value():
    device = Recorder()
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("mmio_64", mode=64), devices=[(None, range(0xCFFFFFF0, 0xD0000010), device)])
        assert await vm.wait() == orc.Halted()
        read = (0x8070605040302010 + 0x10).to_bytes(8, "little")
        for index, size in enumerate((1, 2, 4, 8)):
            assert vm.read_memory(0x8000 + 8 * index, size) == read[:size]
    value = 0x8877665544332211
    assert device.accesses == [
        *(("read", 0x10, size, 0) for size in (1, 2, 4, 8)),
        *(("write", 0x10, size, value & (1 << 8 * size) - 1) for size in (1, 2, 4, 8)),
    ]


async def test_memory_that_nobody_backs_reads_as_ones_and_takes_writes():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("mmio_64", mode=64))
        assert await vm.wait() == orc.Halted()
        for index, size in enumerate((1, 2, 4, 8)):
            assert vm.read_memory(0x8000 + 8 * index, 8) == (b"\xff" * size).ljust(8, b"\0")
        assert vm.statistics().exits["mmio"] == 8


async def test_unclaimed_ports_read_as_ones_and_are_counted():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("ports"))
        assert await vm.wait() == orc.Halted()
        assert vm.read_memory(0x8000, 12) == bytes.fromhex("ff000000 ffff0000 ffffffff")
        assert vm.statistics().unclaimed == 6
        assert vm.statistics().exits == {"io": 6, "hlt": 1}


async def test_string_reads_of_unclaimed_ports_are_ones_too():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("strings"))
        assert await vm.wait() == orc.Halted()
        assert vm.read_memory(0x8000, 5) == b"\xff" * 5
        assert vm.read_memory(0x8010, 5) == b"\xff" * 4 + b"\0"


async def test_a_port_claimed_and_released_again_reads_as_ones():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("ports"), paused=True)
        async with vm.requests(ports=range(0x500, 0x504)):
            pass
        await vm.resume()
        with trio.fail_after(10):
            assert await vm.wait() == orc.Halted()
        assert vm.statistics().unclaimed == 6


async def test_the_debug_console_and_the_serial_port_write_to_the_console():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("hello", devices=[orc.DebugConsole(), orc.Serial()]))
        chunks = [chunk async for chunk in vm.console.follow()]
        assert await vm.wait() == orc.Halted()
        assert b"".join(chunks) == b"debug serial"
        assert vm.console.text == "debug serial"
        assert vm.console.total == 12


async def test_consoles_may_sit_at_other_ports():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("hello", devices=[orc.DebugConsole(0x3F8)]))
        await vm.wait()
        assert vm.console.text == "serial"


async def test_each_vcpu_starts_with_its_number():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("ask_twice", vcpus=4), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            seen = {}
            with trio.fail_after(10):
                async for request in requests:
                    seen[request.vcpu] = request.address
                    request.answer(bytes([request.vcpu + 1] * 4))
        assert seen == {n: 0x500 + n for n in range(4)}
        assert vm.read_memory(0x8000, 16) == b"\1" * 4 + b"\2" * 4 + b"\3" * 4 + b"\4" * 4


async def test_devices_that_claim_the_same_port_roll_the_launch_back():
    async with KVM.open() as fleet:
        with pytest.raises(orc.SpecError, match="claimed by ExitDevice"):
            await fleet.launch(KVM.spec("halt", devices=[orc.ExitPort(0x500), orc.DebugConsole(0x502)]))
        with pytest.raises(orc.SpecError, match="claimed by ExitDevice"):
            await fleet.launch(KVM.spec("halt"), devices=[(range(0xF0, 0xF8), None, Recorder())])
        assert dict(fleet.vms) == {}
        assert await (await fleet.launch(KVM.spec("halt"))).wait() == orc.Halted()


async def test_a_launch_whose_cpuid_another_took_first_makes_one_of_its_own():
    """VMs are set up on several threads at once: between a look at what is there and the taking, it may go."""

    class TakenMeanwhile(list):
        def __len__(self) -> int:
            return 1

    backend = KvmBackend.open()
    backend._cpuids = {(1, False, orc.CPU_TEMPLATES["host"], orc.Topology()): TakenMeanwhile()}
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(KVM.spec("halt"))
        assert await vm.wait() == orc.Halted()
    backend.close()


async def test_vms_do_not_see_each_others_memory_or_devices():
    one, two = Recorder(), Recorder()
    async with KVM.open() as fleet:
        a = await fleet.launch(KVM.spec("ports", "a"), devices=[(range(0x500, 0x504), None, one)])
        b = await fleet.launch(KVM.spec("halt", "b"), devices=[(range(0x500, 0x504), None, two)])
        await a.wait()
        await b.wait()
        assert word(a, 0x8008) == 0x40302010
        assert word(b, 0x8008) == 0
    assert len(one.accesses) == 6
    assert two.accesses == []


@pytest.mark.parametrize("vcpus", [1, 2, 8])
async def test_a_guest_that_loops_ends_within_100_ms_of_stop(vcpus):
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("spin", vcpus=vcpus))
        begun = trio.current_time()
        await vm.stop()
        assert trio.current_time() - begun < 0.1


async def test_a_guest_that_loops_ends_within_100_ms_of_its_fleet():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("spin", vcpus=2))
        begun = trio.current_time()
    assert trio.current_time() - begun < 0.1
    assert vm.outcome == orc.Stopped("the fleet was closed")
    assert vm.registers().rip in range(0x1000, 0x1010)


async def test_with_an_irqchip_hlt_waits_for_an_interrupt_and_stop_ends_it():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("halt", irqchip=True))
        await vm.pause()
        assert vm.state == "paused"
        await vm.resume()
        assert vm.outcome is None
        assert await vm.stop() == orc.Stopped("stop()")


@pytest.mark.parametrize(("pit", "status"), [(True, 0x34), (False, 0x3F)])
async def test_a_pit_is_there_where_the_spec_gives_one(pit: bool, status: int):
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("pit", irqchip="full", pit=pit))
        assert await vm.wait() == orc.Shutdown(code=status)


async def test_a_script_takes_no_irqchip():
    async with play([hlt()]) as fleet:
        with pytest.raises(orc.SpecError, match="irqchip"):
            await fleet.launch(blank(irqchip=True))
        assert dict(fleet.vms) == {}


@pytest.mark.skipif(shutil.which("nasm") is None, reason="nasm is not installed")
def test_the_bytes_of_every_guest_are_what_its_source_assembles_to(tmp_path: Path):
    sources = sorted(GUESTS.glob("*.asm"))
    assert sources
    for source in sources:
        out = tmp_path / source.stem
        subprocess.run(["nasm", "-f", "bin", "-I", f"{GUESTS}/", "-o", out, source], check=True)
        assert out.read_bytes() == guest(source.stem), f"{source.name}: assemble it again"


def test_no_guest_is_without_its_source():
    assert {path.stem for path in GUESTS.glob("*.bin")} == {path.stem for path in GUESTS.glob("*.asm")}


@pytest.mark.kvm
async def test_more_vcpus_than_trio_has_threads_run_at_once_and_take_none_of_them(nothing_left):
    """Design rule 13: the 41st vCPU runs like the first, and the program's own worker threads stay free."""
    stage = Stage("kvm")
    async with stage.open() as fleet, AsyncExitStack() as stack:
        asked = []
        for n in range(25):
            vm = await fleet.launch(stage.spec("ask_twice", f"vm-{n}", vcpus=2), paused=True)
            requests = await stack.enter_async_context(vm.requests(ports=range(0x500, 0x508)))
            await vm.resume()
            with trio.fail_after(60):
                asked += [await anext(requests), await anext(requests)]
        # All fifty run, and each waits for its answer.
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        for request in asked:
            request.answer(bytes(4))
        with trio.fail_after(60):
            assert [await vm.wait() for vm in fleet.vms.values()] == [orc.Halted()] * 25


# ---- a pause, and the guest's clock


@pytest.mark.buslock  # on a real KVM: the software one takes the ioctl and leaves the page as it is
async def test_a_guest_is_told_that_it_was_paused_before_it_goes_on():
    """KVM sets a flag in the page of the guest's clock (PVCLOCK_GUEST_STOPPED), or its watchdog reports a lockup."""
    new_system_time, page, flags, stopped = 0x4B564D01, 0x9000, 29, 2  # MSR_KVM_SYSTEM_TIME_NEW; pvclock-abi.h
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("spin"), paused=True)
        kvm_vcpu = vm._control.guest.vcpus[0].engine.vcpu
        kvm_vcpu.set_msrs({new_system_time: page | 1})

        async def run_and_pause() -> None:
            kicks = vm.statistics().kicks
            await vm.resume()
            while vm.statistics().kicks == kicks:  # until it was in the guest: on entering it KVM writes the page
                await vm.inspect()
            await vm.pause()

        await run_and_pause()
        vm.write_memory(page + flags, bytes([vm.read_memory(page + flags, 1)[0] & ~stopped]))
        await run_and_pause()
        assert vm.read_memory(page + flags, 1)[0] & stopped


async def test_each_vcpu_that_was_paused_is_told_once_and_no_other(monkeypatch):
    told: list[KvmVcpu] = []
    monkeypatch.setattr(KvmVcpu, "kvmclock_ctrl", lambda self: told.append(self))
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("first_spins", vcpus=2))
        while not vm._control.guest.has_ended(1):
            await trio.lowlevel.checkpoint()
        assert told == []
        for pauses in range(1, 4):
            await vm.pause()
            assert len(told) == pauses - 1
            await vm.resume()
            await vm.inspect()  # it has gone on
            assert told == [vm._control.guest.vcpus[0].engine.vcpu] * pauses
        await vm.pause()
        await vm.stop()
        assert len(told) == 3


async def test_one_that_was_paused_in_an_access_is_told_as_well(monkeypatch):
    told: list[KvmVcpu] = []
    monkeypatch.setattr(KvmVcpu, "kvmclock_ctrl", lambda self: told.append(self))
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("ask_twice"), paused=True)
        async with vm.requests(ports=range(0x500, 0x508)) as requests:
            await vm.resume()
            request = await anext(requests)
            before = len(told)
            await vm.pause(quiesce=False)
            await vm.resume()
            request.answer(bytes(4))
            await vm.wait()
        assert len(told) == before + 1


async def test_a_kernel_that_wont_tell_it_is_no_error(monkeypatch):
    def refuse(self: KvmVcpu) -> bool:
        raise orc.KvmError(5, "KVM_KVMCLOCK_CTRL: Input/output error")

    monkeypatch.setattr(KvmVcpu, "kvmclock_ctrl", refuse)
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("spin"), paused=True)
        await vm.resume()
        await vm.inspect()
        assert vm.state == "running"


# ---- threads whose numbers may be another's by now


async def test_only_threads_that_have_not_ended_are_touched(monkeypatch):
    """A number that the kernel gave to another thread since would be a stranger's."""
    moved: list[int] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda tid, cpus: moved.append(tid))
    async with KVM.open(quarantine=[max(os.sched_getaffinity(0))]) as fleet:
        vm = await fleet.launch(KVM.spec("first_spins", vcpus=2))
        while vm._control.guest.vcpus[1].tid is not None:  # it halts at once; nothing tells when its thread is gone
            await trio.lowlevel.checkpoint()
        vm.isolate()
        assert moved == [vm._control.guest.vcpus[0].tid]
        moved.clear()
        vm.isolate(False)
        assert moved == [vm._control.guest.vcpus[0].tid]
    assert vm._control.guest.vcpus[0].tid is None


async def test_a_thread_does_not_end_while_somebody_does_something_to_it():
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("spin"))
        vcpu = vm._control.guest.vcpus[0]
        with vcpu.living() as tid:
            vm._control.stop_nowait(orc.Stopped("x"))
            while vcpu.final_registers is None:  # what it does last before it goes
                time.sleep(0.001)  # noqa: ASYNC251  # nobody may await anything here
            assert str(vcpu.tid) in os.listdir("/proc/self/task")
            assert vcpu.tid == tid
        await vm.wait()
        assert vcpu.tid is None


# ---- what goes wrong ends one VM

STEPS = [
    (Cores, "counters"),
    (Cores, "gather"),
    (Cores, "finish"),
    (Calls, "serve_late"),
    (Instance, "_on_ended"),
    (VcpuCore, "counters"),
    (VcpuCore, "cap"),
    (RunLoopCaps, "leave"),
    (RunLoopCaps, "close"),
    (KvmEngine, "detach"),
    (KvmEngine, "close"),
    (KvmEngine, "registers"),
    (KvmVcpu, "close"),
    (KvmMachine, "close"),
    (KvmVm, "close"),
    (DirtyLog, "close"),
    (FleetContext, "retire"),
    (FleetContext, "released"),
    (FleetContext, "changed"),
    (Recording, "profile"),
    (Observer, "ended"),
    (Observer, "forget"),
    (Dispatcher, "retire"),
    (Dispatcher, "vm_ended"),
    (Console, "close"),
    (PauseLevels, "gone"),
    (PauseLevels, "close"),
]


@pytest.mark.parametrize("how", ["by itself", "stop"])
@pytest.mark.parametrize(("owner", "step"), STEPS, ids=lambda what: getattr(what, "__name__", what))
async def test_whatever_fails_at_an_end_is_that_vms_alone(owner, step, how, monkeypatch):
    """Each step of an end raises once, when it has done its work; the fleet goes on, and nothing is left of the VM."""
    real = getattr(owner, step)
    failed: list[BaseException] = []

    def fails(*args: object, **more: object) -> object:
        result = real(*args, **more)
        if not failed:
            failed.append(ZeroDivisionError("injected"))
            raise failed[0]
        return result

    with trio.fail_after(20):
        async with KVM.open() as fleet:
            other = await fleet.launch(KVM.spec("spin", "other"))
            vm = await fleet.launch(KVM.spec("exit_port" if how == "by itself" else "spin"), paused=True)
            monkeypatch.setattr(owner, step, fails)
            if how == "by itself":
                with suppress(ZeroDivisionError):  # whoever resumes it hears of what goes wrong with that
                    await vm.resume()
                await vm.wait()
            else:
                try:
                    await vm.stop()
                except ZeroDivisionError:  # a stop that can't be done says so to whoever asked for it
                    assert step in ("released", "changed")
            assert vm.outcome is not None
            monkeypatch.undo()
            assert other.state == "running"
            assert await (await fleet.launch(KVM.spec("exit_port", "third"))).wait() == orc.Shutdown("exit port", 42)
            await other.pause()
            assert other.quiesced


async def test_a_mistake_in_the_middle_of_a_run_ends_that_vm_as_failed():
    with trio.fail_after(20):
        async with KVM.open() as fleet:
            other = await fleet.launch(KVM.spec("spin", "other"))
            vm = await fleet.launch(KVM.spec("spin"))

            def fails() -> None:
                raise ZeroDivisionError("injected")

            vm._control.guest._post(fails)
            outcome = await vm.wait()
            assert isinstance(outcome, orc.Failed)
            assert "injected" in outcome.reason
            assert other.state == "running"


async def test_a_run_that_cant_begin_fails_and_gives_all_back(monkeypatch, nothing_left):
    with trio.fail_after(20):
        async with KVM.open() as fleet:
            vm = await fleet.launch(KVM.spec("spin"), paused=True)
            real, calls = Instance.command, []

            def command(self: Instance, set: int = 0, clear: int = 0) -> None:
                if clear and not calls:
                    calls.append(clear)
                    raise ZeroDivisionError("injected")
                real(self, set, clear)

            monkeypatch.setattr(Instance, "command", command)
            again = await fleet.launch(KVM.spec("spin", "again"))
            outcome = await again.wait()
            assert isinstance(outcome, orc.Failed)
            assert outcome.reason == "run: ZeroDivisionError: injected"
            assert vm.outcome is None


class WithoutInterrupts:
    """The core, with no memory left for interrupt lines."""

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def orc_interrupts_new(self, fd: int) -> Any:
        return ffi.NULL


async def test_a_launch_that_finds_no_memory_once_the_kernel_has_made_its_vm_leaves_nothing(monkeypatch):
    async with KVM.open() as fleet:
        monkeypatch.setattr("orchestra.backend.kvm.vm.lib", WithoutInterrupts())
        with pytest.raises(MemoryError):
            await fleet.launch(KVM.spec("spin", vcpus=2))
        with pytest.raises(MemoryError):
            fleet.backend.kvm.create_vm()


def test_a_kvm_that_does_not_tell_what_it_can_do_is_closed(monkeypatch):
    def refuse(self: Kvm, number: int) -> int:
        raise orc.ResourceLimit(errno.ENOMEM, "injected")

    monkeypatch.setattr(Kvm, "extension", refuse)
    with pytest.raises(orc.ResourceLimit, match="injected"):
        KvmBackend.open()


# ---- memory is given back off the event loop


async def test_memory_of_what_ended_or_starts_again_is_unmapped_on_other_threads(monkeypatch):
    threads: list[int] = []
    real = workers.unmap

    def unmap(regions: list[Region]) -> None:
        if regions:
            threads.append(threading.get_ident())
        real(regions)

    monkeypatch.setattr(workers, "unmap", unmap)
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("exit_port"))
        await vm.wait()
        await vm.stop()  # of one that has ended
        assert len(threads) == 1
        again = await fleet.launch(KVM.spec("exit_port"))
        await again.wait()
        await fleet.launch(KVM.spec("spin"))  # under the same name
        await fleet.vm("guest").reset()
        await fleet.vm("guest").stop()
        assert len(threads) == 4
        await (await fleet.launch(KVM.spec("exit_port"))).wait()
    assert len(threads) == 5  # at the fleet's end
    assert threading.get_ident() not in threads


async def test_the_next_run_waits_until_the_memory_of_the_last_is_unmapped(monkeypatch):
    """Or a guest that resets itself all the time would have ever more."""
    go_on, real = threading.Event(), workers.unmap

    def unmap(regions: list[Region]) -> None:
        assert go_on.wait(20)
        real(regions)

    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("spin"))
        monkeypatch.setattr(workers, "unmap", unmap)
        await vm.reset()
        assert vm.read_memory(0x1000, 1) != b"\0"
        for _ in range(20):
            await trio.sleep(0.001)
        assert word(vm, 0x8000) == 0  # it does not run yet
        go_on.set()
        with trio.fail_after(20):
            while word(vm, 0x8000) == 0:  # noqa: ASYNC110  # the guest tells nobody
                await trio.sleep(0.001)


def test_a_cap_that_one_vcpu_cant_have_none_has():
    class Core:
        def __init__(self, room: bool) -> None:
            self.room = room
            self.share: float | None = None

        def cap(self, share: float | None) -> None:
            if share is not None and not self.room:
                raise orc.ResourceLimit(12, "CPU cap")
            self.share = share

    cores = [Core(True), Core(False)]
    caps = RunLoopCaps(cores)  # type: ignore[arg-type]  # what it needs of them
    with pytest.raises(orc.ResourceLimit):
        caps.put(0.5, {})
    assert [core.share for core in cores] == [None, None]
    cores[1].room = True
    caps.put(0.5, {})
    cores[1].room = False
    with pytest.raises(orc.ResourceLimit):
        caps.put(0.2, {})
    assert cores[0].share == 0.5


@pytest.mark.kvm
async def test_a_running_guest_does_not_keep_what_the_kernel_counts_of_it_from_being_read(nothing_left):
    """The kernel's lock of a vCPU is held while that spins: whoever waits for it on the fleet's thread hangs."""
    async with KVM.open() as fleet:
        vm = await fleet.launch(KVM.spec("first_spins", vcpus=2))
        with trio.fail_after(10):
            while not vm._control.guest.has_ended(1):
                await trio.lowlevel.checkpoint()
            for _ in range(2):
                counted = await vm.kernel_statistics()
                assert {"vcpu0.exits", "vcpu1.exits"} <= set(counted)
            await vm.stop()


@pytest.mark.parametrize("starts", [True, False])
async def test_the_fleets_thread_waits_for_no_thread_of_a_vcpu(monkeypatch, starts):
    joined, join = [], Vcpu.join

    def joins(vcpu: Vcpu) -> None:
        joined.append(threading.get_ident())
        join(vcpu)

    monkeypatch.setattr(Vcpu, "join", joins)
    if not starts:
        monkeypatch.setattr(Cores, "subscribe", lambda self, mask: 1 / 0)
    async with KVM.open() as fleet:
        with suppress(ZeroDivisionError):
            await (await fleet.launch(KVM.spec("halt"))).stop()
    assert joined
    assert threading.get_ident() not in joined
