"""The PCI bus: configuration space as the specification has it, BARs that move, and a guest that drives a device."""

from __future__ import annotations

import gc
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from threading import RLock
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings, strategies as st

import orchestra as orc
from conftest import guest
from orchestra.machine.devices.bridge import PciBridge, PciState
from orchestra.machine.devices.bus import Bus
from orchestra.machine.devices.io import IoThread
from orchestra.machine.devices.pci import BRIDGE, PciHost, Slot, bar_addresses, configuration
from orchestra.machine.devices.virtio import VirtioState
from orchestra.model import platform, virtio
from orchestra.model.chipset import PciHostBridge
from orchestra.model.pci import MOST_FUNCTIONS
from orchestra.native import ffi, lib
from orchestra.testing import DeviceRig, wait_until
from orchestra.testing.device import RecordedBell, answer

BARS = platform.BARS.start
RNG = orc.Rng().wiring().pci
CONSOLE = orc.Console().wiring().pci
assert RNG is not None
assert CONSOLE is not None


# ---- configuration space, as data


def capabilities(space: bytes) -> Iterator[tuple[int, int]]:
    """Where each is, and its id, as a driver finds them."""
    assert space[0x06] & 0x10
    at = space[0x34]
    while at:
        assert at >= 0x40
        assert not at % 4
        yield at, space[at]
        at = space[at + 1]


def test_a_function_has_the_header_of_the_specification():
    space = configuration(CONSOLE, BARS).reset
    assert struct.unpack_from("<HH", space, 0) == (0x1AF4, 0x1043)
    assert space[0x08:0x0C] == bytes([1, 0x00, 0x80, 0x07])  # revision; class 7, communication; 80, other
    assert space[0x0E] == 0  # header type 0, one function
    assert struct.unpack_from("<Q", space, 0x10) == (BARS | 0b100,)
    assert space[0x18:0x28] == bytes(16)  # no other BAR
    assert struct.unpack_from("<HH", space, 0x2C) == (0x1AF4, 0x1043)
    assert space[0x3D] == 0  # no interrupt pin
    assert space[0x04:0x06] == bytes(2)  # decodes nothing at reset
    assert len(space) == 4096


def test_the_host_bridge_is_one_and_has_nothing_else():
    space = configuration(BRIDGE)
    assert space.reset[0x09:0x0C] == bytes([0, 0, 6])
    assert (space.reset[0x06], space.reset[0x34], space.reset[0x10:0x28]) == (0, 0, bytes(24))
    assert not any(space.writable[0x10:0x28])


def test_the_capabilities_of_a_virtio_device_are_those_of_virtio_on_pci():
    space = configuration(CONSOLE).reset
    found = {}
    for at, number in capabilities(space):
        if number == 9:
            length, kind, bar = struct.unpack_from("<BBB", space, at + 2)
            assert length == (20 if kind in (2, 5) else 16)
            assert bar == 0
            found[kind] = struct.unpack_from("<II", space, at + 8)
    assert found == {1: (0, 60), 2: (0x3000, 8), 3: (0x1000, 1), 4: (0x2000, 12), 5: (0, 0)}
    notify = next(at for at, number in capabilities(space) if number == 9 and space[at + 3] == 2)
    assert struct.unpack_from("<I", space, notify + 16) == (4,)
    assert [number for _, number in capabilities(configuration(RNG).reset)].count(9) == 4  # no configuration of its own


def test_msix_says_one_less_than_its_vectors_and_where_its_tables_are():
    space = configuration(CONSOLE)
    at = next(at for at, number in capabilities(space.reset) if number == 0x11)
    assert at == space.msix
    assert struct.unpack_from("<HII", space.reset, at + 2) == (3 - 1, 0x4000, 0x5000)
    assert struct.unpack_from("<H", space.writable, at + 2) == (0xC000,)


@pytest.mark.parametrize("function", [BRIDGE, RNG, CONSOLE])
def test_what_has_an_effect_can_be_written(function):
    space = configuration(function)
    assert all(not effect & ~writable for effect, writable in zip(space.effects, space.writable, strict=True))


