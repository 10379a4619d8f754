"""The devices that come with a PC: ACPI registers, clock, reset line, panic port."""

from __future__ import annotations

import calendar

import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from orchestra.machine.devices.acpi import AcpiState
from orchestra.machine.devices.rtc import RtcState
from orchestra.machine.runs import in_a_line
from orchestra.model import platform
from orchestra.model.actions import ACPI_RESET, KEYBOARD_RESET, POWER_OFF
from orchestra.model.chipset import I8042, AcpiRegisters, PanicPort, Rtc
from orchestra.testing import DeviceRig

CHIPSET = [AcpiRegisters(), I8042(), PanicPort(), Rtc()]
SLEEP_CONTROL, RESET, EVENTS = 0, 2, 4  # from the first of the ACPI ports


# ---- ACPI registers


def test_the_sleep_state_s5_powers_off():
    with DeviceRig(AcpiRegisters()) as rig:
        rig.write(SLEEP_CONTROL, 5 << 2 | 1 << 5, size=1)
        assert rig.outcomes == [orc.Shutdown(reason=POWER_OFF)]


@pytest.mark.parametrize("value", [5 << 2, 1 << 5, 3 << 2 | 1 << 5, 0])
def test_another_sleep_state_or_none_does_nothing(value: int):
    with DeviceRig(AcpiRegisters()) as rig:
        rig.write(SLEEP_CONTROL, value, size=1)
        assert rig.outcomes == []


def test_the_reset_register_resets():
    with DeviceRig(AcpiRegisters()) as rig:
        rig.write(RESET, 0, size=1)
        assert rig.outcomes == []
        rig.write(RESET, 1, size=1)
        assert rig.outcomes == [orc.Shutdown(reason=ACPI_RESET)]


def test_an_event_interrupts_and_is_read_once():
    with DeviceRig(AcpiRegisters()) as rig:
        rig.device.happened(platform.POWER_BUTTON)
        rig.device.happened(platform.NEW_GENERATION)
        assert rig.pulse.fired == 2
        assert rig.read(EVENTS) == platform.POWER_BUTTON | platform.NEW_GENERATION
        assert rig.read(EVENTS) == 0


def test_an_event_that_was_not_read_survives_a_restore_and_interrupts_again():
    with DeviceRig(AcpiRegisters()) as rig:
        rig.device.happened(platform.POWER_BUTTON)
        with rig.again() as other:
            assert other.pulse.fired == 1
            assert other.read(EVENTS) == platform.POWER_BUTTON


def test_a_state_that_no_device_has_is_refused():
    with pytest.raises(orc.SpecError, match="events=8"):
        AcpiState(8)


# ---- reset line, panic port


def test_the_keyboard_controllers_reset_command_resets():
    with DeviceRig(I8042()) as rig:
        assert rig.read(0, size=1) & 2 == 0  # ready for a command
        rig.write(0, 0xFE, size=1)
        assert rig.outcomes == [orc.Shutdown(reason=KEYBOARD_RESET)]


def test_a_panic_ends_the_vm_with_the_last_lines_of_its_console():
    with DeviceRig(PanicPort()) as rig:
        rig.console.put(b"\n".join(b"line %d" % number for number in range(100)))
        assert rig.read(0, size=1) == 1
        rig.write(0, 1, size=1)
        (outcome,) = rig.outcomes
        assert isinstance(outcome, orc.Failed)
        assert outcome.console.splitlines()[-2:] == ["line 98", "line 99"]
        assert str(outcome).startswith("the guest's kernel panicked\nline 40\n")


def test_a_panics_last_lines_do_nothing_to_the_terminal_that_they_are_printed_on():
    with DeviceRig(PanicPort()) as rig:
        rig.console.put(b"\x1b[2J\x1b]0;root\x07all is well\x08\r\n\xff\x9b1mnow \xf0\x9f\x90\xa7")
        rig.write(0, 1, size=1)
        (outcome,) = rig.outcomes
        assert isinstance(outcome, orc.Failed)
        assert all(line.isprintable() for line in str(outcome).splitlines())
        assert "all is well" in outcome.console
        assert "\N{PENGUIN}" in outcome.console


def test_a_panic_after_endless_lines_keeps_the_begin_of_each():
    with DeviceRig(PanicPort()) as rig:
        rig.console.put(b"".join(b"%d" % n + b"a" * 4000 + b"\n" for n in range(15)))
        rig.write(0, 1, size=1)
        (outcome,) = rig.outcomes
        assert isinstance(outcome, orc.Failed)
        assert {len(line) for line in outcome.console.splitlines()} == {200}
        assert in_a_line(outcome) == "the guest's kernel panicked"


