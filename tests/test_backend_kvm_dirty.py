"""Which pages a guest wrote: each reader is told of all of them, whoever else reads, and however KVM logs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from conftest import Stage, blank
from orchestra import EmulatedBackend
from orchestra.backend.kvm.dirty import DirtyPages, DirtyReader, read_logs
from orchestra.backend.kvm.machine import KvmBackend
from orchestra.fleet import dirty
from orchestra.model.errors import KvmError, SpecError
from orchestra.model.memory import PAGE
from test_fleet_dirty import FIRST, NEVER, PARAMETERS, in_rounds, writer

OURS = {0, 0x1000, PARAMETERS}
"""Where the guest's stack, code and parameters are: some KVMs take what is read for the first time for written."""
RING = 1024
SIZE = 16 * orc.MiB


@pytest.fixture
def kvm(nothing_left: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(dirty, "EVERY", NEVER)  # logs are not read but by the test
    return Stage("kvm")


@pytest.fixture(params=[None, RING], ids=["bitmap", "ring"])
def ring(request: pytest.FixtureRequest) -> int | None:
    return request.param  # type: ignore[no-any-return]


def spec(stage: Stage, ring: int | None, name: str = "guest", log_dirty: bool = False) -> orc.VmSpec:
    return writer(stage, name, memory=orc.Memory(SIZE, dirty_ring=ring), log_dirty=log_dirty)


@contextmanager
def reading(vm: orc.Vm) -> Iterator[DirtyReader]:
    with vm._control.guest.dirty.reader() as reader:
        yield reader


def taken(reader: DirtyReader) -> set[int]:
    return set(reader.take()) - OURS


def span(first: int, pages: int) -> set[int]:
    return set(range(first, first + pages * PAGE, PAGE))


# ---- what a reader is told


@pytest.mark.kvm
async def test_a_reader_is_told_exactly_the_pages_written_since_it_took_last(kvm, ring):
    async with kvm.open() as fleet, in_rounds(await fleet.launch(spec(kvm, ring))) as rounds:
        with reading(fleet.vm("guest")) as reader:
            assert taken(reader) == set()
            await rounds.one(37)
            assert taken(reader) == span(FIRST, 37)
            assert taken(reader) == set()
            await rounds.one(5)
            await rounds.one(10, FIRST + 3 * PAGE)
            assert taken(reader) == span(FIRST, 13)


@pytest.mark.kvm
async def test_readers_and_the_count_do_not_take_pages_from_each_other(kvm, ring):
    async with kvm.open() as fleet, in_rounds(await fleet.launch(spec(kvm, ring, log_dirty=True))) as rounds:
        vm = fleet.vm("guest")
        log = vm._control.guest.dirty
        with reading(vm) as one, reading(vm) as two:
            await rounds.one(20)
            assert taken(one) == span(FIRST, 20)
            await rounds.one(5, FIRST + 18 * PAGE)
            assert read_logs([log]) is None
            assert rounds.pages() == 23  # the union, once, as if nobody else had read
            assert taken(one) == span(FIRST + 18 * PAGE, 5)
            assert taken(two) == span(FIRST, 23)
            await rounds.one(4)
            taken(two)
        assert read_logs([log]) is None
        assert rounds.pages() == 23 + 4  # what was written before the readers went


@pytest.mark.kvm
async def test_a_reader_is_told_of_nothing_that_was_written_before_it_came(kvm, ring):
    async with kvm.open() as fleet, in_rounds(await fleet.launch(spec(kvm, ring, log_dirty=True))) as rounds:
        await rounds.one(20)
        with reading(fleet.vm("guest")) as reader:
            await rounds.one(3)
            assert taken(reader) == span(FIRST, 3)
        assert read_logs([fleet.vm("guest")._control.guest.dirty]) is None
        assert rounds.pages() == 20  # of the first 20 the later 3 are a part


@pytest.mark.kvm
async def test_without_counting_a_reader_has_pages_logged_and_none_are_counted(kvm, ring):
    async with kvm.open() as fleet, in_rounds(await fleet.launch(spec(kvm, ring))) as rounds:
        vm = fleet.vm("guest")
        with reading(vm) as reader:
            assert not vm.desired.log_dirty
            await rounds.one(9)
            await vm.log_dirty(True)
            await rounds.one(3)
            assert read_logs([vm._control.guest.dirty]) is None
            assert rounds.pages() == 3
            await vm.log_dirty(False)
            await rounds.one(2, FIRST + 20 * PAGE)
            assert taken(reader) == span(FIRST, 9) | span(FIRST + 20 * PAGE, 2)
        assert [slot.flags for slot in vm._control.guest.dirty._slots] == [0]  # logged for nobody


@pytest.mark.kvm
async def test_what_the_host_writes_for_the_guest_is_told_to_readers_and_not_counted(kvm, ring):
    async with kvm.open() as fleet, in_rounds(await fleet.launch(spec(kvm, ring, log_dirty=True))) as rounds:
        vm = fleet.vm("guest")
        with reading(vm) as reader:
            vm.write_memory(FIRST + 5 * PAGE - 1, b"ab")
            vm.write_memory(SIZE - 1, b"c")
            assert taken(reader) == span(FIRST + 4 * PAGE, 2) | {SIZE - PAGE}
        assert read_logs([vm._control.guest.dirty]) is None
        assert rounds.pages() == 0


@pytest.mark.kvm
async def test_a_reader_still_takes_what_was_written_last_when_the_vm_has_ended(kvm, ring):
    async with kvm.open() as fleet:
        vm = await fleet.launch(spec(kvm, ring))
        async with in_rounds(vm) as rounds:
            reader = vm._control.guest.dirty.reader()
            await rounds.one(11)
        await vm.stop()
        assert taken(reader) == span(FIRST, 11)
        assert taken(reader) == set()
        reader.close()
        reader.close()
        with pytest.raises(KvmError, match="Bad file descriptor"):
            vm._control.guest.dirty.reader()


@pytest.mark.kvm
async def test_a_ring_that_is_full_is_emptied_without_python_and_no_page_is_missed(kvm):
    """A KVM without hardware runs over a full ring: all pages are told then, and the next round is exact again."""
    pages = 3 * RING
    async with kvm.open() as fleet, in_rounds(await fleet.launch(spec(kvm, RING, log_dirty=True))) as rounds:
        vm = fleet.vm("guest")
        with reading(vm) as reader:
            for _ in range(5):
                await rounds.one(pages)
                found = taken(reader)
                assert found >= span(FIRST, pages)
                assert found in (span(FIRST, pages), set(range(0, SIZE, PAGE)) - OURS)
                await rounds.one(7)
                assert taken(reader) == span(FIRST, 7)
        assert vm.statistics().exits["dirty_ring_full"] >= 5 * 2


@pytest.mark.kvm
async def test_several_threads_may_take_count_and_write_while_the_guest_does(kvm, ring):
    async with kvm.open() as fleet, in_rounds(await fleet.launch(spec(kvm, ring, log_dirty=True))) as rounds:
        vm = fleet.vm("guest")
        found: set[int] = set()
        ends = threading.Event()

        def take() -> None:
            with vm._control.guest.dirty.reader() as reader:
                begun.set()
                while not ends.is_set():
                    found.update(reader.take())
                    read_logs([vm._control.guest.dirty])
                found.update(reader.take())

        begun = threading.Event()
        thread = threading.Thread(target=take)
        thread.start()
        begun.wait()
        for number in range(20):
            await rounds.one(16, FIRST + number * 8 * PAGE)
            vm.write_memory(SIZE - (number + 1) * PAGE, b"x")
        ends.set()
        thread.join()
        assert found - OURS == span(FIRST, 20 * 8 + 8) | span(SIZE - 20 * PAGE, 20)


# ---- bitmap and ring


ROUNDS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 1500), st.sampled_from(["one", "two", "count", ""])),
    min_size=1,
    max_size=8,
)


