"""Interrupts and doorbells on KVM: one owner of the routes, changes in one step, and nothing that outlives its VM."""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Iterator

import pytest
import trio

import orchestra as orc
from alarm import Alarm, AlarmDevice, AlarmState
from conftest import guest
from orchestra.backend.kvm.machine import KvmBackend
from orchestra.backend.kvm.system import Kvm
from orchestra.backend.kvm.vm import KvmVm
from orchestra.backend.kvm.wires import MOST_ROUTES, KvmWires, Routes
from orchestra.machine.devices.digest import DigestState
from orchestra.model.errors import KvmError, ResourceLimit
from orchestra.native import ffi, lib

pytestmark = pytest.mark.kvm


@pytest.fixture
def vm(nothing_left) -> Iterator[KvmVm]:
    with Kvm.open() as kvm, kvm.create_vm() as vm:
        vm.create_irqchip()
        yield vm


@pytest.fixture
def wires(vm: KvmVm) -> Iterator[KvmWires]:
    wires = KvmWires(vm, "full")
    yield wires
    wires.close()


# ---- routes


def test_each_interrupt_has_a_number_of_its_own_beyond_the_lines(wires):
    assert [wires.msi().gsi for _ in range(3)] == [24, 25, 26]


def test_a_route_is_there_once_it_is_set_and_gone_once_it_is_cleared(wires):
    first, second = wires.msi(), wires.msi()
    assert wires.routes.table == {}
    assert first.route(0xFEE0_0000, 0x30)
    assert second.route(0xFEE0_1000, 0x31)
    assert wires.routes.table == {24: (0xFEE0_0000, 0x30), 25: (0xFEE0_1000, 0x31)}
    assert first.route(0xFEE0_2000, 0x32)
    second.unroute()
    second.unroute()
    assert wires.routes.table == {24: (0xFEE0_2000, 0x32)}


@pytest.mark.parametrize(
    ("address", "data"),
    [
        (0, 0),
        (0xFEDF_FFFF, 0),
        (0xFEF0_0000, 0),
        (1 << 32 | 0xFEE0_0000, 0),
        ((1 << 64) - 1, 0),
        (0xFEE0_0000, 1 << 32),
    ],
)
def test_what_a_guest_programs_that_is_no_interrupt_is_told_and_changes_nothing(wires, address, data):
    msi = wires.msi()
    assert msi.route(0xFEE0_0000, 0x30)
    assert not msi.route(address, data)
    assert wires.routes.table == {24: (0xFEE0_0000, 0x30)}


def test_what_the_kernel_refuses_leaves_the_table_as_it_was(wires, monkeypatch):
    msi = wires.msi()
    msi.route(0xFEE0_0000, 0x30)
    with monkeypatch.context() as patch:
        patch.setattr("orchestra.backend.kvm.wires.lib", Refuses())
        with pytest.raises(KvmError, match="KVM_SET_GSI_ROUTING: Invalid argument"):
            msi.route(0xFEE0_1000, 0x31)
    assert wires.routes.table == {24: (0xFEE0_0000, 0x30)}
    assert msi.route(0xFEE0_1000, 0x31)


class Refuses:
    def orc_interrupts_route(self, *_: object) -> int:
        return -22


def test_a_route_that_does_not_change_asks_the_kernel_nothing(wires, monkeypatch):
    msi = wires.msi()
    msi.route(0xFEE0_0000, 0x30)
    monkeypatch.setattr("orchestra.backend.kvm.wires.lib", Refuses())
    assert msi.route(0xFEE0_0000, 0x30)


def test_an_interrupt_is_bound_only_while_it_is_routed_and_not_masked(wires, monkeypatch):
    asked: list[tuple[str, bool]] = []
    irqfd, change = KvmVm.irqfd, Routes._change

    def watched(vm: KvmVm, fd: int, gsi: int, *, deassign: bool = False) -> None:
        asked.append(("irqfd", not deassign))
        irqfd(vm, fd, gsi, deassign=deassign)

    def changed(routes: Routes, gsi: int, where: tuple[int, int] | None) -> None:
        asked.append(("route", where is not None))
        change(routes, gsi, where)

    monkeypatch.setattr(KvmVm, "irqfd", watched)
    monkeypatch.setattr(Routes, "_change", changed)
    msi = wires.msi()
    msi.mask()
    assert asked == []
    for step, then in [
        (lambda: msi.route(0xFEE0_0000, 0x30), [("route", True), ("irqfd", True)]),
        (lambda: msi.route(0xFEE0_0000, 0x31), [("route", True)]),  # in one step, without a gap
        (msi.mask, [("irqfd", False)]),
        (msi.mask, []),
        (lambda: msi.route(0xFEE0_0000, 0x31), [("route", True), ("irqfd", True)]),
        (msi.unroute, [("irqfd", False), ("route", False)]),  # in this order
    ]:
        step()
        assert asked == then
        asked.clear()


