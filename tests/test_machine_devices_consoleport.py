"""Ports of a virtio console: streams between a program in the guest and tasks here."""

from __future__ import annotations

import struct
from collections.abc import Callable

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st

import orchestra as orc
from orchestra.machine.devices.consoleport import KEPT, ConsolePort, Ports
from orchestra.model import virtio
from orchestra.native import ffi, lib
from orchestra.testing import DeviceRig

NAMES = ("org.example.agent", "log")
SPEC = orc.Console(ports=NAMES)


def at_once(wake: Callable[[], None]) -> None:
    wake()


class Guest:
    """The driver's side of a port, for tests of what is above the core."""

    def __init__(self, port: ConsolePort) -> None:
        self.port = port
        lib.orc_port_set_open(port.handle, ffi.NULL, True)

    def close(self) -> None:
        lib.orc_port_set_open(self.port.handle, ffi.NULL, False)
        self.port.wake()

    def open(self) -> None:
        lib.orc_port_set_open(self.port.handle, ffi.NULL, True)
        self.port.wake()

    def write(self, data: bytes) -> int:
        """How much there was room for."""
        size = int(lib.orc_port_say(self.port.handle, ffi.NULL, data, len(data)))
        self.port.wake()
        return size

    def read(self, most: int = lib.ORC_CONSOLE_TYPED) -> bytes:
        room = ffi.new("uint8_t[]", most)
        size = lib.orc_console_read(self.port.handle, ffi.NULL, room, most)
        self.port.wake()
        return bytes(ffi.buffer(room, size))


@pytest.fixture
def port() -> ConsolePort:
    return ConsolePort(at_once, "agent", "db-1")


# ---- the spec


def test_ports_go_through_the_codec_and_may_be_a_list():
    assert orc.Console(ports=list(NAMES)) == SPEC
    spec = orc.VmSpec(
        name="vm",
        boot=orc.FlatImage(code=b"\xf4", mode=64),
        irqchip="full",
        devices=(orc.PciHostBridge(), SPEC),
    )
    assert orc.decode(orc.VmSpec, orc.encode(spec)) == spec


@pytest.mark.parametrize(
    "names", [("",), ("a" * 65,), ("é" * 33,), ("a/b",), ("..",), ("a\n",), ("\ud800",), (7,), 7, ("a", "b", "a")]
)
def test_names_that_no_guest_could_use_are_refused(names):
    with pytest.raises(orc.SpecError, match="ports="):
        orc.Console(ports=names)


def test_more_ports_than_a_device_has_queues_for_are_refused():
    assert virtio.MOST_PORTS == lib.ORC_CONSOLE_PORTS
    orc.Console(ports=[f"p{n}" for n in range(virtio.MOST_PORTS)])
    with pytest.raises(orc.SpecError, match="at most 6: add another Console"):
        orc.Console(ports=[f"p{n}" for n in range(virtio.MOST_PORTS + 1)])


def test_two_consoles_of_a_vm_have_no_port_of_the_same_name():
    boot = orc.FlatImage(code=b"\xf4", mode=64)
    with pytest.raises(orc.SpecError, match="ports='log': must be there once"):
        orc.VmSpec(
            name="vm", boot=boot, irqchip="full", devices=(orc.PciHostBridge(), SPEC, orc.Console(ports=("log",)))
        )


def test_the_bus_has_two_queues_for_each_port_and_two_for_control():
    function = SPEC.wiring().pci
    assert function is not None
    with DeviceRig(SPEC) as rig:
        assert lib.orc_virtio_queues(rig.device.handle) == len(function.bells) == 8
        assert lib.orc_virtio_vectors(rig.device.handle) == function.vectors == 9
        assert struct.unpack("<HHI", struct.pack("<Q", rig.read(0x2000, 8))) == (80, 25, 3)
        rig.write(0, 0)  # feature select
        assert rig.read(4) & 0b10  # VIRTIO_CONSOLE_F_MULTIPORT
    with DeviceRig(orc.Console()) as rig:
        assert rig.read(0x2004) == 0
        assert not rig.read(4) & 0b10


# ---- read


async def test_what_the_guest_wrote_is_read_in_order_as_much_as_is_asked_for(port):
    guest = Guest(port)
    guest.write(b"hello ")
    guest.write(b"world")
    assert await port.read(3) == b"hel"
    assert await port.read() == b"lo world"


async def test_a_reader_waits_until_the_guest_writes(port):
    guest = Guest(port)
    async with trio.open_nursery() as nursery:
        found: list[bytes] = []

        async def read() -> None:
            found.append(await port.read())

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        assert not found
        guest.write(b"x")
    assert found == [b"x"]


async def test_reading_ends_when_the_guest_has_closed_it_and_all_was_read(port):
    assert await port.read() == b""  # nobody has opened it
    guest = Guest(port)
    guest.write(b"last words")
    guest.close()
    assert await port.read(4) == b"last"
    assert await port.read() == b" words"
    assert await port.read() == b""


async def test_a_reader_that_waits_is_told_that_the_guest_closes_it_or_ends(port):
    guest = Guest(port)
    for ends in (guest.close, port.close):
        guest.open()
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                assert await port.read() == b""

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            ends()


