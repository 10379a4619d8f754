"""The debug console and the exit port."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from orchestra.machine.devices.bus import Device
from orchestra.machine.devices.console import Console
from orchestra.machine.devices.peripheral import Hooks
from orchestra.machine.devices.ports import DebugConsolePort, ExitDevice, Stateless
from orchestra.native import lib


def make_console() -> Console:
    return Console(lambda wake: wake())


def hooks(console: Console | None = None, end: Callable[[orc.Outcome], None] = lambda outcome: None) -> Hooks:
    return Hooks(memory=None, timer=None, console=console or make_console(), end=end)  # type: ignore[arg-type]


def debug_console(port: int, console: Console) -> DebugConsolePort:
    return DebugConsolePort(orc.DebugConsole(port), hooks(console))


def exit_port(end: Callable[[orc.Outcome], None] = lambda outcome: None) -> ExitDevice:
    return ExitDevice(orc.ExitPort(), hooks(end=end))


SIZES = st.sampled_from([1, 2, 4, 8])


def test_bytes_written_to_the_console_come_out_in_order():
    console = make_console()
    port = debug_console(0xE9, console)
    for byte in b"hello":
        port.write(0, 1, byte)
    assert console.log() == b"hello"


def test_wider_write_to_the_console_is_its_bytes_from_the_lowest():
    console = make_console()
    debug_console(0xE9, console).write(0, 4, int.from_bytes(b"abcd", "little"))
    assert console.log() == b"abcd"


@pytest.mark.parametrize(("port", "value"), [(0xE9, 0xE9), (0x402, 0x02)])
def test_reading_the_console_gives_the_ports_number_by_which_guests_find_it(port, value):
    assert debug_console(port, make_console()).read(0, 1) == value


def test_write_to_the_exit_port_ends_with_that_code():
    outcomes: list[orc.Outcome] = []
    device = exit_port(outcomes.append)
    device.write(0, 1, 0)
    device.write(0, 4, 0xFFFF_FFFF)
    assert outcomes == [orc.Shutdown(code=0), orc.Shutdown(code=0xFFFF_FFFF)]


def test_a_write_to_the_exit_port_is_not_the_cores():
    device = exit_port()
    assert not lib.orc_device_answer(device.native, 0, 1, 1, True, b"\1")


def test_reading_the_exit_port_ends_nothing():
    outcomes: list[orc.Outcome] = []
    assert exit_port(outcomes.append).read(0, 4) == 0
    assert outcomes == []


@pytest.mark.parametrize("make", [lambda: debug_console(0xE9, make_console()), exit_port])
@given(data=st.data())
def test_any_access_is_survived(make, data):
    device = make()
    assert isinstance(device, Device)
    size, offset = data.draw(SIZES), data.draw(st.integers(0, 1 << 52))
    device.write(offset, size, data.draw(st.integers(0, (1 << 8 * size) - 1)))
    assert 0 <= device.read(offset, size) < 1 << 8 * size


@pytest.mark.parametrize("make", [lambda: debug_console(0xE9, make_console()), exit_port])
def test_they_keep_nothing(make):
    device = make()
    assert device.state() == Stateless()
    device.reset()
    again = type(device).from_state(device.spec, device.hooks, Stateless())
    assert again.read(0, 1) == device.read(0, 1)


def test_what_was_said_stays_with_the_console_over_a_reset():
    console = make_console()
    port = debug_console(0xE9, console)
    port.write(0, 1, 65)
    port.reset()
    assert console.log() == b"A"