def test_the_model_has_the_numbers_of_the_core():
    assert (virtio.COMMON.start, virtio.COMMON.stop) == (lib.ORC_BAR_COMMON, lib.ORC_BAR_COMMON_SIZE)
    assert (virtio.ISR.start, virtio.DEVICE, virtio.NOTIFY) == (lib.ORC_BAR_ISR, lib.ORC_BAR_DEVICE, lib.ORC_BAR_NOTIFY)
    assert (virtio.TABLE, virtio.PENDING, virtio.BAR_SIZE) == (lib.ORC_BAR_TABLE, lib.ORC_BAR_PBA, lib.ORC_BAR_SIZE)
    assert lib.ORC_NOTIFY_MULTIPLIER == virtio.NOTIFY_MULTIPLIER
    assert len(platform.ECAM) == lib.ORC_PCI_ECAM
    assert len(platform.PCI_PORTS) == lib.ORC_PCI_PORTS


@pytest.mark.parametrize(("spec", "kind"), [(orc.Rng(), 4), (orc.Console(), 3)])
def test_what_the_bus_says_of_a_device_is_what_the_core_has(spec, kind):
    with DeviceRig(spec) as rig:
        handle, function = rig.device.handle, spec.wiring().pci
        assert lib.orc_virtio_type(handle) == kind == function.device - 0x1040
        assert lib.orc_virtio_queues(handle) == len(function.bells)
        assert lib.orc_virtio_vectors(handle) == function.vectors
        lengths = {one.body[1]: struct.unpack_from("<I", one.body, 10)[0] for one in function.capabilities}
        assert lib.orc_virtio_config_size(handle) == lengths.get(4, 0)


def test_bars_are_placed_at_multiples_of_their_size_without_overlap():
    def sized(size: int) -> orc.PciFunction:
        return orc.PciFunction(vendor=1, device=1, class_code=0, bar_size=size)

    assert bar_addresses([sized(0x1000), sized(0), sized(0x10000), sized(0x1000)]) == [
        BARS,
        0,
        BARS + 0x10000,
        BARS + 0x20000,
    ]
    big = 1 << 28
    assert bar_addresses([sized(big), sized(big), sized(big), sized(0)]) == [BARS, BARS + big, 0, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bar_size": 24},
        {"bar_size": 8},
        {"vectors": 2, "bar_size": 16},
        {"vectors": 1, "table": 4, "bar_size": 4096},
        {"bells": (16,), "bar_size": 16},
        {"bells": (0, 0), "bar_size": 16},
        {"vendor": 1 << 16},
        {"class_code": 1 << 24},
    ],
)
def test_a_function_that_cannot_be_is_refused(wrong):
    with pytest.raises(orc.SpecError):
        orc.PciFunction(**{"vendor": 1, "device": 1, "class_code": 0, **wrong})


# ---- what a VM must have for it


def vm_of(*devices: orc.DeviceSpec, irqchip: str | bool = "full") -> orc.VmSpec:
    code = guest("virtio_rng_64")
    return orc.VmSpec(name="vm", boot=orc.FlatImage(code=code, mode=64), irqchip=irqchip, devices=devices)


@pytest.mark.parametrize(
    ("devices", "irqchip", "message"),
    [
        ((orc.Rng(),), "full", r"Rng is on the PCI bus: add PciHostBridge\(\)"),
        ((orc.PciHostBridge(), orc.Rng()), False, "Rng: its interrupts need irqchip"),
        ((orc.PciHostBridge(), orc.PciHostBridge()), "full", "2 host bridges"),
        ((orc.PciHostBridge(), *[orc.Rng()] * (MOST_FUNCTIONS + 1)), "full", "32 devices on the PCI bus: .* 31"),
    ],
)
def test_a_spec_whose_bus_cannot_be_is_refused(devices, irqchip, message):
    with pytest.raises(orc.SpecError, match=message):
        vm_of(*devices, irqchip=irqchip)


