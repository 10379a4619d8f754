"""The debug console and the exit port."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from orchestra.machine.devices.bus import Device
from orchestra.machine.devices.console import Console
from orchestra.machine.devices.ports import DebugConsolePort, ExitDevice
from orchestra.native import lib


def make_console() -> Console:
    return Console(lambda wake: wake())


SIZES = st.sampled_from([1, 2, 4, 8])


def test_bytes_written_to_the_console_come_out_in_order():
    console = make_console()
    port = DebugConsolePort(0xE9, console)
    for byte in b"hello":
        port.write(0, 1, byte)
    assert console.output == b"hello"


def test_wider_write_to_the_console_is_its_bytes_from_the_lowest():
    console = make_console()
    DebugConsolePort(0xE9, console).write(0, 4, int.from_bytes(b"abcd", "little"))
    assert console.output == b"abcd"


@pytest.mark.parametrize(("port", "value"), [(0xE9, 0xE9), (0x402, 0x02)])
def test_reading_the_console_gives_the_ports_number_by_which_guests_find_it(port, value):
    assert DebugConsolePort(port, make_console()).read(0, 1) == value


def test_write_to_the_exit_port_ends_with_that_code():
    codes: list[int] = []
    device = ExitDevice(codes.append)
    device.write(0, 1, 0)
    device.write(0, 4, 0xFFFF_FFFF)
    assert codes == [0, 0xFFFF_FFFF]


def test_a_write_to_the_exit_port_is_not_the_cores():
    device = ExitDevice(lambda code: None)
    assert not lib.orc_device_answer(device.native, 0, 1, 1, True, b"\1")


def test_reading_the_exit_port_ends_nothing():
    codes: list[int] = []
    assert ExitDevice(codes.append).read(0, 4) == 0
    assert codes == []


@pytest.mark.parametrize("make", [lambda: DebugConsolePort(0xE9, make_console()), lambda: ExitDevice(lambda _: None)])
@given(data=st.data())
def test_any_access_is_survived(make, data):
    device = make()
    assert isinstance(device, Device)
    size, offset = data.draw(SIZES), data.draw(st.integers(0, 1 << 52))
    device.write(offset, size, data.draw(st.integers(0, (1 << 8 * size) - 1)))
    assert 0 <= device.read(offset, size) < 1 << 8 * size