def test_what_is_fired_while_an_interrupt_is_masked_is_kept_and_what_is_fired_before_a_reset_is_not(wires):
    msi = wires.msi()
    msi.route(0xFEE0_0000, 0x30)
    msi.mask()
    msi.fire()
    assert select.select([msi.fd], [], [], 0)[0]
    msi.unroute()
    assert not select.select([msi.fd], [], [], 0)[0]


def test_more_routes_than_a_vm_has_are_refused(wires):
    wires.routes._next = MOST_ROUTES
    with pytest.raises(ResourceLimit, match="4096 routes"):
        wires.msi()


def test_threads_that_program_at_once_end_with_what_each_set_last(wires):
    msis = [wires.msi() for _ in range(4)]

    def program(number: int) -> None:
        for data in range(50):
            assert msis[number].route(0xFEE0_0000 + (number << 12), data)

    threads = [threading.Thread(target=program, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wires.routes.table == {24 + number: (0xFEE0_0000 + (number << 12), 49) for number in range(4)}


def test_routes_of_a_vm_that_was_closed_are_set_nowhere():
    interrupts = ffi.gc(lib.orc_interrupts_new(1 << 20), lib.orc_interrupts_free)  # no such descriptor
    route = ffi.new("struct orc_route[]", [{"gsi": 24, "address": 0xFEE0_0000, "data": 1}])
    assert lib.orc_interrupts_route(interrupts, True, route, 1) < 0
    lib.orc_interrupts_close(interrupts)
    assert lib.orc_interrupts_route(interrupts, True, route, 1) == 0


def test_an_interrupt_that_is_made_while_its_vm_is_closed_reaches_no_other_descriptor(nothing_left):
    with Kvm.open() as kvm:
        for _ in range(20):
            vm = kvm.create_vm()
            vm.create_irqchip()
            wires = KvmWires(vm, "full")
            msi, pulse, line = wires.msi(), wires.pulse(5), wires.line(6)
            begun, ended = threading.Event(), threading.Event()

            def fire(msi=msi, pulse=pulse, line=line, begun=begun, ended=ended) -> None:
                while not ended.is_set():
                    msi.fire()
                    pulse.fire()
                    line.set(True)
                    begun.set()

            thread = threading.Thread(target=fire)
            thread.start()
            assert begun.wait(20)
            wires.close()
            vm.close()
            reused = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3)]
            for _ in range(100):
                msi.fire()
            ended.set()
            thread.join()
            for fd in reused:
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(fd)
                os.close(fd)
            assert (msi.fd, pulse.fd) == (-1, -1)


# ---- doorbells


def test_a_doorbell_has_an_eventfd_that_counts_and_does_not_block(wires):
    fd = wires.doorbell(0xD000_0000, 4, None, pio=False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)


def test_two_doorbells_at_one_address_differ_by_their_value(wires):
    wires.doorbell(0xD000_0000, 4, 1, pio=False)
    wires.doorbell(0xD000_0000, 4, 2, pio=False)
    wires.doorbell(0x600, 2, 1, pio=True)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD: File exists"):
        wires.doorbell(0xD000_0000, 4, 2, pio=False)


def test_a_doorbell_that_moves_is_at_one_place_at_most(wires):
    bell, other = wires.bell(), wires.bell()
    bell.place(0xD000_3000)
    bell.place(0xD000_3000)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD: File exists"):
        other.place(0xD000_3000)
    bell.place(0x4_D000_3000)
    other.place(0xD000_3000)
    bell.place(None)
    other.place(0x4_D000_3000)
    bell.place(0xD000_3000)


# ---- what a host must have


@pytest.mark.parametrize(
    ("lacks", "irqchip", "devices", "message"),
    [
        ("SPLIT_IRQCHIP", "split", [], 'irqchip="split": this host\'s KVM has no KVM_CAP_SPLIT_IRQCHIP'),
        ("IRQFD", "full", [orc.Digest()], "the interrupts of Digest: this host's KVM has no KVM_CAP_IRQFD"),
        ("IRQ_ROUTING", "full", [orc.Digest()], "the interrupts of Digest.*KVM_CAP_IRQ_ROUTING"),
        ("IRQFD", "full", [orc.PciHostBridge(), orc.Rng()], "the interrupts of Rng.*KVM_CAP_IRQFD"),
        (
            "IOEVENTFD_ANY_LENGTH",
            "full",
            [orc.PciHostBridge(), orc.Rng()],
            "the doorbells of Rng: this host's KVM has no KVM_CAP_IOEVENTFD_ANY_LENGTH",
        ),
        ("IOEVENTFD", "full", [orc.Digest()], "the doorbells of Digest.*KVM_CAP_IOEVENTFD"),
    ],
)
def test_what_this_hosts_kvm_lacks_is_named_before_anything_is_made(
    monkeypatch, lacks, irqchip, devices, message, nothing_left
):
    number = getattr(lib, f"KVM_CAP_{lacks}")
    backend = KvmBackend.open()
    extension = Kvm.extension
    monkeypatch.setattr(Kvm, "extension", lambda kvm, asked: 0 if asked == number else extension(kvm, asked))
    spec = orc.VmSpec(name="vm", boot=orc.FlatImage(code=b"\xf4"), irqchip=irqchip, devices=devices)
    with pytest.raises(orc.SpecError, match=message):
        backend.check(spec)
    backend.close()


