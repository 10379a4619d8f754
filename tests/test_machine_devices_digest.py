"""The device to copy, with the tests to copy: its registers driven directly, what it survives, a guest that uses it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, strategies as st

import orchestra as orc
from conftest import guest
from orchestra.backend.kvm.machine import KvmEngine
from orchestra.machine.devices.digest import LONGEST, DigestState
from orchestra.testing import DeviceRig

ID, STATUS, DESCRIPTOR, MSI_ADDRESS, MSI_DATA, RESET, DOORBELL, SERVED = 0, 4, 8, 0x10, 0x18, 0x1C, 0x20, 0x24
ASKED, DONE, REFUSED = 1, 2, 3
MEMORY = 256 * 1024
HERE, DATA = 0x1000, 0x2000


@pytest.fixture
def rig() -> Iterator[DeviceRig]:
    with DeviceRig(orc.Digest(), memory=MEMORY) as rig:
        yield rig


def ask(rig: DeviceRig, address: int = DATA, length: int = 16, *, at: int = HERE) -> None:
    """Write a descriptor, and tell the device where it is."""
    rig.memory.write(at, struct.pack("<QIIII", address, length, ASKED, 0, 0))
    rig.write(DESCRIPTOR, at, size=8)


def answer(rig: DeviceRig, at: int = HERE) -> tuple[int, int]:
    """Status and CRC of a descriptor."""
    status, crc = struct.unpack("<II", rig.memory.read(at + 12, 8))
    return status, crc


# ---- what it does


def test_a_guest_finds_it_by_its_id(rig):
    assert rig.read(ID).to_bytes(4, "little") == b"ORCD"
    assert (rig.read(STATUS), rig.read(SERVED)) == (0, 0)


def test_a_request_is_answered_in_its_descriptor_and_interrupts_once(rig):
    rig.memory.write(DATA, b"some data of it.")
    ask(rig)
    rig.ring()
    assert answer(rig) == (DONE, zlib.crc32(b"some data of it."))
    assert rig.msis[0].fired == 1
    assert rig.read(SERVED) == 1


def test_a_ring_without_a_request_does_nothing(rig):
    ask(rig)
    rig.ring()
    rig.ring(times=1000)
    assert (rig.msis[0].fired, rig.read(SERVED), rig.read(STATUS)) == (1, 1, 0)


def test_its_interrupt_goes_where_the_guest_programs_it(rig):
    rig.write(MSI_ADDRESS, 0xFEE0_1000, size=8)
    assert rig.msis[0].where is None
    rig.write(MSI_DATA, 0x31)
    assert rig.msis[0].where == (0xFEE0_1000, 0x31)


def test_an_interrupt_that_is_programmed_to_no_interrupt_address_goes_nowhere(rig):
    rig.write(MSI_ADDRESS, 0xFEE0_1000, size=8)
    rig.write(MSI_DATA, 0x31)
    rig.write(MSI_ADDRESS, 0x1000, size=8)  # would be a write into its memory
    rig.write(MSI_DATA, 0x31)
    assert rig.msis[0].where is None


# ---- what it refuses


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (MEMORY - 8, 16),
        (MEMORY, 1),
        (1 << 63, 16),
        ((1 << 64) - 8, 16),  # which would wrap around
        (0, LONGEST + 1),
        (0, (1 << 32) - 1),
    ],
)
def test_a_range_that_is_no_memory_or_too_long_is_refused_and_the_device_goes_on(rig, address, length):
    ask(rig, address, length)
    rig.ring()
    assert answer(rig) == (REFUSED, 0)
    assert rig.msis[0].fired == 1
    ask(rig)
    rig.ring()
    assert answer(rig)[0] == DONE


def test_the_longest_and_the_shortest_request_are_answered(rig):
    for length in (0, LONGEST):
        ask(rig, 0x10000, length)
        rig.ring()
        assert answer(rig) == (DONE, zlib.crc32(bytes(length)))


@pytest.mark.parametrize("where", [MEMORY - 8, MEMORY, (1 << 64) - 1])
def test_a_descriptor_that_is_no_memory_breaks_it_until_it_is_reset(rig, where):
    rig.write(DESCRIPTOR, where, size=8)
    rig.ring()
    assert rig.read(STATUS) == 1
    ask(rig)
    rig.ring()
    assert (answer(rig), rig.msis[0].fired) == ((ASKED, 0), 0)
    rig.write(RESET, 0)
    ask(rig)
    rig.ring()
    assert (rig.read(STATUS), answer(rig)[0]) == (0, DONE)


def test_a_descriptor_is_read_once_however_the_guest_changes_it_meanwhile(rig, monkeypatch):
    reads: list[tuple[int, int]] = []
    read = rig.memory.read

    def changes(address: int, size: int) -> bytes:
        found = read(address, size)
        reads.append((address, size))
        ask(rig, 0, (1 << 32) - 1)  # another vCPU makes it longer than is allowed, once it was looked at
        return found

    ask(rig)
    monkeypatch.setattr(rig.memory, "read", changes)
    rig.ring()
    assert reads == [(HERE, 24), (DATA, 16)]


def test_the_data_may_be_the_descriptor_itself(rig):
    ask(rig, HERE, 24)
    before = rig.memory.read(HERE, 24)
    rig.ring()
    assert answer(rig) == (DONE, zlib.crc32(before))


# ---- reset, and going on elsewhere


def test_after_a_reset_it_is_as_at_power_on(rig):
    rig.write(MSI_ADDRESS, 0xFEE0_0000, size=8)
    rig.write(MSI_DATA, 0x30)
    ask(rig)
    rig.ring()
    rig.write(RESET, 1)
    assert rig.device.state() == DigestState()
    assert rig.msis[0].where is None


def test_one_that_goes_on_from_its_state_serves_what_comes_and_interrupts_where_it_did(rig):
    rig.write(MSI_ADDRESS, 0xFEE0_0000, size=8)
    rig.write(MSI_DATA, 0x30)
    ask(rig)
    with rig.again() as other:
        assert other.msis[0].where == (0xFEE0_0000, 0x30)
        other.ring()  # as each doorbell is, once, after a restore
        assert answer(other)[0] == DONE
        assert other.msis[0].fired == 1


@pytest.mark.parametrize("field", ["descriptor", "msi_address", "msi_data", "served"])
@pytest.mark.parametrize("value", [-1, 1 << 64, "0", 1.0])
def test_a_state_that_no_register_can_hold_is_refused_by_name(field, value):
    with pytest.raises(orc.SpecError, match=f"{field}="):
        DigestState(**{field: value})


@pytest.mark.parametrize("base", [-8, 4, 1 << 52, "0"])
def test_a_base_that_registers_can_not_have_is_refused(base):
    with pytest.raises(orc.SpecError, match="base="):
        orc.Digest(base)


# ---- whatever a guest does

WORDS = st.integers(0, (1 << 64) - 1) | st.integers(0, MEMORY) | st.integers(0xFEE0_0000, 0xFEE0_00FF)


@given(st.lists(st.tuples(st.integers(0, 0x30), st.sampled_from([1, 2, 4, 8]), WORDS, st.booleans()), max_size=25))
def test_any_accesses_and_rings_leave_numbers_in_its_registers_and_the_memory_around_untouched(steps):
    with DeviceRig(orc.Digest(), memory=MEMORY) as rig:
        rig.memory.write(HERE, struct.pack("<QIIII", DATA, 64, ASKED, 0, 0))
        before = rig.memory.read(0, MEMORY)
        for offset, size, value, rings in steps:
            rig.write(offset, value & (1 << 8 * size) - 1, size)
            if rings:
                rig.ring()
            for register in (ID, STATUS, SERVED):
                assert 0 <= rig.read(register) < 1 << 32
        after = rig.memory.read(0, MEMORY)
        assert sum(a != b for a, b in zip(before, after, strict=True)) <= 8 * rig.read(SERVED)


# ---- from a guest


@pytest.mark.kvm
@pytest.mark.parametrize("irqchip", ["full", "split"])
async def test_a_guest_rings_without_an_exit_and_is_interrupted_without_python(irqchip, nothing_left, monkeypatch):
    answered: list[Any] = []
    run = KvmEngine.run

    def counted(engine: KvmEngine) -> int:
        why = run(engine)
        answered.append(why)
        return why

    monkeypatch.setattr(KvmEngine, "run", counted)
    data = bytes(range(100))
    spec = orc.VmSpec(
        name="guest",
        boot=orc.FlatImage(code=guest("digest_64"), mode=64),
        irqchip=irqchip,
        devices=[orc.Digest(), orc.ExitPort()],
    )
    with trio.fail_after(20):
        async with orc.open_fleet(backend="kvm") as fleet:
            vm = await fleet.launch(spec, paused=True)
            vm.write_memory(0x9000, data)
            answered.clear()
            await vm.resume()
            assert await vm.wait() == orc.Shutdown("exit port", 3)
            for number in (1, 2, 3):
                status, crc = struct.unpack("<II", vm.read_memory(0x8000 + 0x20 * (number - 1) + 12, 8))
                assert (status, crc) == (DONE, zlib.crc32(data[: 16 * number]))
            # Two registers of the interrupt and three times where the descriptor is: neither rings nor interrupts.
            assert vm.statistics().exits["mmio"] == 5
            assert vm.statistics().answers == 5 + 1  # and the exit port
            assert len(answered) <= 5 + 1 + 1


@pytest.mark.parametrize("backend", ["scripted", pytest.param("emulated", marks=pytest.mark.emulated)])
async def test_a_backend_that_can_not_interrupt_refuses_it_by_name(backend, nothing_left):
    spec = orc.VmSpec(name="guest", boot=orc.FlatImage(code=b"\xf4"), irqchip="full", devices=[orc.Digest()])
    async with orc.open_fleet(backend=backend) as fleet:
        with pytest.raises(orc.SpecError, match=r"irqchip='full'.*kvm"):
            await fleet.launch(spec)


def test_without_an_irqchip_its_spec_is_refused():
    with pytest.raises(orc.SpecError, match=r'Digest: its interrupts need irqchip="full" or irqchip="split"'):
        orc.VmSpec(name="guest", boot=orc.FlatImage(code=b"\xf4"), devices=[orc.Digest()])


def test_its_state_is_plain_and_frozen():
    assert attrs.has(DigestState)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        DigestState().served = 1  # type: ignore[misc]
