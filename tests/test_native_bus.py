"""What the core answers by itself and what comes to Python, seen by guests on each backend."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

import orchestra as orc
from conftest import Stage, blank, play
from orchestra.backend.emulated.machine import EmulatedEngine
from orchestra.backend.kvm.machine import KvmEngine
from orchestra.backend.scripted import ScriptedEngine, ScriptedExit, io_read
from orchestra.machine.devices.console import Console
from orchestra.native import lib
from orchestra.native.core import Command

DEVICES = [orc.Serial(), orc.DebugConsole(), orc.ExitPort()]
TEXT = bytes(range(256)) * 16
PAGE_END = 0xD0001000


@pytest.fixture(autouse=True)
async def soon():
    """Nothing here may take long in real time."""
    with trio.fail_after(30):
        yield


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An element for each time that a vCPU came from Python into the core."""
    seen: list[object] = []

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(engine: object) -> Any:
            seen.append(engine)
            return run(engine)

        return wrapper

    for engine in (KvmEngine, EmulatedEngine, ScriptedEngine):
        monkeypatch.setattr(engine, "run", counted(engine.run))
    return seen


# ---- what never comes to Python


async def test_what_nobody_claims_and_what_the_core_has_devices_for_does_not_come_to_python(stage: Stage, entries):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("floods_64", mode=64, devices=DEVICES))
        assert await vm.wait() == orc.Halted()
        statistics = vm.statistics()
        assert statistics.exits["mmio"] == 2 * 500
        assert statistics.exits["io"] == 7 * 500
        assert statistics.unclaimed == 4 * 500
        assert vm.console.total == 2 * 500
        # What has a thread is run by the core first, and comes into Python with the halt.
        assert len(entries) == (0 if fleet.backend.blocking else 1)


async def test_a_string_is_printed_without_python(stage: Stage, entries):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("prints", devices=DEVICES), paused=True)
        vm.write_memory(0x8000, TEXT)
        before = len(entries)
        await vm.resume()
        assert await vm.wait() == orc.Halted()
        assert vm.console.log() == TEXT + TEXT
        assert vm.console.total == 2 * len(TEXT)
        assert len(entries) - before <= 1


async def test_output_that_nobody_follows_does_not_wake_the_loop(stage: Stage, monkeypatch):
    woken: list[object] = []
    wake = Console.wake

    def counted(console: Console) -> None:
        woken.append(console)
        wake(console)

    monkeypatch.setattr(Console, "wake", counted)
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("prints", devices=DEVICES))
        await vm.wait()
        assert vm.console.total == 2 * len(TEXT)
        assert len(woken) == 2  # at the end of this run, and of the VM


async def test_a_follower_gets_all_of_it_and_is_woken_once_for_each_time_it_waits(stage: Stage, monkeypatch):
    woken: list[object] = []
    wake = Console.wake

    def counted(console: Console) -> None:
        woken.append(console)
        wake(console)

    monkeypatch.setattr(Console, "wake", counted)
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("prints", devices=DEVICES), paused=True)
        vm.write_memory(0x8000, TEXT)
        got, chunks = bytearray(), 0
        await vm.resume()
        async for chunk in vm.console.follow():
            got += chunk
            chunks += 1
        assert got == TEXT + TEXT
        assert len(woken) <= chunks + 3


# ---- what is cut into pieces


class Recorder:
    """Remembers accesses; reads as a number that tells the offset."""

    def __init__(self) -> None:
        self.accesses: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size, 0))
        return 0x8070605040302010 + offset

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size, value))


def answers(vm: orc.Vm, stage: Stage) -> tuple[bytes, bytes]:
    """What the guest read at the end of the page, and at the end of the ports."""
    if stage.executes:
        return vm.read_memory(0x8000, 8), vm.read_memory(0x8008, 4)
    (engine,) = vm._control.guest._machine.engines
    first, second, ports = (data for _, data in engine.answers)
    return first + second, ports