@pytest.mark.parametrize("size", [{"columns": 0}, {"rows": 1 << 16}])
def test_a_console_of_no_size_is_refused(size):
    with pytest.raises(orc.SpecError, match=next(iter(size))):
        orc.Console(**size)


def test_specs_of_devices_on_the_bus_go_through_the_codec():
    spec = vm_of(orc.PciHostBridge(), orc.Rng(), orc.Console(columns=132, rows=50))
    assert orc.decode(orc.VmSpec, orc.encode(spec)) == spec


# ---- BARs


class Register:
    """A device on the bus: remembers who told it what."""

    def __init__(self) -> None:
        self.told = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None: ...

    def interrupts_changed(self) -> None:
        self.told += 1


class Board:
    """A bus with two devices."""

    def __init__(self) -> None:
        self.mmio = Bus("mmio", 1 << 52)
        self.host = PciHost(self.mmio, [RNG, CONSOLE])
        self.devices = [Register(), Register()]
        self.bells = [[RecordedBell() for _ in function.bells] for function in (RNG, CONSOLE)]
        for slot, device, bells in zip(self.host.slots, self.devices, self.bells, strict=True):
            slot.plug(device, RLock(), bells)

    def slot(self, number: int) -> Slot:
        return self.host.slots[number]

    def write(self, number: int, offset: int, value: int, size: int) -> None:
        at = (number + 1) * 8 * 4096 + offset
        if not answer(self.host.ecam, at, value.to_bytes(size, "little")):
            self.host.sync()

    def read(self, number: int, offset: int, size: int) -> int:
        data = ffi.new("uint8_t[]", size)
        assert lib.orc_device_answer(self.host.ecam, (number + 1) * 8 * 4096 + offset, size, 1, False, data)
        return int.from_bytes(ffi.buffer(data), "little")


def at(start: int) -> range:
    return range(start, start + virtio.BAR_SIZE)


def test_a_bar_answers_while_memory_is_decoded_and_where_it_is():
    board = Board()
    assert [slot.mapped for slot in board.host.slots] == [None, None]
    board.write(1, 0x04, 2, 2)
    assert board.slot(0).mapped is None
    assert board.slot(1).mapped == at(BARS + virtio.BAR_SIZE)
    assert [bell.address for bell in board.bells[1]] == [
        BARS + virtio.BAR_SIZE + 0x3000,
        BARS + virtio.BAR_SIZE + 0x3004,
    ]
    board.write(1, 0x10, 0xC800_0000, 4)
    assert board.slot(1).mapped == at(0xC800_0000)
    assert [bell.address for bell in board.bells[1]] == [0xC800_3000, 0xC800_3004]
    board.write(1, 0x14, 4, 4)
    assert board.slot(1).mapped == at(0x4_C800_0000)
    assert [bell.address for bell in board.bells[1]] == [0x4_C800_3000, 0x4_C800_3004]
    assert [claim.span for claim in board.mmio.claims()] == [at(0x4_C800_0000)]
    board.write(1, 0x04, 0, 2)
    assert board.slot(1).mapped is None
    assert not board.mmio.claims()
    assert [bell.address for bell in board.bells[1]] == [None, None]


def test_a_bar_is_sized_as_drivers_size_it():
    board = Board()
    before = board.read(0, 0x10, 8)
    board.write(0, 0x10, 0xFFFF_FFFF, 4)
    board.write(0, 0x14, 0xFFFF_FFFF, 4)
    sized = board.read(0, 0x10, 8)
    assert sized & 0xF == 0b100
    assert (1 << 64) - (sized & ~0xF) == virtio.BAR_SIZE
    board.write(0, 0x10, before & 0xFFFF_FFFF, 4)
    board.write(0, 0x14, before >> 32, 4)
    board.write(0, 0x04, 2, 2)
    assert board.slot(0).mapped == at(BARS)


