"""Flat images: what is written for them, where each vCPU starts, and that guests find just that in every mode."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

import orchestra as orc
from conftest import guest
from orchestra.backend import EntryState
from orchestra.backend.memory import GuestMemory
from orchestra.machine.boot import flat
from orchestra.model.spec import PAGE, FlatImage, GiB, MiB, VmSpec

PG, PE = 1 << 31, 1
LMA = 1 << 10


@contextmanager
def loaded(
    mode: int, vcpus: int = 1, memory: int = MiB, **image: int
) -> Iterator[tuple[GuestMemory, list[EntryState]]]:
    boot = FlatImage(code=b"\x90\xf4", mode=mode, **image)  # type: ignore[arg-type]
    spec = VmSpec(name="vm", boot=boot, vcpus=vcpus, memory=memory)
    guest_memory = GuestMemory(spec)
    try:
        yield guest_memory, flat.load(spec, guest_memory)
    finally:
        guest_memory.close()


@pytest.mark.parametrize("mode", [16, 32, 64])
def test_image_lies_at_its_address_and_every_vcpu_starts_at_its_entry(mode):
    with loaded(mode, vcpus=3, load=0x3000, entry=0x3001) as (memory, states):
        assert memory.read(0x2FFF, 4) == b"\0\x90\xf4\0"
        assert [(state.mode, state.rip, state.rdi) for state in states] == [(mode, 0x3001, i) for i in range(3)]


def test_16_bit_guest_gets_memory_with_nothing_but_its_image():
    with loaded(16, memory=PAGE, load=0) as (memory, _):
        assert memory.read(0, PAGE) == b"\x90\xf4".ljust(PAGE, b"\0")


def descriptor(memory: GuestMemory, state: EntryState, selector: int) -> dict[str, int]:
    """A segment descriptor's parts (Intel SDM vol. 3, 3.4.5)."""
    assert state.gdt is not None
    base, limit = state.gdt
    assert selector + 7 <= limit
    (raw,) = struct.unpack("<Q", memory.read(base + selector, 8))
    return {
        "limit": (raw & 0xFFFF) | (raw >> 48 & 0xF) << 16,
        "base": (raw >> 16 & 0xFFFFFF) | (raw >> 56) << 24,
        "type": raw >> 40 & 0xF,
        "system": raw >> 44 & 1,
        "dpl": raw >> 45 & 3,
        "present": raw >> 47 & 1,
        "long": raw >> 53 & 1,
        "big": raw >> 54 & 1,
        "pages": raw >> 55 & 1,
    }


FLAT = {"limit": 0xFFFFF, "base": 0, "system": 1, "dpl": 0, "present": 1, "pages": 1}


@pytest.mark.parametrize(("mode", "long", "big"), [(32, 0, 1), (64, 1, 0)])
def test_descriptors_are_flat_and_of_the_mode(mode, long, big):
    with loaded(mode) as (memory, (state,)):
        code = descriptor(memory, state, state.code_selector)
        assert code == {**FLAT, "type": 0xB, "long": long, "big": big}
        assert descriptor(memory, state, state.data_selector) == {**FLAT, "type": 0x3, "long": 0, "big": 1}
        assert set(descriptor(memory, state, 0).values()) == {0}


def translate(memory: GuestMemory, cr3: int, address: int) -> int | None:
    """What the CPU makes of a linear address (Intel SDM vol. 3, 4.5)."""
    table = cr3
    for shift in (39, 30, 21):
        (entry,) = struct.unpack("<Q", memory.read(table + (address >> shift & 511) * 8, 8))
        if not entry & 1:
            return None
        assert entry & 2  # writable
        if entry & 0x80:
            assert shift == 21
            return int((entry & ~0x1FFFFF & (1 << 52) - 1) | address & 0x1FFFFF)
        table = entry & ~0xFFF
    raise AssertionError("no large page")


@pytest.mark.parametrize("size", [MiB, 64 * MiB, 5 * GiB])
def test_first_4_gib_are_mapped_one_to_one_in_64_bit_mode(size):
    with loaded(64, memory=size) as (memory, (state,)):
        for address in (0, 1, 0x1FFFFF, 0x200000, GiB - 1, GiB, 3 * GiB + 5, 4 * GiB - 1):
            assert translate(memory, state.cr3, address) == address
        assert translate(memory, state.cr3, 4 * GiB) is None
        assert translate(memory, state.cr3, 1 << 39) is None


def test_control_registers_are_those_of_the_mode():
    with loaded(32) as (_, (state,)):
        assert state.cr0 is not None
        assert (state.cr0 & PE, state.cr0 & PG, state.cr3, state.cr4, state.efer) == (1, 0, 0, 0, 0)
    with loaded(64) as (_, (state,)):
        assert state.cr0 is not None
        assert state.cr0 & PE
        assert state.cr0 & PG
        assert state.cr4 == 1 << 5  # PAE
        assert state.efer & LMA
        assert state.cr3 % PAGE == 0