async def test_an_access_over_an_end_reaches_the_devices_on_both_sides_in_aligned_pieces(stage: Stage):
    page, behind, port = Recorder(), Recorder(), Recorder()
    devices = [
        (None, range(0xD0000000, PAGE_END), page),
        (None, range(PAGE_END, PAGE_END + 4), behind),
        (range(0x500, 0x504), None, port),
    ]
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("hangs_over_64", mode=64), devices=devices)
        assert await vm.wait() == orc.Halted()
        assert page.accesses == [
            ("read", 0xFFD, 1, 0),
            ("read", 0xFFE, 2, 0),
            ("write", 0xFFD, 1, 0x11),
            ("write", 0xFFE, 2, 0x3322),
        ]
        assert behind.accesses == [("read", 0, 4, 0), ("write", 0, 4, 0x77665544)]
        assert port.accesses == [("read", 3, 1, 0), ("write", 3, 1, 0x11)]
        assert answers(vm, stage) == (bytes.fromhex("0d0e3010203040ff"), bytes.fromhex("13ffffff"))
        assert vm.statistics().unclaimed == 4  # of both accesses to ports, and of both to the second page, a part


async def test_an_access_over_an_end_reaches_tasks_in_aligned_pieces(stage: Stage):
    seen = []

    async def answer(requests: Any) -> None:
        async for request in requests:
            seen.append((request.address, request.size, request.data))
            request.answer(None if request.write else bytes(range(0x41, 0x41 + request.size)))

    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("hangs_over_64", mode=64), paused=True)
        async with (
            vm.requests(ports=range(0x500, 0x504), mmio=range(0xD0000000, PAGE_END)) as here,
            vm.requests(mmio=range(PAGE_END, PAGE_END + 4)) as there,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(answer, here)
            nursery.start_soon(answer, there)
            await vm.resume()
            assert await vm.wait() == orc.Halted()
        assert seen == [
            (PAGE_END - 3, 1, b""),
            (PAGE_END - 2, 2, b""),
            (PAGE_END, 4, b""),
            (PAGE_END - 3, 1, b"\x11"),
            (PAGE_END - 2, 2, b"\x22\x33"),
            (PAGE_END, 4, b"\x44\x55\x66\x77"),
            (0x503, 1, b""),
            (0x503, 1, b"\x11"),
        ]
        assert answers(vm, stage) == (b"AABABCD\xff", b"A\xff\xff\xff")


# ---- strings that Python answers


class Counts:
    """Reads as a count; `at_100` is called within the hundredth read."""

    def __init__(self, at_100: Callable[[], object] = lambda: None) -> None:
        self.reads = 0
        self.at_100 = at_100

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        if self.reads == 100:
            self.at_100()
        return self.reads & 0xFF

    def write(self, offset: int, size: int, value: int) -> None: ...


NUMBERS = bytes(n & 0xFF for n in range(1, 1025))


def string(vm: orc.Vm, stage: Stage) -> bytes:
    """What the guest read."""
    if stage.executes:
        return vm.read_memory(0x8000, 1024)
    (engine,) = vm._control.guest._machine.engines
    ((_, data),) = engine.answers
    return bytes(data)


async def test_a_string_comes_to_a_device_a_chunk_at_a_time(stage: Stage, entries):
    device = Counts()
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("reads_string"), devices=[(range(0x500, 0x501), None, device)])
        assert await vm.wait() == orc.Halted()
        assert device.reads == 1024
        assert string(vm, stage) == NUMBERS
        assert len(entries) >= 1024 / 64


async def test_a_stop_comes_between_the_chunks_of_a_string(stage: Stage):
    device = Counts()
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("reads_string"), paused=True)
        vm.attach(device, ports=range(0x500, 0x501))
        device.at_100 = lambda: vm._control.guest.end(orc.Stopped("enough"))
        await vm.resume()
        assert isinstance(await vm.wait(), orc.Stopped)
        assert 100 <= device.reads <= 128


@pytest.mark.parametrize(
    "backend",
    [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("emulated", marks=pytest.mark.emulated)],
)
async def test_a_pause_is_there_between_the_chunks_of_a_string_whose_rest_is_answered_all_the_same(
    backend, nothing_left
):
    stage, go = Stage(backend), threading.Event()

    class Pauses(Counts):
        def read(self, offset: int, size: int) -> int:
            value = super().read(offset, size)
            if self.reads == 150:  # in the chunk after
                assert go.wait(20)
            return value

    device = Pauses()
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("reads_string"), paused=True)
        vm.attach(device, ports=range(0x500, 0x501))
        reached = trio.Event()

        def wait_for_the_pause() -> None:
            fleet._context.post(reached.set)
            while not vm._control.guest.vcpus[0].core.commands() & Command.PAUSE:
                pass

        device.at_100 = wait_for_the_pause
        await vm.resume()
        await reached.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.pause)
            while vm.state != "paused":
                await trio.lowlevel.checkpoint()
            assert device.reads in range(100, 151)  # it is paused in whichever call of its device it is
            go.set()
        await vm.inspect()  # between two entries of the guest
        assert vm.state == "paused"
        assert device.reads == 1024
        assert vm.outcome is None
        await vm.resume()
        assert await vm.wait() == orc.Halted()
        assert device.reads == 1024
        assert string(vm, stage) == NUMBERS