async def test_a_guest_that_writes_more_than_is_read_is_told_to_wait_and_nothing_is_lost(port):
    guest = Guest(port)
    data = bytes(n % 251 for n in range(3 * KEPT))
    sent = guest.write(data)
    assert sent == KEPT
    assert guest.write(b"x") == 0
    got = b""
    while len(got) < len(data):
        got += await port.read(10_000)
        sent += guest.write(data[sent:])
    assert got == data


async def test_a_cancelled_read_has_taken_nothing(port):
    guest = Guest(port)
    guest.write(b"kept")
    with trio.CancelScope() as scope:
        scope.cancel()
        await port.read()
    assert scope.cancelled_caught
    assert await port.read() == b"kept"


@pytest.mark.parametrize("most", [0, -1, "all", 1.5])
async def test_to_read_no_number_of_bytes_is_an_error(port, most):
    with pytest.raises(orc.SpecError, match="most"):
        await port.read(most)


async def test_one_task_reads_and_one_writes(port):
    guest = Guest(port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.read)
        nursery.start_soon(port.write, bytes(2 * lib.ORC_CONSOLE_TYPED))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match="vm 'db-1': port 'agent': another task is reading"):
            await port.read()
        with pytest.raises(trio.BusyResourceError, match="another task is writing"):
            await port.write(b"x")
        nursery.cancel_scope.cancel()
    guest.write(b"x")
    assert await port.read() == b"x"


# ---- write


async def test_what_is_written_is_read_by_the_guest_however_long_it_is(port):
    guest, got = Guest(port), b""
    data = bytes(n % 251 for n in range(5 * lib.ORC_CONSOLE_TYPED))
    # Written by hand: in the core, a device of the VM is what announces room.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.write, data)
        while len(got) < len(data):
            await trio.testing.wait_all_tasks_blocked()
            got += guest.read(1000)
    assert got == data


async def test_to_write_to_a_port_that_no_program_has_open_is_an_error_with_the_remedy(port):
    with pytest.raises(orc.StateError, match=r"vm 'db-1': port 'agent': no program .*wait_open\(\)"):
        await port.write(b"x")


async def test_what_was_written_for_one_program_never_reaches_the_next(port):
    guest = Guest(port)
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            with pytest.raises(orc.StateError, match="the guest has closed it"):
                await port.write(bytes(2 * lib.ORC_CONSOLE_TYPED))

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        guest.close()
        guest.open()  # before the writer has looked
    assert guest.read() == b""
    await port.write("text")
    assert guest.read() == b"text"


# ---- open


async def test_who_waits_for_an_opening_is_told_of_it_though_output_was_not_read(port):
    guest = Guest(port)
    guest.write(b"unread")
    guest.close()
    assert not port.is_open
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.wait_open)
        await trio.testing.wait_all_tasks_blocked()
        guest.open()
    assert port.is_open
    assert repr(port) == "<ConsolePort 'agent' open>"
    await port.wait_open()


async def test_who_waits_for_an_opening_that_will_not_come_is_told_so(port):
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(orc.StateError, match="has ended"):
                await port.wait_open()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        port.close()


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=300), st.sampled_from(["open", "close", "read"])), max_size=40))
def test_any_order_of_opening_closing_writing_and_reading_loses_and_makes_up_nothing(steps):
    port = ConsolePort(at_once, "agent")
    guest = Guest(port)
    sent, got = b"", b""

    async def play() -> None:
        nonlocal sent, got
        for step in steps:
            match step:
                case "open":
                    guest.open()
                case "close":
                    guest.close()
                case "read":
                    with trio.move_on_after(0):
                        got += await port.read(100)
                case bytes() as data:
                    sent += data[: guest.write(data)]
        guest.close()
        while data := await port.read():
            got += data

    trio.run(play)
    assert got == sent


# ---- all of a VM


def test_ports_are_a_mapping_by_name():
    ports = Ports(at_once, [orc.Serial(), SPEC, orc.Console(ports=("third",))], "db-1")
    assert list(ports) == [*NAMES, "third"]
    assert len(ports) == 3
    assert ports["log"].name == "log"
    assert "nothing" not in ports
    assert "<ConsolePort 'third' closed>" in repr(ports)


def test_a_device_that_stops_closes_its_ports_and_the_next_one_has_them():
    with DeviceRig(SPEC) as rig:
        port = rig.ports["log"]
        lib.orc_port_set_open(port.handle, ffi.NULL, True)
        assert port.is_open
        rig.device.stop()
        assert not port.is_open
        assert not lib.orc_console_listened(port.handle)


# ---- the size


def test_a_new_size_reaches_all_consoles_and_those_of_later_runs():
    with DeviceRig(SPEC) as rig:
        assert rig.console.size is None
        rig.console.resize(132, 50)
        assert rig.read(0x2000) == 50 << 16 | 132
        kind = type(rig.device)
        again = kind(SPEC, attrs.evolve(rig.device.hooks))
        assert again.read(0x2000, 4) & 0xFFFF_FFFF == 50 << 16 | 132
        again.stop()
        rig.console.resize(80, 25)
        assert again.read(0x2000, 4) & 0xFFFF_FFFF == 50 << 16 | 132  # stopped: told nothing any more
        assert rig.read(0x2000) == 25 << 16 | 80


@pytest.mark.parametrize(("columns", "rows"), [(0, 25), (80, 0), (1 << 16, 25), (80, "many")])
def test_a_size_that_is_none_is_refused(columns, rows):
    with DeviceRig(SPEC) as rig, pytest.raises(orc.SpecError, match=r"columns|rows"):
        rig.console.resize(columns, rows)
