"""The I/O thread of a VM: what is in flight keeps its own VM from being quiesced; the bit of a bus master counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

import orchestra as orc
from host_driver import DATA, WRITE, HostDriver, Missing, machine
from orchestra.journal import read_journal
from orchestra.machine.devices.pci import MASTER, MEMORY
from orchestra.native import ffi, lib
from orchestra.testing import wait_until

pytestmark = pytest.mark.kvm

AWAY = 0x2_0000
NEEDS_RESET = 0x40


@pytest.fixture
async def soon():
    with trio.fail_after(60):
        yield


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(b"sector 0".ljust(512, b".") + b"sector 1".ljust(512, b".") + bytes(1 << 20))
    return path


@pytest.fixture(params=["a thread of the disk", "the I/O thread"])
def disk(request, image: Path, tmp_path: Path) -> orc.Disk:
    """One whose requests wait on a thread of its own, or (by io_uring) on the I/O thread, with all locks held."""
    if request.param == "the I/O thread":
        return orc.Disk(str(image), readonly=True)
    return orc.Disk(str(tmp_path / "new.img"), base=str(image))


async def test_a_pause_waits_for_requests_in_flight_says_which_and_keeps_nobody_else_waiting(disk, soon, nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(machine(disk))
        driver = HostDriver(vm)
        driver.start()
        driver.read_sector(0, DATA + 0x1000)
        await wait_until(lambda: driver.used == 1)
        assert vm.read_memory(DATA + 0x1000, 8) == b"sector 0"
        missing = Missing(vm, AWAY)
        try:
            driver.read_sector(1, AWAY)
            await wait_until(missing.touched)
            await vm.pause(quiesce=False)
            assert (vm.state, vm.quiesced) == (orc.State.PAUSED, False)
            (pending,) = vm.statistics().pending
            assert isinstance(pending, orc.PendingRequests)
            assert pending.device == f"Disk {disk.path}"
            assert pending.requests in (1, None)  # None: the I/O thread has the device's lock
            assert str(pending).endswith("requests are in flight")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vm.pause)  # as a snapshot waits
                other = await fleet.launch(machine(orc.Rng(), name="other"))
                await other.pause()
                assert other.quiesced
                await other.stop()
                assert not vm.quiesced
                await vm.resume()
                await vm.pause(quiesce=False)
                assert not vm.quiesced
                missing.give()
            await vm.pause()
            assert vm.quiesced
            assert not vm.statistics().pending
        finally:
            missing.give()
        assert driver.used == 2
        assert vm.read_memory(AWAY, 8) == b"sector 1"
        driver.read_sector(0, AWAY)
        assert lib.orc_virtio_outstanding(driver.device.handle) == 0  # nothing is taken during the pause
        assert driver.used == 2
        await vm.resume()
        await wait_until(lambda: driver.used == 3)


async def test_a_vm_that_is_stopped_while_its_pause_waits_lets_the_pause_go(image, soon, nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet, trio.open_nursery() as nursery:
        vm = await fleet.launch(machine(orc.Disk(str(image), readonly=True)))
        driver = HostDriver(vm)
        driver.start()
        missing = Missing(vm, AWAY)
        try:
            driver.read_sector(0, AWAY)
            await wait_until(missing.touched)
            nursery.start_soon(vm.pause)
            await wait_until(lambda: vm.state is orc.State.PAUSED)
            nursery.start_soon(vm.stop)
            await trio.testing.wait_all_tasks_blocked()
        finally:
            missing.give()
    assert vm.outcome == orc.Stopped("stop()")


async def test_an_idle_device_is_quiesced_with_the_last_vcpu(soon, nothing_left, tmp_path):
    """One row in the journal, as without devices."""
    journal = tmp_path / "fleet.db"
    async with orc.open_fleet(backend="kvm", bus_locks="off", journal=orc.JournalSpec(str(journal))) as fleet:
        vm = await fleet.launch(machine(orc.Rng()))
        HostDriver(vm).start()
        await vm.pause()
        await vm.stop()
    with read_journal(journal) as read:
        assert [row.state for row in read.states()] == ["created", "running", "paused", "stopped"]


# ---- bus master


async def test_a_device_touches_no_memory_and_fires_nothing_until_it_is_a_bus_master(soon, nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(machine(orc.Rng()))
        driver = HostDriver(vm)
        driver.start(master=False)
        driver.offer((DATA, 16, WRITE))
        await wait_until(lambda: counters(driver).kicks == 1)
        await vm.pause()
        assert (driver.used, vm.read_memory(DATA, 16)) == (0, bytes(16))
        assert counters(driver).interrupts == 0
        await vm.resume()
        driver.command(MEMORY | MASTER)
        await wait_until(lambda: driver.used == 1)
        assert vm.read_memory(DATA, 16) != bytes(16)
        driver.command(MEMORY)
        driver.offer((DATA + 0x100, 16, WRITE))
        driver.put(0x3000, 2, 0)  # in the register as well: the doorbell is as it was
        await vm.pause()
        assert (driver.used, driver.status) == (1, 15)
        state = vm._control.guest.devices.state()
        assert state[1].queue[0].next == 1
        await vm.resume()
        driver.command(MEMORY | MASTER)
        await wait_until(lambda: driver.used == 2)


async def test_a_disk_that_loses_the_bus_with_a_request_in_flight_writes_no_status_and_needs_a_reset(
    image, tmp_path, soon, nothing_left
):
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(machine(orc.Disk(str(tmp_path / "new.img"), base=str(image))))
        driver = HostDriver(vm)
        driver.start()
        missing = Missing(vm, AWAY)
        try:
            vm.write_memory(DATA + 0x100, b"\xaa")
            driver.read_sector(0, AWAY)
            await wait_until(missing.touched)
            driver.command(MEMORY)
        finally:
            missing.give()
        await wait_until(lambda: lib.orc_virtio_outstanding(driver.device.handle) == 0)
        assert (driver.used, vm.read_memory(DATA + 0x100, 1)) == (0, b"\xaa")
        driver.command(MEMORY | MASTER)
        assert driver.status & NEEDS_RESET
        found = counters(driver)
        assert ffi.string(lib.orc_queue_error_name(found.error)) == b"bus mastering turned off with a request in flight"


def counters(driver: HostDriver):
    found = ffi.new("struct orc_virtio_counters *")
    lib.orc_virtio_look(driver.device.handle, found)
    return found


# ---- the end


async def test_what_a_disk_writes_at_its_end_keeps_no_other_vm_waiting(image, tmp_path, soon, nothing_left):
    """An overlay is flushed when its VM ends: on a worker thread, as a file may take long or hang."""
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet:
        vm = await fleet.launch(machine(orc.Disk(str(tmp_path / "new.img"), base=str(image))))
        device = vm._control.guest.devices.plugged[1].device
        threads = []
        closes = type(device).drained

        def noted(self) -> None:
            threads.append(trio.lowlevel.in_trio_run())
            closes(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(device), "drained", noted)
            await vm.stop()
        assert threads == [False]