def test_the_doorbells_of_a_bar_leave_before_it_moves():
    board = Board()
    board.write(0, 0x04, 2, 2)
    seen: list[tuple[int | None, range | None]] = []
    bell = board.bells[0][0]
    place = bell.place

    def watched(address: int | None) -> None:
        place(address)
        seen.append((address, board.mmio.claims()[0].span))

    bell.place = watched  # type: ignore[method-assign]
    board.write(0, 0x10, 0xC800_0000, 4)
    assert seen == [(None, at(BARS)), (0xC800_3000, at(0xC800_0000))]


def test_two_bars_at_one_place_are_one_until_the_other_moves_away():
    board = Board()
    for number in (0, 1):
        board.write(number, 0x04, 2, 2)
    board.write(0, 0x10, BARS + virtio.BAR_SIZE, 4)
    assert board.slot(0).mapped is None
    assert board.slot(1).mapped == at(BARS + virtio.BAR_SIZE)
    assert board.bells[0][0].address is None
    board.write(1, 0x10, 0xC800_0000, 4)
    assert board.slot(0).mapped == at(BARS + virtio.BAR_SIZE)
    assert board.bells[0][0].address == BARS + virtio.BAR_SIZE + 0x3000


@pytest.mark.parametrize("address", [0, 1 << 52, (1 << 64) - virtio.BAR_SIZE])
def test_a_bar_where_nothing_can_be_answers_nowhere(address):
    board = Board()
    board.write(0, 0x04, 2, 2)
    board.write(0, 0x10, address & 0xFFFF_FFFF, 4)
    board.write(0, 0x14, address >> 32, 4)
    assert board.slot(0).mapped is None


def test_interrupts_are_on_with_msix_and_bus_mastering_and_off_with_any_of_its_masks():
    board = Board()
    slot, told = board.slot(0), board.devices[0]
    control = configuration(RNG).msix + 2
    for offset, value, on, times in [
        (control, 0x8000, False, 0),  # no bus master yet
        (0x04, 4, True, 1),
        (control, 0xC000, False, 2),  # the function is masked
        (control, 0x8000, True, 3),
        (control, 0x8000, True, 3),
        (control, 0x0000, False, 4),
        (control, 0x8000, True, 5),
        (0x04, 2, False, 6),
    ]:
        board.write(0, offset, value, 2)
        assert (slot.interrupts, told.told) == (on, times)


def test_the_bus_goes_on_from_its_state_and_begins_anew_after_a_reset():
    board, other = Board(), Board()
    board.write(1, 0x04, 6, 2)
    board.write(1, 0x10, 0xC800_0000, 4)
    board.write(1, configuration(CONSOLE).msix + 2, 0x8000, 2)
    lib.orc_pci_select(board.host.handle, 0x8000_0800)
    saved = board.host.save()
    other.host.load(*saved)
    assert other.host.save() == saved
    assert other.slot(1).mapped == at(0xC800_0000)
    assert other.slot(1).interrupts
    other.host.reset()
    assert other.host.save() == Board().host.save()
    assert [slot.mapped for slot in other.host.slots] == [None, None]
    assert not other.slot(1).interrupts


def test_a_state_of_another_bus_is_refused():
    board = Board()
    selected, spaces = board.host.save()
    for wrong in (spaces[:-1], (*spaces[:-1], b""), (spaces[0], spaces[2], spaces[1])):
        with pytest.raises(orc.SpecError, match="spaces"):
            board.host.load(selected, wrong)
    with pytest.raises(orc.SpecError):
        PciState(selected=1 << 32)
    with pytest.raises(orc.SpecError):
        PciState(spaces=["x"])  # type: ignore[arg-type]


def test_the_bridge_has_the_state_of_its_bus():
    with DeviceRig(PciHostBridge()) as rig:
        assert isinstance(rig.device, PciBridge)
        assert rig.read(0, 4) == 0x0008_1B36
        with rig.again() as other:
            assert other.device.state() == rig.device.state()
        rig.device.reset()


# ---- virtio devices


def armed(rig: DeviceRig) -> None:
    rig.configure(configuration(rig.device.spec.wiring().pci).msix + 2, 0x8000, 2)
    rig.configure(0x04, 6, 2)