# ---- guests


async def test_with_a_split_irqchip_hlt_waits_for_an_interrupt_and_stop_ends_it(nothing_left):
    async with orc.open_fleet(backend="kvm") as fleet:
        spec = orc.VmSpec(name="vm", boot=orc.FlatImage(code=guest("halt")), irqchip="split", vcpus=2)
        vm = await fleet.launch(spec)
        assert vm._control.guest.devices.state() == ()
        with trio.fail_after(20):
            assert await vm.stop() == orc.Stopped("stop()")


@pytest.mark.parametrize(("trigger", "icw1"), [("level", 0x19), ("edge", 0x11), ("resample", 0x19)])
async def test_an_alarm_interrupts_a_guest_by_its_line(trigger, icw1, nothing_left):
    spec = orc.VmSpec(
        name="vm",
        boot=orc.FlatImage(code=guest("alarm")),
        irqchip="full",
        devices=[Alarm(trigger=trigger), orc.ExitPort()],
    )
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec, paused=True)
        vm.write_memory(0x8000, struct.pack("<IHB", 2, 0, icw1))
        await vm.resume()
        with trio.fail_after(20):
            assert await vm.wait() == orc.Shutdown("exit port", 3)
        assert vm._control.guest.devices.state()[0] == AlarmState(None, 3, False)


async def test_routes_leave_the_lines_of_the_irqchip_where_they_were(nothing_left):
    """A table replaces all that KVM had: with an MSI programmed, the serial port's line still reaches the guest."""
    spec = orc.VmSpec(
        name="vm",
        boot=orc.FlatImage(code=guest("serial_interrupt")),
        irqchip="full",
        devices=[orc.Serial(), orc.ExitPort(), orc.Digest()],
    )
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec, paused=True)
        digest = vm._control.guest.devices.plugged[2].device
        digest.write(0x10, 8, 0xFEE0_0000)
        digest.write(0x18, 4, 0x30)
        assert digest.state() == DigestState(msi_address=0xFEE0_0000, msi_data=0x30, programmed=True)
        await vm.resume()
        with trio.fail_after(20):
            assert await vm.wait() == orc.Shutdown("exit port", 2)


async def test_a_line_that_is_resampled_is_raised_again_if_the_device_still_wants_attention(nothing_left, monkeypatch):
    """The guest ends an interrupt without a look at its cause, as it does where several devices share a line."""
    ends: list[bool] = []
    read, acknowledged = AlarmDevice.read, AlarmDevice.acknowledged

    def overlooks(alarm: AlarmDevice, offset: int, size: int) -> int:
        return read(alarm, offset, size) if ends else 0

    def counted(alarm: AlarmDevice) -> None:
        ends.append(alarm.state().level)
        acknowledged(alarm)

    monkeypatch.setattr(AlarmDevice, "read", overlooks)
    monkeypatch.setattr(AlarmDevice, "acknowledged", counted)
    devices = [Alarm(trigger="resample"), orc.ExitPort()]
    spec = orc.VmSpec(name="vm", boot=orc.FlatImage(code=guest("alarm")), irqchip="full", devices=devices)
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec, paused=True)
        vm.write_memory(0x8000, struct.pack("<IHB", 2, 0, 0x19))
        await vm.resume()
        with trio.fail_after(20):
            assert await vm.wait() == orc.Shutdown("exit port", 3)
    assert ends[0]  # it was still high at the first end, and fell afterwards, or the guest would have had no second


def test_an_eventfd_that_another_process_has_filled_makes_nobody_wait(wires):
    """It may have cleared O_NONBLOCK, which is the file's."""
    msi = wires.msi()
    os.set_blocking(msi.fd, True)
    os.eventfd_write(msi.fd, (1 << 64) - 2)
    assert not msi.deliver()  # it goes nowhere: it is not bound
    assert msi.route(0xFEE00000, 0x41)
    assert msi.deliver()
    msi.mask()
    assert not msi.deliver()