@pytest.mark.kvm
async def test_bitmap_and_ring_tell_the_same_pages_whoever_reads_when(kvm):
    """The same rounds on two VMs. Each reader is held to a model: all that was written since it took last."""
    examples = iter(_examples())
    async with kvm.open() as fleet:
        vms = [await fleet.launch(spec(kvm, ring, name, True)) for name, ring in (("bitmap", None), ("ring", RING))]
        async with in_rounds(vms[0]) as first, in_rounds(vms[1]) as second:
            for example in examples:
                told = []
                for vm, rounds in zip(vms, (first, second), strict=True):
                    with reading(vm) as one, reading(vm) as two:
                        readers, due, counted = {"one": one, "two": two}, {"one": set(), "two": set()}, set()
                        read_logs([vm._control.guest.dirty])
                        before = rounds.pages()
                        for pages, start, who in example:
                            await rounds.one(pages, FIRST + start * PAGE)
                            written = span(FIRST + start * PAGE, pages)
                            counted |= written
                            for name in due:
                                due[name] |= written
                            if who in readers:
                                assert taken(readers[who]) == due[who], (vm.name, example)
                                due[who] = set()
                            elif who:
                                assert read_logs([vm._control.guest.dirty]) is None
                                assert rounds.pages() - before == len(counted), (vm.name, example)
                                before, counted = rounds.pages(), set()
                        told.append([taken(one), taken(two)])
                        assert told[-1] == [due["one"], due["two"]], (vm.name, example)
                assert told[0] == told[1]