def program(rig: DeviceRig, vector: int, data: int, *, masked: bool = False, address: int = 0xFEE0_0000) -> None:
    entry = virtio.TABLE + 16 * vector
    rig.write(entry, address & 0xFFFF_FFFF)
    rig.write(entry + 4, address >> 32)
    rig.write(entry + 8, data)
    rig.write(entry + 12, int(masked))


def test_a_vector_goes_where_the_guest_says_while_all_of_its_masks_are_off():
    with DeviceRig(orc.Console()) as rig:
        program(rig, 1, 0x31)
        assert rig.msis[1].where is None  # MSI-X is off
        armed(rig)
        assert [msi.where for msi in rig.msis] == [None, (0xFEE0_0000, 0x31), None]
        rig.write(virtio.TABLE + 16 + 12, 1)
        assert rig.msis[1].where is None
        rig.write(virtio.TABLE + 16 + 8, 0x32)
        assert rig.msis[1].where is None
        rig.write(virtio.TABLE + 16 + 12, 0)
        assert rig.msis[1].where == (0xFEE0_0000, 0x32)
        program(rig, 1, 0x32, address=0x1_FEE0_0000)
        assert rig.msis[1].where is None  # no interrupt's address
        rig.device.reset()
        assert [msi.where for msi in rig.msis] == [None, None, None]


def test_a_device_goes_on_from_its_state():
    with DeviceRig(orc.Console(columns=100, rows=40)) as rig:
        armed(rig)
        program(rig, 0, 0x30)
        for status in (1, 3):
            rig.write(0x14, status, 1)
        state = rig.device.state()
        assert isinstance(state, VirtioState)
        assert state.status == 3
        assert len(state.vector) == 3
        assert state.config[:4] == struct.pack("<HH", 100, 40)
        with rig.again() as other:
            assert other.device.state() == state
            armed(other)
            assert other.msis[0].where == (0xFEE0_0000, 0x30)
        rig.device.reset()
        assert rig.device.state().status == 0


@pytest.mark.parametrize(
    "change",
    [
        {"status": 256},
        {"status": 2},
        {"queue": ()},
        {"vector": ()},
        {"config": b"x" * 200},
        {"pending": 1 << 20},
        {"isr": "x"},
        {"queue": (None, None)},
    ],
)
def test_a_state_that_no_device_can_be_in_is_refused(change):
    with DeviceRig(orc.Console()) as rig:
        state = attrs.evolve(rig.device.state(), **change)
        with pytest.raises(orc.SpecError, match="Console"):
            DeviceRig(orc.Console(), state=state)


def test_what_is_typed_waits_for_the_guest_and_a_device_that_stopped_is_told_of_nothing():
    with DeviceRig(orc.Console()) as rig:
        rig.device.listen()
        assert lib.orc_console_listened(rig.console.handle)
        rig.device.stop()
        assert not lib.orc_console_listened(rig.console.handle)


# ---- guests