async def test_a_paused_string_on_a_script_is_completed_before_it_parks():
    device = Counts()
    backend = orc.ScriptedBackend({"guest": [ScriptedExit("io", args=(0x500, 1, 1024, 0))]})
    async with orc.open_fleet(backend=backend) as fleet:
        vm = await fleet.launch(blank(), paused=True)
        vm.attach(device, ports=range(0x500, 0x501))
        reached = trio.Event()

        def pause() -> None:
            vm._control.guest.command(set=Command.PAUSE)  # as `Vm.pause` does, so that it is there at once
            reached.set()

        device.at_100 = pause
        await vm.resume()
        await reached.wait()
        await vm.pause()
        await wait_all_tasks_blocked()
        assert vm.outcome is None
        assert device.reads == 1024
        await vm.resume()
        assert await vm.wait() == orc.Halted()
        assert backend.machines["guest"].engines[0].answers == [(0x500, NUMBERS)]


async def test_what_a_task_leaves_unanswered_of_a_string_reads_as_ones(stage: Stage):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("reads_string"), paused=True)
        async with vm.requests(ports=range(0x500, 0x501)) as requests:
            await vm.resume()
            for n in range(100):
                (await requests.__anext__()).answer(bytes([n]))
            await requests.__anext__()
        assert await vm.wait() == orc.Halted()
        assert string(vm, stage) == bytes(range(100)) + b"\xff" * 924


async def test_a_task_that_answers_no_more_and_keeps_its_claim_reads_as_ones(stage: Stage):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("ports"), paused=True)
        async with vm.requests(ports=range(0x500, 0x504)) as requests:
            requests.close()  # as a restart may leave it
            await vm.resume()
            with trio.fail_after(10):
                assert await vm.wait() == orc.Halted()


async def test_a_device_that_releases_itself_in_the_middle_of_a_string_is_called_no_more(stage: Stage):
    device = Counts()
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("reads_string"), paused=True)
        vm.attach(device, ports=range(0x500, 0x501))
        device.at_100 = lambda: vm._control.guest.buses.release(device)
        await vm.resume()
        assert await vm.wait() == orc.Halted()
        assert device.reads == 100
        assert string(vm, stage) == NUMBERS[:100] + b"\xff" * 924


async def test_a_device_that_moves_in_the_middle_of_a_string_is_called_no_more_there():
    device = Counts()
    script = [ScriptedExit("io", args=(0x500, 1, 1024, 0)), io_read(0x600)]
    async with play(script) as fleet:
        vm = await fleet.launch(blank(), devices=[(range(0x500, 0x501), None, device)])
        device.at_100 = lambda: vm._control.guest.ports.move(vm._control.guest.ports.find(0x500), range(0x600, 0x601))
        await vm.wait()
        assert device.reads == 100 + 1


# ---- interrupts


@pytest.mark.kvm
async def test_the_serial_ports_interrupt_reaches_the_guest(nothing_left):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("serial_interrupt", devices=DEVICES, irqchip=True))
        assert await vm.wait() == orc.Shutdown("exit port", 2)


@pytest.mark.kvm
async def test_bytes_that_are_received_while_the_vm_is_closed_interrupt_nobody(nothing_left):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("halt", devices=DEVICES, irqchip=True))
        (uart,) = (claim.handler for claim in vm._control.guest.ports.claims() if claim.span.start == 0x3F8)
        uart.write(1, 1, 1)  # received data interrupts
        ended = trio.Event()

        def receive() -> None:
            while not ended.is_set():
                lib.orc_console_type(vm.console.handle, b"x", 1)
                uart.read(0, 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, receive)
            await vm.stop()
            ended.set()
        lib.orc_console_type(vm.console.handle, b"x", 1)
        assert not uart.read(5, 1) & 1  # between two runs nothing takes input