def _examples() -> list[list[tuple[int, int, str]]]:
    """Of hypothesis, which can't run async tests: drawn first, and played on VMs that stay."""
    found: list[list[tuple[int, int, str]]] = []

    @given(ROUNDS)
    def draw(rounds: list[tuple[int, int, str]]) -> None:
        found.append(rounds)

    draw()
    return found


# ---- as data, and what can't be


@given(st.lists(st.integers(0, 199), unique=True))
def test_pages_are_given_by_address_in_order(numbers):
    bits = sum(1 << number for number in numbers).to_bytes(32, "little")
    region = range(0x10000, 0x10000 + 200 * PAGE)
    pages = DirtyPages(((region, bits), (range(4096), bytes(8))))
    assert list(pages) == [0x10000 + number * PAGE for number in sorted(numbers)]
    assert len(pages) == len(numbers)


@pytest.mark.emulated
def test_the_emulated_backend_refuses_rings():
    with pytest.raises(SpecError, match="dirty_ring=1024: the emulated backend"):
        EmulatedBackend().check(blank(memory=orc.Memory(SIZE, dirty_ring=1024)))


@pytest.mark.kvm
def test_more_memory_than_kvm_maps_or_the_cpu_has_addresses_for_is_refused_by_the_field_and_with_what_fits():
    backend = KvmBackend.open()
    most = 0xC0000000 + ((1 << 31) - 1) * 4096
    backend._address_bits = 52
    backend.check(blank(memory=orc.Memory(most)))
    with pytest.raises(SpecError, match=rf"memory={1 << 46}: .* in one piece.*ask for at most {most} bytes"):
        backend.check(blank(memory=orc.Memory(1 << 46)))
    backend._address_bits = 40
    backend.check(blank(memory=orc.Memory((1 << 40) - (1 << 30))))
    with pytest.raises(
        SpecError, match=rf"memory={1 << 40}: .* 40 bits of address; ask for at most {(1 << 40) - (1 << 30)} "
    ):
        backend.check(blank(memory=orc.Memory(1 << 40)))
    with pytest.raises(SpecError, match=r"region size=8192: .* 40 bits of address; put all of the region below 0x100"):
        backend.check(blank(regions=[orc.MemoryRegion((1 << 40) - 4096, 8192)]))
    backend.close()


@pytest.mark.kvm
def test_a_host_whose_kvm_allows_smaller_rings_says_so():
    backend = KvmBackend.open()
    made = blank(memory=orc.Memory(SIZE, dirty_ring=1 << 16))
    for most, message in ((1 << 12, "allows at most 4096 entries"), (0, "keeps no rings")):
        backend._most_ring = most
        with pytest.raises(SpecError, match=f"dirty_ring=65536: this host's KVM {message}"):
            backend.check(made)
    backend.close()
