"""Guest memory: one checked door to it, the same as plain bytes behind, and nothing mapped once it is closed."""

from __future__ import annotations

import errno
import mmap

import pytest
from hypothesis import given, settings, strategies as st

from orchestra.backend.memory import GuestMemory
from orchestra.model.errors import GuestMemoryError, ResourceLimit
from orchestra.model.spec import MAX_MEMORY, PAGE, FlatImage, GiB, MemoryRegion, MiB, VmSpec
from orchestra.native import ffi

HOLE = range(16 * PAGE, 18 * PAGE)
RAM = 8 * PAGE


def spec(memory: int = RAM, *regions: MemoryRegion) -> VmSpec:
    return VmSpec(name="vm", boot=FlatImage(code=b"\xf4"), memory=memory, regions=regions)


def of(*regions: MemoryRegion, memory: int = RAM) -> GuestMemory:
    return GuestMemory(spec(memory, *regions))


@pytest.fixture
def memory():
    made = of(
        MemoryRegion(address=RAM, size=4 * PAGE, readonly=True, contents=b"rom"),  # adjacent to the RAM
        MemoryRegion(address=HOLE.stop, size=PAGE, log_dirty=True),
    )
    yield made
    made.close()


def test_new_memory_reads_as_zeros(memory):
    assert memory.read(0, RAM) == bytes(RAM)


def test_region_begins_with_its_contents(memory):
    assert memory.read(RAM, 5) == b"rom\0\0"


def test_regions_are_as_the_spec_says(memory):
    assert [(r.span, r.readonly, r.log_dirty) for r in memory.regions] == [
        (range(RAM), False, False),
        (range(RAM, RAM + 4 * PAGE), True, False),
        (range(HOLE.stop, HOLE.stop + PAGE), False, True),
    ]
    assert list(memory.spans()) == [r.span for r in memory.regions]


def test_what_is_written_is_read_back(memory):
    memory.write(0x123, b"hello")
    assert memory.read(0x122, 7) == b"\0hello\0"


@pytest.mark.parametrize("data", [b"abc", bytearray(b"abc"), memoryview(b"abc")])
def test_any_bytes_can_be_written(memory, data):
    memory.write(0, data)
    assert memory.read(0, 4) == b"abc\0"


@pytest.mark.parametrize("data", [5, "abc", None, [1, 2]])
def test_what_is_no_bytes_is_not_written(memory, data):
    with pytest.raises(TypeError):
        memory.write(0, data)
    assert memory.read(0, 8) == bytes(8)


def test_read_only_memory_is_so_for_the_guest_and_not_for_its_owner(memory):
    memory.write(RAM, b"ROM")
    assert memory.read(RAM, 3) == b"ROM"


def test_access_across_two_adjacent_regions_is_one_access(memory):
    memory.write(RAM - 2, b"1234")
    assert memory.read(RAM - 3, 6) == b"\x001234m"
    assert memory.regions[0].mapping[RAM - 2 :] == b"12"
    assert memory.regions[1].mapping[:3] == b"34m"


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (HOLE.start - 1, 1),
        (RAM + 4 * PAGE, 1),
        (RAM + 4 * PAGE - 1, 2),
        (HOLE.stop - 1, 2),
        (HOLE.stop + PAGE - 1, 2),
        (0, 1 << 60),
        (1 << 70, 1),
    ],
)
def test_access_outside_names_the_address_and_what_there_is(memory, address, size):
    with pytest.raises(GuestMemoryError, match=r"outside the guest's memory \(0x0-0x7fff, 0x8000-0xbfff, 0x12000"):
        memory.read(address, size)


def test_write_that_does_not_fit_writes_nothing(memory):
    with pytest.raises(GuestMemoryError):
        memory.write(RAM + 4 * PAGE - 2, b"abcd")
    assert memory.read(RAM + 4 * PAGE - 2, 2) == b"\0\0"


@pytest.mark.parametrize(("address", "size"), [(-1, 1), (0, -1), (0.5, 1), ("0", 1), (0, None)])
def test_addresses_and_sizes_are_whole_numbers_from_0(memory, address, size):
    with pytest.raises(GuestMemoryError, match=r"address=.*size=.*whole numbers"):
        memory.read(address, size)


def test_zero_gives_every_page_back(memory):
    memory.write(0, b"x" * RAM)
    memory.zero()
    assert memory.read(0, RAM + 4 * PAGE) == bytes(RAM + 4 * PAGE)


