"""The power button, and the orderly end: what the guest is told, and what happens if it does not listen."""

from __future__ import annotations

import errno

import pytest
import trio
import trio.testing

import orchestra as orc
from conftest import play
from orchestra.backend.scripted import failed_run
from orchestra.journal import read_journal
from orchestra.model.chipset import AcpiRegisters

POWERS_OFF = bytes.fromhex(
    "ba0406"  # again: mov dx, 0x604: EVENTS
    "66ed"  # in eax, dx
    "a801"  # test al, 1: the power button
    "74f7"  # jz again
    "ba0006"  # mov dx, 0x600: SLEEP_CONTROL
    "b034"  # mov al, 0x34: enable, S5
    "ee"  # out dx, al
    "f4"
)
DEAF = b"\xeb\xfe"


def spec(code: bytes, **more) -> orc.VmSpec:
    return orc.VmSpec(name="vm", boot=orc.FlatImage(code=code), devices=(AcpiRegisters(),), irqchip=True, **more)


@pytest.fixture
async def fleet(nothing_left):
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        yield fleet


@pytest.mark.kvm
async def test_guest_that_is_told_of_the_power_button_powers_off(fleet):
    vm = await fleet.launch(spec(POWERS_OFF))
    await vm.power_button()
    assert await vm.wait() == orc.Shutdown(reason="ACPI power-off")


@pytest.mark.kvm
async def test_shutdown_of_a_guest_that_listens_is_its_own_power_off_and_gives_everything_back(fleet):
    vm = await fleet.launch(spec(POWERS_OFF))
    assert await vm.shutdown(timeout=60) == orc.Shutdown(reason="ACPI power-off")
    assert "vm" not in fleet.vms


@pytest.mark.kvm
async def test_shutdown_of_a_deaf_guest_is_by_force_and_says_so(fleet):
    vm = await fleet.launch(spec(DEAF))
    assert await vm.shutdown(timeout=0.05) == orc.Stopped("did not power off within 0.05 s")
    assert "vm" not in fleet.vms


@pytest.mark.kvm
async def test_vm_without_a_power_button_says_what_has_one_and_is_shut_down_at_once(fleet):
    vm = await fleet.launch(orc.VmSpec(name="vm", boot=orc.FlatImage(code=DEAF)))
    with pytest.raises(orc.StateError, match=r"no power button.*LinuxBoot.*stop\(\)"):
        await vm.power_button()
    outcome = await vm.shutdown(timeout=3600)
    assert isinstance(outcome, orc.Stopped)
    assert "no power button" in outcome.reason


@pytest.mark.kvm
async def test_paused_vm_is_told_once_it_is_resumed(fleet):
    vm = await fleet.launch(spec(POWERS_OFF), paused=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.power_button)
        await trio.testing.wait_all_tasks_blocked(0.01)
        (device,) = (plugged.device for plugged in vm._control.guest.devices.plugged)
        assert device.state().events == 0  # of a quiesced VM nothing changes
        await vm.resume()
    assert await vm.wait() == orc.Shutdown(reason="ACPI power-off")


@pytest.mark.kvm
async def test_paused_vm_that_is_stopped_lets_those_go_who_press_its_button(fleet):
    vm = await fleet.launch(spec(POWERS_OFF), paused=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.power_button)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await vm.stop()
    assert vm.outcome == orc.Stopped("stop()")


@pytest.mark.kvm
async def test_shutdown_of_an_ended_vm_is_its_outcome_and_its_button_is_gone(fleet):
    vm = await fleet.launch(orc.VmSpec(name="vm", boot=orc.FlatImage(code=b"\xf4")))  # hlt
    await vm.wait()
    with pytest.raises(orc.StateError, match="can't press the power button of vm 'vm': it is stopped"):
        await vm.power_button()
    assert await vm.shutdown() == orc.Halted()


@pytest.mark.kvm
async def test_cancelled_shutdown_forces_nothing(fleet):
    vm = await fleet.launch(spec(DEAF))
    with trio.move_on_after(0.05):
        await vm.shutdown(timeout=3600)
    assert vm.outcome is None


@pytest.mark.parametrize("seconds", [-1, "10", True, float("nan")])
@pytest.mark.kvm
async def test_shutdown_with_a_bad_timeout_raises_spec_error_and_presses_nothing(fleet, seconds):
    vm = await fleet.launch(spec(DEAF))
    with pytest.raises(orc.SpecError, match="timeout="):
        await vm.shutdown(timeout=seconds)
    (device,) = (plugged.device for plugged in vm._control.guest.devices.plugged)
    assert device.state().events == 0


async def test_button_between_two_runs_says_so_and_shutdown_stops_the_vm(autojump_clock, nothing_left):
    async with play([failed_run(errno.EIO)]) as fleet:
        restart = orc.Restart(when="on-failure", backoff=3600, backoff_max=3600)
        vm = await fleet.launch(orc.VmSpec(name="vm", boot=orc.FlatImage(code=DEAF), restart=restart))
        await trio.sleep(1)
        assert vm.state == "waiting"
        with pytest.raises(orc.StateError, match="between two runs"):
            await vm.power_button()
        begun = trio.current_time()
        assert isinstance(await vm.shutdown(timeout=60), orc.Failed)  # how its last run ended
        assert trio.current_time() == begun


@pytest.mark.kvm
async def test_journal_says_that_the_button_was_pressed(tmp_path, nothing_left):
    path = tmp_path / "journal"
    async with orc.open_fleet(backend="kvm", bus_locks="auto", journal=orc.JournalSpec(str(path))) as fleet:
        vm = await fleet.launch(spec(POWERS_OFF))
        await vm.shutdown(timeout=60)
    with read_journal(path) as reader:
        assert [(row.state, row.reason) for row in reader.states(vm="vm")][-2:] == [
            ("running", "power button pressed"),
            ("stopped", "shutdown: ACPI power-off"),
        ]