@pytest.fixture
def no_gc():
    """What a VM has of the host is given back when it ends, and not when its last objects go."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
async def soon():
    with trio.fail_after(60):
        yield


def counters(rng: Any) -> Any:
    found = ffi.new("struct orc_virtio_counters *")
    lib.orc_virtio_look(rng.handle, found)
    return found


def thread_names() -> set[str]:
    return {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}


def device(vm: orc.Vm, index: int) -> Any:
    return vm._control.guest.devices.plugged[index].device


@pytest.mark.kvm
async def test_a_guest_gets_random_bytes_and_one_interrupt_and_no_kick_leaves_the_kernel(nothing_left, soon):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(vm_of(orc.PciHostBridge(), orc.Rng(), orc.ExitPort()), paused=True)
        vm.write_memory(0x7010, b"\1")
        rng = device(vm, 1)
        await vm.resume()
        assert await vm.wait() == orc.Shutdown("exit port", 1)
        seen = counters(rng)
        assert (seen.requests, seen.interrupts, seen.kicks) == (1, 1, 1)  # a kick by eventfd
        assert len(set(vm.read_memory(0x9000, 64))) > 8
        assert vm.read_memory(0x9040, 16) == bytes(16)


@pytest.mark.kvm
async def test_a_paused_vms_device_takes_nothing_from_its_queue_until_it_goes_on(nothing_left, soon):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(vm_of(orc.PciHostBridge(), orc.Rng(), orc.ExitPort()), paused=True)
        await vm.resume()
        rng = device(vm, 1)
        await wait_until(lambda: vm.read_memory(0x800C, 1) == b"\2")  # the request is described
        await vm.pause()
        await wait_until(lambda: vm.quiesced)
        vm.write_memory(0x8102, b"\1")  # as another vCPU could have, just before
        os.eventfd_write(rng.hooks.bells[0].fd, 1)
        await wait_until(lambda: counters(rng).kicks == 1)
        state = vm._control.guest.devices.state()
        assert vm.read_memory(0x8202, 2) == bytes(2)
        assert state[1].queue[0].next == 0
        vm.write_memory(0x7010, b"\1")
        await vm.resume()
        assert await vm.wait() == orc.Shutdown("exit port", 1)


@pytest.mark.kvm
async def test_what_was_fired_while_a_vector_is_masked_is_made_an_interrupt_later(nothing_left, soon):
    """A vector whose route is taken away while it is bound loses what is fired."""
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(vm_of(orc.PciHostBridge(), orc.Rng(), orc.ExitPort()), paused=True)
        await vm.resume()
        rng = device(vm, 1)
        await wait_until(lambda: rng.state().status == 0xF)
        plugged = vm._control.guest.devices.plugged[1]
        with plugged.lock:
            answer(rng.native, virtio.TABLE + 16 + 12, b"\1\0\0\0")
            rng.interrupts_changed()
        vm.write_memory(0x7010, b"\1")
        await wait_until(lambda: counters(rng).interrupts == 1)
        assert vm.outcome is None
        assert rng.read(virtio.PENDING, 1) == 0b10
        with plugged.lock:
            answer(rng.native, virtio.TABLE + 16 + 12, b"\0\0\0\0")
            rng.interrupts_changed()
        assert await vm.wait() == orc.Shutdown("exit port", 1)


@pytest.mark.kvm
async def test_launching_and_stopping_leaves_no_thread_and_no_descriptor(nothing_left, no_gc, soon):
    before = len(os.listdir("/proc/self/fd"))
    async with orc.open_fleet(backend="kvm") as fleet:
        for number in range(3):
            spec = vm_of(orc.PciHostBridge(), orc.Rng(), orc.Console())
            vm = await fleet.launch(attrs.evolve(spec, name=f"vm-{number}"))
            assert f"vm-{number}/io" in thread_names()
            await vm.stop()
    left = len(os.listdir("/proc/self/fd")) - before
    assert left <= 0


@pytest.mark.kvm
async def test_after_a_reset_the_bus_and_its_devices_are_as_at_power_on(nothing_left, soon):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(vm_of(orc.PciHostBridge(), orc.Rng(), orc.Console()), paused=True)
        devices = vm._control.guest.devices
        at_power_on = devices.state()
        await vm.resume()
        await wait_until(lambda: device(vm, 1).state().status == 0xF)
        await vm.pause()
        await wait_until(lambda: vm.quiesced)
        mmio = vm._control.guest.mmio
        assert at(BARS) in [claim.span for claim in mmio.claims()]
        assert devices.state() != at_power_on
        devices.reset()
        assert devices.state() == at_power_on
        assert [claim.span for claim in mmio.claims()] == [platform.ECAM]


@pytest.mark.kvm
async def test_input_goes_to_the_first_device_that_takes_any(nothing_left, soon):
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(vm_of(orc.PciHostBridge(), orc.Console()), paused=True)
        await vm.console.write(b"x" * 100)
        assert lib.orc_console_typed(vm.console.handle) == 100  # until the guest has buffers for it


def test_a_vector_that_is_programmed_through_configuration_space_is_bound_as_well():
    """VIRTIO_PCI_CAP_PCI_CFG: virtio 1.2, 4.1.4.9."""
    with DeviceRig(orc.Rng()) as rig:
        armed(rig)
        program(rig, 1, 0x31)
        window = configuration(RNG).window
        for data in (0x44, 0x45):
            for at, value in ((4, 0), (8, virtio.TABLE + 16 + 8), (12, 4), (16, data)):  # bar, offset, length, data
                if not answer(rig.bus.ecam, 8 * 4096 + window + at, value.to_bytes(4 if at > 4 else 1, "little")):
                    rig.bus.sync()
            assert rig.msis[1].where == (0xFEE0_0000, data)


# ---- anything

ANY_VALUE = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, 3, 0xB, 0xF, 0xFEE0_0000]))
BAR_ACCESSES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 0x5FFF), st.sampled_from([1, 2, 4, 8]), ANY_VALUE), max_size=60
)


@settings(deadline=None)
@given(st.sampled_from([orc.Rng(), orc.Console()]), BAR_ACCESSES)
def test_whatever_a_guest_does_to_a_bar_the_vectors_are_bound_as_their_masks_say(spec, accesses):
    with DeviceRig(spec) as rig:
        armed(rig)
        for write, offset, size, value in accesses:
            if write:
                rig.write(offset - offset % size, value & (1 << 8 * size) - 1, size)
            else:
                rig.read(offset - offset % size, size)
        for msi, vector in zip(rig.msis, rig.device.state().vector, strict=True):
            bound = not vector.masked and 0xFEE0_0000 <= vector.address < 0xFEF0_0000
            assert msi.where == ((vector.address, vector.data) if bound else None)
        with rig.again() as other:
            assert other.device.state() == rig.device.state()


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["config", "bar", "ports"]),
        st.integers(0, 2),
        st.integers(0, 0x7FFF),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 2, 6, 0x8000, BARS, 0xFFFF_FFFF])),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(ACCESSES)
def test_whatever_a_guest_accesses_leaves_a_bus_that_can_be_saved_and_loaded(accesses):
    board = Board()
    for what, number, offset, size, value in accesses:
        data = value & (1 << 8 * size) - 1
        if what == "ports":
            if not answer(board.host.ports, offset % 8, data.to_bytes(size, "little")):
                board.host.sync()
        elif number:
            interesting = (0x04, 0x10, 0x14, configuration(CONSOLE).msix + 2)
            where = interesting[offset % 4] if what == "bar" else offset % 4096
            board.write(number - 1, where, data, size)
        spans = [claim.span for claim in board.mmio.claims()]
        assert sorted(spans, key=lambda span: span.start) == sorted(
            (slot.mapped for slot in board.host.slots if slot.mapped is not None), key=lambda span: span.start
        )
        for slot, bells in zip(board.host.slots, board.bells, strict=True):
            for bell, place in zip(bells, slot.function.bells, strict=True):
                assert bell.address == (None if slot.mapped is None else slot.mapped.start + place)
    other = Board()
    other.host.load(*board.host.save())
    assert other.host.save() == board.host.save()


@pytest.mark.kvm
async def test_a_request_that_hangs_keeps_its_own_vm_from_ending_and_no_other(monkeypatch, nothing_left):
    token, release, began = trio.lowlevel.current_trio_token(), threading.Event(), trio.Event()
    stop, released = IoThread.stop, []

    def hangs(io: IoThread) -> None:
        token.run_sync_soon(began.set)
        released.append(release.wait(20))
        stop(io)

    monkeypatch.setattr(IoThread, "stop", hangs)
    async with orc.open_fleet(backend="kvm", bus_locks="off") as fleet, trio.open_nursery() as nursery:
        boot = orc.FlatImage(code=b"\xeb\xfe")
        vm = await fleet.launch(
            orc.VmSpec(name="hangs", boot=boot, irqchip="full", devices=(orc.PciHostBridge(), orc.Rng()))
        )
        other = await fleet.launch(orc.VmSpec(name="other", boot=boot))
        nursery.start_soon(vm.stop)
        await began.wait()
        await other.stop()
        assert vm.outcome is None
        release.set()
    assert released[0]