def test_host_address_is_where_the_backend_finds_the_bytes(memory):
    memory.write(RAM + 5, b"hello")
    assert bytes(ffi.buffer(ffi.cast("char *", memory.regions[1].host + 5), 5)) == b"hello"


def test_ram_above_3_gib_is_two_mappings_around_the_hole():
    big = of(memory=3 * GiB + PAGE)
    big.write(4 * GiB, b"high")
    assert big.read(4 * GiB, 4) == b"high"
    with pytest.raises(GuestMemoryError):
        big.read(3 * GiB, 1)
    big.close()


# ---- its end


def mapped(size: int) -> int:
    """How many mappings of this process have exactly that size."""
    with open("/proc/self/maps") as maps:
        spans = [line.split(None, 1)[0].split("-") for line in maps]
    return sum(int(stop, 16) - int(start, 16) == size for start, stop in spans)


def test_close_unmaps_every_region():
    odd, other = 4_567 * PAGE, 4_569 * PAGE  # sizes that nothing else has
    assert (mapped(odd), mapped(other)) == (0, 0)
    # between the two lies a hole; guards keep the kernel from merging them with their neighbours
    made = of(MemoryRegion(address=64 * MiB, size=other, readonly=True), memory=odd)
    for region in made.regions:
        region.mapping.madvise(mmap.MADV_DONTFORK)  # a flag of its own: not merged with others
    made.regions[1].mapping.madvise(mmap.MADV_DONTDUMP)
    assert (mapped(odd), mapped(other)) == (1, 1)
    made.close()
    assert (mapped(odd), mapped(other)) == (0, 0)


def test_closed_memory_can_not_be_accessed_and_may_be_closed_again(memory):
    assert not memory.released
    memory.close()
    memory.close()
    assert memory.released
    for access in (lambda: memory.read(0, 1), lambda: memory.write(0, b"x")):
        with pytest.raises(GuestMemoryError, match="it is released"):
            access()


def test_memory_that_can_not_be_mapped_names_the_limits_and_leaves_nothing_mapped():
    # each of the two could be mapped, both exceed the 128 TiB that a process has
    odd = 4_571 * PAGE
    half = MAX_MEMORY - 64 * MiB
    before = mapped(odd), mapped(half)
    with pytest.raises(ResourceLimit, match=r"memory: .* vm\.overcommit_memory") as caught:
        of(
            MemoryRegion(address=64 * MiB, size=half),
            MemoryRegion(address=MAX_MEMORY, size=MAX_MEMORY),
            memory=odd,
        )
    assert (mapped(odd), mapped(half)) == before  # although the error is still there, and what it holds
    assert caught.value.errno == errno.ENOMEM


# ---- like plain bytes

SPANS = (range(RAM), range(RAM, RAM + 4 * PAGE), range(HOLE.stop, HOLE.stop + PAGE))
NEAR = st.sampled_from([0, RAM, RAM + 4 * PAGE, HOLE.start, HOLE.stop, HOLE.stop + PAGE])
ADDRESSES = st.one_of(
    st.integers(0, HOLE.stop + 2 * PAGE), st.builds(lambda a, d: max(0, a + d), NEAR, st.integers(-9, 9))
)


@settings(max_examples=100)
@given(st.lists(st.tuples(ADDRESSES, st.one_of(st.binary(max_size=20), st.integers(0, 5 * PAGE))), max_size=25))
def test_any_accesses_do_what_they_would_on_plain_bytes(accesses):
    memory = of(
        MemoryRegion(address=SPANS[1].start, size=len(SPANS[1])),
        MemoryRegion(address=SPANS[2].start, size=len(SPANS[2])),
    )
    model = bytearray(HOLE.stop + PAGE)
    inside = set().union(*(set(range(span.start, span.stop, PAGE)) for span in SPANS))
    for address, what in accesses:
        size = what if isinstance(what, int) else len(what)
        pages = {(address + i) // PAGE * PAGE for i in (*range(0, size, PAGE), size - 1)} if size else set()
        if not pages <= inside:
            with pytest.raises(GuestMemoryError):
                memory.read(address, size)
            if isinstance(what, bytes):
                with pytest.raises(GuestMemoryError):
                    memory.write(address, what)
        elif isinstance(what, bytes):
            memory.write(address, what)
            model[address : address + size] = what
        else:
            assert memory.read(address, size) == model[address : address + size]
    for span in SPANS:
        assert memory.read(span.start, len(span)) == model[span.start : span.stop]
    memory.close()
