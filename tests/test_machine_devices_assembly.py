"""The devices of a VM: rings and timers reach them in turn, on the fleet's thread, and neither while it is paused."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import orchestra as orc
from bells import Bells, BellsDevice, Clock, ClockDevice, Kept
from conftest import Stage, blank, guest, play
from orchestra.backend.memory import GuestMemory
from orchestra.backend.scripted import hlt, io_write
from orchestra.machine.debt import Owed
from orchestra.machine.devices.assembly import Assembly, Dma
from orchestra.machine.devices.service import RING
from orchestra.machine.pacer import Pacer
from orchestra.machine.vcpu import Vcpu
from orchestra.model.errors import GuestMemoryError, StateError
from orchestra.native.core import Charged
from orchestra.testing import wait_until

KVM = pytest.mark.kvm


@pytest.fixture(autouse=True)
async def soon():
    """Nothing here may take long in real time."""
    with trio.fail_after(30):
        yield


def spec(source: str, **more: Any) -> orc.VmSpec:
    more.setdefault("devices", [Bells(), orc.ExitPort()])
    return orc.VmSpec(name="guest", boot=orc.FlatImage(code=guest(source), mode=64), **more)


def device(vm: orc.Vm, index: int = 0) -> Any:
    return vm._control.guest.devices.plugged[index].device


# ---- doorbells


@KVM
async def test_rings_reach_the_device_on_the_fleets_thread_and_what_is_no_ring_is_a_write(nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec("bells_64"), paused=True)
        bells: BellsDevice = device(vm)
        await vm.resume()
        await wait_until(lambda: {0, 1} <= {number for number, _ in bells.rings} or vm.outcome is not None)
        assert await vm.wait() == orc.Shutdown("exit port", 0)
        assert bells.writes == [(8, 4, 8), (0, 2, 9)]
        assert bells.threads <= {threading.get_ident()}
        assert sum(times for number, times in bells.rings if number == 0) <= 3
        assert vm.statistics().exits["mmio"] == 3  # two writes and a read: no ring


@KVM
async def test_a_guest_that_rings_for_ever_is_served_as_often_as_its_answers_allow(nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(
            spec("bell_storm_64", answer_limit=orc.Limit(rate=50 * RING, burst=5 * RING)), paused=True
        )
        bells: BellsDevice = device(vm)
        begun = trio.current_time()
        await vm.resume()
        await wait_until(lambda: len(bells.rings) >= 15)
        assert len(bells.rings) <= 5 + 50 * (trio.current_time() - begun) + 1
        assert sum(times for _, times in bells.rings) > 100 * len(bells.rings)
        assert vm.statistics().exits.get("mmio", 0) == 0
        await vm.stop()


@KVM
@pytest.mark.parametrize("limit", [None, orc.Limit(rate=1e6)])
async def test_a_limit_on_answers_that_changes_counts_for_a_ring_that_waits_for_its_turn(nothing_left, limit):
    slow = orc.Limit(rate=RING / 60, burst=RING, max_delay=None)  # a ring a minute
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec("bell_storm_64", answer_limit=slow), paused=True)
        bells: BellsDevice = device(vm)
        await vm.resume()
        await wait_until(lambda: bells.rings)
        await wait_all_tasks_blocked(0.01)
        assert len(bells.rings) <= 2  # the burst, and the one that is served and then paid for
        await vm.set_limit(limit, meter="answers")
        await wait_until(lambda: len(bells.rings) >= 5)
        await vm.set_limit(slow, meter="answers")
        await wait_all_tasks_blocked(0.02)
        heard = len(bells.rings)
        await trio.sleep(0.1)
        assert len(bells.rings) <= heard + 1
        await vm.stop()


@KVM
async def test_a_paused_vms_device_hears_nothing_until_it_goes_on(nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec("bell_storm_64"), paused=True)
        bells: BellsDevice = device(vm)
        await vm.resume()
        await wait_until(lambda: bells.rings)
        await vm.pause()
        heard = len(bells.rings)
        os.eventfd_write(vm._control.guest.devices.plugged[0].bells[1], 1)  # as another vCPU could have, just before
        await wait_all_tasks_blocked(0.01)
        assert len(bells.rings) == heard
        await vm.resume()
        await wait_until(lambda: (1, 1) in bells.rings)


@KVM
async def test_a_device_that_fails_at_a_ring_ends_its_vm_by_name_and_no_other(nothing_left, caplog):
    def fails() -> None:
        raise ValueError("what is this?")

    async with orc.open_fleet(backend="kvm") as fleet:
        other = await fleet.launch(orc.VmSpec(name="other", boot=orc.FlatImage(code=guest("spin"))))
        vm = await fleet.launch(spec("bell_storm_64"), paused=True)
        device(vm).during = fails
        await vm.resume()
        outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert outcome.reason == "device Bells at mmio 0xd0000000 failed: ValueError('what is this?')"
        assert other.outcome is None
        assert device(vm).stopped == 1


@KVM
async def test_a_vcpu_that_is_in_the_device_for_long_holds_up_nobody_else(nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec("bell_storm_64"), paused=True)
        plugged = vm._control.guest.devices.plugged[0]
        entered, leave = threading.Event(), threading.Event()

        def stay() -> None:  # as an access that takes its time
            with plugged.lock:
                entered.set()
                assert leave.wait(20)

        thread = threading.Thread(target=stay)
        thread.start()
        assert entered.wait(20)
        await vm.resume()
        for _ in range(20):
            await trio.sleep(0.001)
        assert plugged.device.rings == []
        leave.set()
        await wait_until(lambda: plugged.device.rings)
        thread.join()


# ---- timers


async def test_a_timer_expires_on_the_fleets_clock(autojump_clock):
    async with play([io_write(0x600, b"\x2a"), hlt(after=100)]) as fleet:
        vm = await fleet.launch(blank(devices=[Clock(after=5)]))
        begun = trio.current_time()
        assert await vm.wait() == orc.Shutdown("exit port", 42)
        assert trio.current_time() - begun == pytest.approx(5, abs=0.01)
        assert device(vm).threads == {threading.get_ident()}


async def test_a_timer_of_a_paused_vm_expires_when_it_goes_on(autojump_clock):
    async with play([io_write(0x600, b"\x2a"), hlt(after=100)]) as fleet:
        vm = await fleet.launch(blank(devices=[Clock(after=5)]))
        await trio.sleep(1)
        await vm.pause()
        await trio.sleep(20)
        assert vm.outcome is None
        await vm.resume()
        assert await vm.wait() == orc.Shutdown("exit port", 42)
        assert trio.current_time() == pytest.approx(21, abs=0.1)


async def test_a_timer_that_is_set_again_counts_from_then_on(autojump_clock):
    script = [io_write(0x600, b"\x01"), io_write(0x600, b"\x02", after=3), hlt(after=100)]
    async with play(script) as fleet:
        vm = await fleet.launch(blank(devices=[Clock(after=5)]))
        assert await vm.wait() == orc.Shutdown("exit port", 2)
        assert trio.current_time() == pytest.approx(8, abs=0.1)


async def test_a_timer_goes_with_its_vm(autojump_clock):
    async with play([io_write(0x600, b"\x01"), hlt(after=1)]) as fleet:
        vm = await fleet.launch(blank(devices=[Clock(after=5)]))
        assert await vm.wait() == orc.Halted()
        clock: ClockDevice = device(vm)
        clock.during = lambda: pytest.fail("it was closed")
        assert clock.timer.remaining() is None
        clock.timer.arm(0)
        await trio.sleep(10)


async def test_a_device_that_fails_at_a_timer_ends_its_vm_by_name(autojump_clock, caplog):
    async with play([io_write(0x600, b"\x01"), hlt(after=100)]) as fleet:
        vm = await fleet.launch(blank(devices=[Clock()]), paused=True)
        device(vm).during = lambda: 1 / 0
        await vm.resume()
        outcome = await vm.wait()
        assert isinstance(outcome, orc.Failed)
        assert outcome.reason.startswith("device Clock at ports 0x600 failed: ZeroDivisionError")


async def test_a_device_that_exits_ends_its_vm_and_not_the_program(autojump_clock, caplog):
    def leave(*args: object) -> None:
        raise SystemExit("enough")

    async with play([io_write(0x600, b"\x01"), hlt(after=100)]) as fleet:
        at_timer = await fleet.launch(blank("timer", devices=[Clock()]), paused=True)
        device(at_timer).during = leave
        at_write = await fleet.launch(blank("write", devices=[Clock()]), paused=True)
        device(at_write).write = leave
        for vm in (at_timer, at_write):
            await vm.resume()
            outcome = await vm.wait()
            assert isinstance(outcome, orc.Failed)
            assert "SystemExit('enough')" in outcome.reason


async def test_a_timer_that_is_made_too_late_is_refused(autojump_clock):
    async with play([hlt(after=1)]) as fleet:
        vm = await fleet.launch(blank(devices=[Clock()]))
        with pytest.raises(StateError, match="in __init__"):
            device(vm).hooks.timer(lambda: None)


# ---- the end of a VM


async def test_each_device_is_stopped_once_whatever_becomes_of_another(stage: Stage, caplog):
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("halt", devices=[Clock(), Clock(0x700)]), paused=True)
        first, second = device(vm), device(vm, 1)
        first.at_stop = lambda: 1 / 0
        await vm.resume()
        outcome = await vm.wait()
        assert (first.stopped, second.stopped) == (1, 1)
        assert isinstance(outcome, orc.Failed)
        assert "stop of device Clock at ports 0x600: ZeroDivisionError" in outcome.reason


async def test_a_launch_with_a_device_that_is_not_there_leaves_nothing(stage: Stage, monkeypatch):
    async with stage.open() as fleet:
        monkeypatch.setattr(Clock, "implementation", "bells:Nobody")
        with pytest.raises(orc.SpecError, match="device Clock: implementation='bells:Nobody'"):
            await fleet.launch(stage.spec("halt", devices=[Clock()]))
        assert dict(fleet.vms) == {}


async def test_devices_of_a_vm_whose_vcpus_get_no_threads_are_stopped(monkeypatch, nothing_left):
    stage, stopped = Stage("emulated"), []

    def spawn(vcpu: object) -> None:
        raise orc.ResourceLimit(errno.EAGAIN, "see pids.max")

    async with stage.open() as fleet:
        monkeypatch.setattr(Vcpu, "spawn", spawn)
        monkeypatch.setattr(ClockDevice, "stop", lambda device: stopped.append(device))
        with pytest.raises(orc.ResourceLimit, match=r"pids\.max"):
            await fleet.launch(stage.spec("halt", devices=[Clock(), Clock(0x700)]))
        assert len(stopped) == len(set(stopped)) == 2


@KVM
async def test_a_restart_has_new_devices_and_new_doorbells(nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec("bell_storm_64"))
        await wait_until(lambda: device(vm).rings)
        before = device(vm)
        await vm.reset()
        assert device(vm) is not before
        await wait_until(lambda: device(vm).rings)
        assert before.stopped == 1


# ---- state


class Here:
    """A board without a VM."""

    def __init__(self, spec: orc.VmSpec) -> None:
        from orchestra.machine.devices.bus import Bus

        self.spec = spec
        self.ports, self.mmio = Bus("ports", 1 << 16), Bus("mmio", 1 << 52)
        self.memory = GuestMemory(spec)
        self.ended: list[orc.Outcome] = []
        self.time = 1
        self.back_ends: dict[int, Any] = {}

    def now(self) -> int:
        return self.time

    def end(self, outcome: orc.Outcome) -> None:
        self.ended.append(outcome)

    owed = Owed()

    @property
    def disks(self) -> Any:
        return self

    def of_number(self, number: int) -> None:
        return None  # disks without limits

    def device_buckets(self, meter: orc.Meter) -> list[Charged]:
        return []


class Wired:
    """A machine that has eventfds, and nobody who writes to them."""

    interrupts = None

    def __init__(self) -> None:
        self.wires = self
        self.fds: list[int] = []

    def doorbell(self, address: int, size: int, value: int | None, *, pio: bool) -> int:
        self.fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return self.fds[-1]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def assembly(here: Here, machine: Any, states: Any = None) -> Assembly:
    def at_once(function: Callable[[], object]) -> None:
        function()

    return Assembly(here, machine, None, {}, at_once, at_once, Pacer(here.now, lambda: (0, 0, 0)), states)  # type: ignore[arg-type]


DEVICES = blank(devices=[Bells(), Clock()])


async def test_devices_go_on_from_their_states_and_each_doorbell_is_rung_once(nothing_left):
    here, machine, ended = Here(DEVICES), Wired(), trio.Event()
    made = assembly(here, machine, states=(Kept(5), Kept(6)))
    assert made.state() == (Kept(5), Kept(6))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run, ended)
        await wait_until(lambda: len(made.plugged[0].device.rings) == 2)  # type: ignore[attr-defined]
        ended.set()
    assert sorted(made.plugged[0].device.rings) == [(0, 1), (1, 1)]  # type: ignore[attr-defined]
    machine.close()
    here.memory.close()


@pytest.mark.parametrize(
    ("states", "message"), [((), "0 states for 2 devices"), ((Kept(), orc.Serial()), "can't go on from Serial")]
)
async def test_states_of_other_devices_are_refused(states, message):
    here, machine = Here(DEVICES), Wired()
    with pytest.raises(StateError, match=message):
        assembly(here, machine, states)
    machine.close()
    here.memory.close()


async def test_a_reset_is_power_on_for_all_of_them_and_forgets_what_was_rung_for(nothing_left):
    here, machine, ended = Here(DEVICES), Wired(), trio.Event()
    made = assembly(here, machine)
    for plugged in made.plugged:
        plugged.device.value = 9  # type: ignore[attr-defined]
    os.eventfd_write(machine.fds[0], 1)
    made.reset()
    assert made.state() == (Kept(), Kept())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run, ended)
        await wait_all_tasks_blocked(0.01)
        ended.set()
    assert made.plugged[0].device.rings == []  # type: ignore[attr-defined]
    machine.close()
    here.memory.close()


async def test_devices_that_were_made_are_stopped_if_another_can_not_be(monkeypatch):
    here, machine = Here(blank(devices=[Clock(), Clock()])), Wired()
    stopped: list[object] = []
    monkeypatch.setattr(ClockDevice, "stop", lambda clock: stopped.append(clock))
    with pytest.raises(orc.SpecError, match="0x600-0x600 is claimed by ClockDevice already"):
        assembly(here, machine)
    assert len(stopped) == 2
    machine.close()
    here.memory.close()


async def test_a_launch_that_gets_no_vcpus_stops_the_devices_that_it_made(stage: Stage, monkeypatch):
    stopped: list[object] = []
    monkeypatch.setattr(ClockDevice, "stop", lambda clock: stopped.append(clock))
    monkeypatch.setattr("orchestra.machine.instance.Vcpu", None)
    async with stage.open() as fleet:
        with pytest.raises(TypeError):
            await fleet.launch(stage.spec("halt", devices=[Clock(), Clock(0x700)]))
    assert len(stopped) == 2


async def test_a_device_that_can_not_go_on_from_its_state_is_stopped(monkeypatch):
    def restore(clock: ClockDevice, state: Kept) -> None:
        raise orc.SpecError("value=9: no clock can be in that state")

    stopped: list[object] = []
    monkeypatch.setattr(ClockDevice, "stop", lambda clock: stopped.append(clock))
    monkeypatch.setattr(ClockDevice, "restore", restore)
    here, machine = Here(blank(devices=[Clock()])), Wired()
    with pytest.raises(orc.SpecError, match="no clock"):
        assembly(here, machine, states=(Kept(9),))
    assert len(stopped) == 1
    machine.close()
    here.memory.close()


# ---- memory


@KVM
async def test_readers_of_written_pages_are_told_what_a_device_wrote(nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec("bells_64"), paused=True)
        with vm._control.guest.dirty.reader() as reader:
            reader.take()
            device(vm).hooks.memory.write(0x8_0FFF, b"ab")
            assert list(reader.take()) == [0x8_0000, 0x8_1000]
            assert list(reader.take()) == []


async def test_a_device_can_not_write_for_a_guest_what_the_guest_can_not():
    rom = orc.MemoryRegion(0x10_0000, 0x1000, readonly=True, contents=b"firmware")
    memory = GuestMemory(orc.VmSpec(name="guest", boot=orc.FlatImage(code=b"\xf4"), regions=[rom]))
    dma = Dma(memory)
    for address, size in [(0x10_0000, 1), (0xF_FFFF, 2), (0x10_0FFF, 1), (0xF_0000, 0x2_0000)]:
        with pytest.raises(GuestMemoryError):
            dma.write(address, bytes(size))
    assert dma.read(0x10_0000, 8) == b"firmware"
    assert memory.read(0xF_FFFF, 1) == b"\0"
    dma.write(0xF_FFFF, b"x")
    dma.write(0x10_0000, b"")
    with pytest.raises(GuestMemoryError):
        dma.read(0x10_1000, 1)
    memory.close()


# ---- a pause


@KVM
@pytest.mark.parametrize("console", [orc.Serial(), orc.Console()], ids=["serial", "virtio"])
async def test_nothing_that_is_done_at_the_console_changes_a_quiesced_vm(console: orc.DeviceSpec, nothing_left):
    """Devices are saved one after the other, and the interrupt controllers after them: so they all must stay."""
    chipset = orc.LinuxBoot(kernel="any").platform()
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(
            orc.VmSpec(
                name="guest",
                boot=orc.FlatImage(code=guest("spin"), mode=16),
                irqchip="full",
                devices=(*chipset, console),
            )
        )
        if isinstance(console, orc.Serial):
            port = device(vm, len(chipset))
            port.restore(attrs.evolve(port.state(), ier=1, fcr=1, mcr=8))  # its driver wants interrupts for data
        await vm.pause()
        assert vm.quiesced
        devices = vm._control.guest.devices
        before = devices.state()
        await vm.console.write(b"typed")
        vm.console.resize(100, 40)
        vm.console.resize(120, 50)
        assert devices.state() == before
        await vm.resume()
        await wait_until(lambda: devices.state() != before)
        state = devices.state()[-1]
        if isinstance(console, orc.Serial):
            assert (state.received, state.level) == (b"typed", True)
        else:
            assert state.config[:4] == struct.pack("<2H", 120, 50)
        await vm.stop()