@pytest.mark.parametrize("mode", [32, 64])
@pytest.mark.parametrize(("vcpus", "memory"), [(1, 13 * PAGE), (8, 20 * PAGE), (12, MiB), (2, 5 * GiB)])
def test_each_of_the_first_8_vcpus_has_a_page_of_stack_of_its_own(mode, vcpus, memory):
    image = {"load": memory - 2 * PAGE} if memory < MiB else {}
    with loaded(mode, vcpus, memory, **image) as (made, states):
        stacks = [range(state.rsp - PAGE, state.rsp) for state in states[:8]]
        assert len({stack.start // PAGE for stack in stacks}) == len(stacks)
        for stack in stacks:
            assert stack.start % PAGE == 0
            assert made.read(stack.start, PAGE) == bytes(PAGE)  # neither image nor tables lie there
        assert [state.rsp for state in states[8:]] == [0] * (vcpus - len(stacks))


def test_tables_stay_in_the_memory_that_the_spec_names_for_them():
    boot = FlatImage(code=b"\xf4", mode=64)
    spec = VmSpec(name="vm", boot=boot)
    memory = GuestMemory(spec)
    flat.load(spec, memory)
    written = {page for page in range(0, MiB, PAGE) if any(memory.read(page, PAGE))}
    memory.close()
    assert written - {0x1000} <= set(range(spec.tables.start, spec.tables.stop, PAGE))
    assert len(written) == 1 + 7  # the image; six page tables and the GDT


def test_16_bit_guest_gets_no_tables_and_no_stack():
    with loaded(16) as (_, (state,)):
        assert state == EntryState(mode=16, rip=0x1000)


# ---- what guests find


async def found(mode: int, vcpus: int) -> tuple[list[tuple[int, ...]], bytes, VmSpec]:
    """The slots that tests/guests/boot_*.asm leave, one for each vCPU."""
    spec = VmSpec(name="vm", boot=FlatImage(code=guest(f"boot_{mode}"), mode=mode), vcpus=vcpus)  # type: ignore[arg-type]
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(spec)
        assert await vm.wait() == orc.Halted()
        memory = vm.read_memory(0x4000, 64 * vcpus)
    return [struct.unpack("<6IHQ6x5I", memory[i * 64 : i * 64 + 60]) for i in range(vcpus)], memory, spec


@pytest.mark.kvm
async def test_16_bit_guest_finds_real_mode_with_all_segments_at_0_and_its_number():
    _, memory, _ = await found(16, vcpus=4)
    cr0, cs, ds, ss, flags = struct.unpack("<IHHHH", memory[:12])
    assert (cr0 & PE, cr0 & PG) == (0, 0)
    assert (cs, ds, ss) == (0, 0, 0)
    assert flags & 0x200 == 0  # interrupts are off
    assert memory[0x10:0x15] == b"\1\1\1\1\0"  # each vCPU came once, and knew its number


@pytest.mark.kvm
@pytest.mark.parametrize("mode", [32, 64])
async def test_guest_finds_its_mode_tables_number_and_stack_on_each_vcpu(mode):
    slots, _, spec = await found(mode, vcpus=3)
    for index, slot in enumerate(slots):
        number, stack, flags, cs, ds, ss, limit, base, cr0, cr4, reloaded, efer, last = slot
        if mode == 32:
            base &= 0xFFFF_FFFF
        assert number == index
        assert stack == spec.stacks.stop - index * PAGE
        assert flags & 0x200 == 0  # interrupts are off
        assert (cs, ds, ss) == (0x08 if mode == 32 else 0x10, 0x18, 0x18)
        assert spec.tables.start <= base < base + limit < spec.tables.stop
        assert cr0 & PE
        assert bool(cr0 & PG) == (mode == 64)
        assert cr4 == (1 << 5 if mode == 64 else 0)
        assert reloaded == 2  # data and code segment were loaded from the table again
        if mode == 64:
            assert efer & LMA
            assert last == 0xFF


@pytest.mark.kvm
async def test_every_vcpu_starts_at_the_entry_also_with_an_irqchip():
    boot = FlatImage(code=guest("boot_64"), mode=64)
    async with orc.open_fleet(backend="kvm") as fleet:
        vm = await fleet.launch(VmSpec(name="vm", boot=boot, vcpus=3, irqchip=True))
        with trio.fail_after(10):
            while [vm.read_memory(0x4000 + 64 * i + 48, 1) for i in range(3)] != [b"\2"] * 3:  # noqa: ASYNC110  # HLT waits in KVM, so nothing tells
                await trio.sleep(0.001)