# ---- the clock

BINARY_24 = 0x06
WHEN = 1_700_000_000  # 2023-11-14 22:13:20, a Tuesday


def registers(rig: DeviceRig) -> dict[int, int]:
    found = {}
    for index in (0, 2, 4, 6, 7, 8, 9, 0x32):
        rig.write(0, index, size=1)
        found[index] = rig.read(1, size=1)
    return found


def put(rig: DeviceRig, index: int, value: int) -> None:
    rig.write(0, index, size=1)
    rig.write(1, value, size=1)


def test_the_clock_is_utc_in_bcd():
    with DeviceRig(Rtc()) as rig:
        assert registers(rig) == {0: 0x20, 2: 0x13, 4: 0x22, 6: 3, 7: 0x14, 8: 0x11, 9: 0x23, 0x32: 0x20}


def test_the_clock_goes_on():
    with DeviceRig(Rtc()) as rig:
        rig.wall_clock += 3600 * 2
        assert registers(rig)[4] == 0x00
        assert registers(rig)[7] == 0x15


@pytest.mark.parametrize(("hour", "shown"), [(0, 12), (1, 1), (11, 11), (12, 12 | 0x80), (13, 1 | 0x80)])
def test_twelve_hours_in_binary(hour: int, shown: int):
    with DeviceRig(Rtc()) as rig:
        rig.wall_clock = calendar.timegm((2024, 2, 29, hour, 5, 6))
        put(rig, 0x0B, 0x04)
        assert registers(rig) == {0: 6, 2: 5, 4: shown, 6: 5, 7: 29, 8: 2, 9: 24, 0x32: 20}


@given(
    when=st.integers(calendar.timegm((1970, 1, 1, 0, 0, 0)), calendar.timegm((2099, 12, 31, 23, 59, 59))),
    mode=st.sampled_from([0x00, 0x02, 0x04, 0x06]),
)
def test_what_a_guest_sets_in_its_mode_is_what_it_reads(when: int, mode: int):
    with DeviceRig(Rtc()) as rig, DeviceRig(Rtc()) as other:
        other.wall_clock = when
        put(other, 0x0B, mode)
        wanted = registers(other)
        put(rig, 0x0B, mode | 0x80)
        for index, value in wanted.items():
            put(rig, index, value)
        rig.wall_clock += 1000  # while it is being set, it stands still
        assert registers(rig) == wanted
        put(rig, 0x0B, mode)
        assert registers(rig) == wanted
        rig.wall_clock += 60
        other.wall_clock += 60
        assert registers(rig) == registers(other)


def test_a_time_that_does_not_exist_changes_nothing():
    with DeviceRig(Rtc()) as rig:
        before = registers(rig)
        put(rig, 0x0B, BINARY_24 | 0x80)
        put(rig, 8, 13)  # the thirteenth month
        put(rig, 0x0B, 0x02)
        assert registers(rig) == before


def test_memory_and_time_survive_a_restore_and_a_reset():
    with DeviceRig(Rtc()) as rig:
        put(rig, 0x40, 0x5A)
        put(rig, 4, 0x05)
        with rig.again() as other:
            other.device.reset()
            other.write(0, 0x40, size=1)
            assert other.read(1, size=1) == 0x5A
            assert registers(other)[4] == 0x05


def test_states_that_no_clock_has_are_refused():
    with pytest.raises(orc.SpecError, match="index=128"):
        RtcState(index=128)
    with pytest.raises(orc.SpecError, match="must be 128 bytes"):
        RtcState(registers=b"")


# ---- all of them

ACCESS = st.tuples(st.booleans(), st.integers(0, 1 << 52), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))


@pytest.mark.parametrize("spec", CHIPSET)
@given(accesses=st.lists(ACCESS, max_size=60))
def test_any_accesses_are_survived_and_the_state_goes_on(spec: orc.DeviceSpec, accesses):
    with DeviceRig(spec) as rig:
        for write, offset, size, value in accesses:
            offset %= 17  # mostly on the device
            if write:
                rig.write(offset, value & (1 << 8 * size) - 1, size)
            else:
                assert 0 <= rig.read(offset, size) < 1 << 8 * size
        with rig.again() as other:
            assert other.device.state() == rig.device.state()
        rig.device.reset()
