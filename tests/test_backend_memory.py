"""Guest memory: one checked door to it, the same as plain bytes behind, and nothing mapped once it is closed."""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings, strategies as st

from orchestra import Shutdown
from orchestra.backend import memory as memory_module
from orchestra.backend.memory import _HUGE_POOL, GuestMemory
from orchestra.model.errors import FileError, GuestMemoryError, ResourceLimit
from orchestra.model.linux import LinuxBoot
from orchestra.model.memory import HUGE_PAGE, MAX_MEMORY, PAGE, Memory
from orchestra.model.spec import FlatImage, GiB, MemoryRegion, MiB, VmSpec
from orchestra.native import ffi

HOLE = range(16 * PAGE, 18 * PAGE)
RAM = 8 * PAGE


def spec(memory: int | Memory = RAM, *regions: MemoryRegion) -> VmSpec:
    return VmSpec(name="vm", boot=FlatImage(code=b"\xf4"), memory=memory, regions=regions)


def of(*regions: MemoryRegion, memory: int | Memory = RAM) -> GuestMemory:
    return GuestMemory(spec(memory, *regions))


@pytest.fixture
def memory():
    made = of(
        MemoryRegion(address=RAM, size=4 * PAGE, readonly=True, contents=b"rom"),  # adjacent to the RAM
        MemoryRegion(address=HOLE.stop, size=PAGE, log_dirty=True),
    )
    yield made
    made.close()


def test_whoever_is_told_of_writes_may_go_at_any_moment():
    class Leaves(GuestMemory):
        """Another thread ends the run just after a write has looked for whom to tell."""

        @property
        def on_write(self):
            told, self.told = self.told, None
            return told

        @on_write.setter
        def on_write(self, value):
            self.told = value

    made, seen = Leaves(spec()), []
    made.on_write = lambda address, size: seen.append((address, size))
    made.write(8, b"abc")
    made.write(8, b"abc")
    assert seen == [(8, 3)]
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
    with pytest.raises(TypeError, match=r"data=.*: must be bytes"):
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


def test_a_structure_is_unpacked_from_one_copy(memory, monkeypatch):
    layout = struct.Struct("<HIQ")
    memory.write(0x10, layout.pack(1, 2, 3))
    reads = []
    read = GuestMemory.read
    monkeypatch.setattr(GuestMemory, "read", lambda self, *what: reads.append(what) or read(self, *what))
    assert memory.unpack(layout, 0x10) == (1, 2, 3)
    assert reads == [(0x10, 14)]
    with pytest.raises(GuestMemoryError):
        memory.unpack(layout, RAM + 4 * PAGE - 13)


# ---- what it is made of


def test_a_file_is_read_to_where_it_belongs_and_no_further(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(1, 11)))
    written = []
    with (tmp_path / "file").open("rb") as file:
        adjacent = MemoryRegion(address=RAM, size=PAGE)
        memory = of(adjacent)
        memory.on_write = lambda address, size: written.append((address, size))
        try:
            assert memory.read_file(RAM - 2, 4, file.fileno(), 3) == 4
            assert memory.read(RAM - 3, 6) == bytes([0, 4, 5, 6, 7, 0])
            assert memory.read_file(0, 8, file.fileno(), 6) == 4  # the file ends there
            assert memory.read(0, 5) == bytes([7, 8, 9, 10, 0])
            with pytest.raises(GuestMemoryError):
                memory.read_file(RAM + PAGE - 1, 2, file.fileno(), 0)
            assert memory.read(RAM + PAGE - 1, 1) == b"\0"
            assert written == [(RAM - 2, 4), (0, 4)]
        finally:
            memory.close()


def test_zeros_are_written_only_where_memory_did_not_begin_with_them(image):
    memory = made_of(Memory(RAM, backing="file", path=str(image)))
    try:
        before = memory.read(0, PAGE)
        memory.zero(8, 16)
        assert memory.read(0, PAGE) == before[:8] + bytes(16) + before[24:]
        with pytest.raises(GuestMemoryError):
            memory.zero(RAM - 1, 2)
    finally:
        memory.close()


def made_of(memory: Memory | int = RAM, **more: object) -> GuestMemory:
    made = VmSpec(name="vm", boot=FlatImage(code=b"\xf4", load=0), memory=memory)
    return GuestMemory(made, **more)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(8)))
    return path


def test_shared_memory_is_seen_through_its_descriptor_by_whoever_has_it():
    memory = made_of(Memory(RAM, backing="shared"))
    with mmap.mmap(memory.descriptor, RAM) as other:
        memory.write(0x123, b"from here")
        assert other[0x123:0x12C] == b"from here"
        other[0x2000:0x2005] = b"there"
        assert memory.read(0x2000, 5) == b"there"
        memory.close()
        assert other[0x123:0x12C] == b"from here"  # their mapping is their own
    assert memory.descriptor is None


def test_shared_memory_can_not_be_cut_short_or_made_longer_by_whoever_has_it():
    memory = made_of(Memory(RAM, backing="shared"))
    for size in (0, RAM - PAGE, RAM + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.descriptor, size)
    memory.close()


def test_ram_around_the_hole_lies_in_one_descriptor_in_its_order():
    memory = made_of(Memory(3 * GiB + PAGE, backing="shared"))
    memory.write(4 * GiB, b"high")
    assert os.pread(memory.descriptor, 4, 3 * GiB) == b"high"
    memory.close()


def test_only_shared_memory_has_a_descriptor(memory, image):
    assert memory.descriptor is None
    private = made_of(Memory(RAM, backing="file", path=str(image)))
    assert private.descriptor is None
    private.close()


def test_memory_of_a_file_holds_what_it_holds_and_never_changes_it(image):
    before = image.read_bytes()
    memory = made_of(Memory(RAM, backing="file", path=str(image)))
    assert memory.read(0, RAM) == before
    memory.write(3 * PAGE - 2, b"ours")
    assert memory.read(3 * PAGE - 2, 5) == b"ours\3"
    assert image.read_bytes() == before
    memory.close()


def test_many_memories_over_one_template_do_not_see_each_other(image):
    descriptor = os.open(image, os.O_RDONLY)
    memories = [made_of(template=descriptor) for _ in range(3)]
    os.close(descriptor)  # theirs stay
    for number, memory in enumerate(memories):
        memory.write(5 * PAGE, bytes([number]) * 4)
    assert [memory.read(5 * PAGE, 5) for memory in memories] == [bytes([n]) * 4 + b"\5" for n in range(3)]
    for memory in memories:
        memory.close()


def test_a_memfd_that_is_a_template_can_not_be_cut_short_from_then_on():
    template = os.memfd_create("template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(template, RAM)
    memory = made_of(template=template)
    with pytest.raises(PermissionError):
        os.ftruncate(template, PAGE)
    assert memory.read(RAM - 1, 1) == b"\0"  # which would have ended the process
    memory.close()
    os.close(template)


@pytest.mark.parametrize("size", [0, 1, RAM - 1])
def test_a_file_that_is_too_short_is_refused_with_both_sizes(tmp_path, size):
    path = tmp_path / "short"
    path.write_bytes(bytes(size))
    with pytest.raises(FileError, match=f"short: has {size} bytes, and the VM's RAM {RAM}"):
        made_of(Memory(RAM, backing="file", path=str(path)))


def test_what_is_no_readable_regular_file_is_refused_by_its_name(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, what in [("none", "No such file"), (".", "is no regular file"), ("pipe", "is no regular file")]:
        path = str(tmp_path / name)
        with pytest.raises(FileError, match=f"{re.escape(path)}: .*{what}"):
            made_of(Memory(RAM, backing="file", path=path))
    with pytest.raises(FileError, match=r"descriptor 12345: .*Bad file descriptor"):
        made_of(template=12345)


def free_huge_pages() -> int:
    try:
        return int(_HUGE_POOL.read_text())
    except OSError:
        return -1


@pytest.mark.parametrize("backing", ["anonymous", "shared"])
def test_huge_pages_that_the_host_does_not_have_are_counted_and_the_remedy_is_named(backing):
    free = free_huge_pages()
    if free < 0:
        pytest.skip("this kernel has no huge pages of 2 MiB")
    wanted = free + 5
    with pytest.raises(ResourceLimit, match=rf"needs {wanted} huge .* has {free} free .* `sysctl vm.nr_hugepages=N`"):
        made_of(Memory(wanted * HUGE_PAGE, backing=backing, huge_pages=True))


@pytest.mark.parametrize("backing", ["anonymous", "shared"])
def test_huge_pages_come_from_the_hosts_pool_and_go_back(backing):
    free = free_huge_pages()
    if free < 2:
        pytest.skip(f"this host's pool has {max(free, 0)} free huge pages (vm.nr_hugepages)")
    memory = made_of(Memory(2 * HUGE_PAGE, backing=backing, huge_pages=True))
    memory.write(HUGE_PAGE - 2, b"1234")
    assert memory.read(HUGE_PAGE - 2, 4) == b"1234"
    assert free_huge_pages() < free
    assert memory.regions[0].host % HUGE_PAGE == 0
    memory.close()
    assert free_huge_pages() == free


def flags(memory: GuestMemory) -> set[str]:
    """What /proc/self/smaps says of the first mapping: "hg" may, "nh" must not have transparent huge pages."""
    address = f"{memory.regions[0].host:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(address))
    return set(next(line for line in lines if line.startswith("VmFlags:")).split()[1:])


@pytest.mark.parametrize("backing", ["anonymous", "shared", "file"])
def test_the_kernel_is_told_whether_it_may_make_huge_pages_of_it(backing, image):
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    path = str(image) if backing == "file" else None
    for wanted, flag in ((None, set()), (True, {"hg"}), (False, {"nh"})):
        memory = made_of(Memory(RAM, backing=backing, path=path, transparent_huge_pages=wanted))
        assert flags(memory) & {"hg", "nh"} == flag
        memory.close()


def test_a_kernel_without_transparent_huge_pages_says_so_if_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(memory_module.mmap, "MADV_HUGEPAGE", 9999)
    monkeypatch.setattr(memory_module.mmap, "MADV_NOHUGEPAGE", 9999)
    with pytest.raises(ResourceLimit, match="transparent_huge_pages=True: this kernel has none"):
        made_of(Memory(RAM, transparent_huge_pages=True))
    made_of(Memory(RAM, transparent_huge_pages=False)).close()  # as it is


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no transparent huge pages here")
@pytest.mark.parametrize("backing", ["anonymous", "shared"])
def test_linux_may_have_transparent_huge_pages_unless_its_memory_says_otherwise(backing):
    def linux(wanted: bool | None) -> set[str]:
        memory = Memory(64 * MiB, backing=backing, transparent_huge_pages=wanted)
        made = GuestMemory(VmSpec(name="vm", boot=LinuxBoot(kernel="vmlinuz"), memory=memory))
        try:
            return flags(made)
        finally:
            made.close()

    assert "hg" in linux(None)
    assert "nh" in linux(False)
    small = of(memory=Memory(64 * MiB, backing=backing))
    assert not {"hg", "nh"} & flags(small)
    small.close()


def test_a_kernel_without_huge_pages_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_module, "_HUGE_POOL", tmp_path / "none")
    monkeypatch.setattr(memory_module.mmap, "mmap", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EINVAL, "no")))
    with pytest.raises(ResourceLimit, match="this kernel has no huge pages of 2 MiB"):
        made_of(Memory(HUGE_PAGE, huge_pages=True))


def ram_file(folder: Path) -> str:
    path = folder / "ram"
    path.write_bytes(bytes(MiB - PAGE) + b"in the file".ljust(PAGE, b"\0"))
    return str(path)


@pytest.mark.parametrize("backing", ["anonymous", "shared", "file"])
async def test_guests_run_in_memory_of_any_kind_on_every_backend(stage, backing, tmp_path):
    path = ram_file(tmp_path) if backing == "file" else None
    spec = stage.spec("exit_port", memory=Memory(MiB, backing=backing, path=path))
    async with stage.open() as fleet:
        vm = await fleet.launch(spec)
        with trio.fail_after(20):
            assert await vm.wait() == Shutdown(code=42)
        assert vm.read_memory(spec.boot.load, len(spec.boot.code)) == spec.boot.code
        assert vm.read_memory(MiB - PAGE, 11) == (b"in the file" if path else bytes(11))
        assert (vm._control.guest.memory.descriptor is not None) == (backing == "shared")


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
@given(
    st.lists(st.tuples(ADDRESSES, st.one_of(st.binary(max_size=20), st.integers(0, 5 * PAGE))), max_size=25),
    st.sampled_from(["anonymous", "shared"]),
)
def test_any_accesses_do_what_they_would_on_plain_bytes(accesses, backing):
    memory = of(
        MemoryRegion(address=SPANS[1].start, size=len(SPANS[1])),
        MemoryRegion(address=SPANS[2].start, size=len(SPANS[2])),
        memory=Memory(RAM, backing=backing),
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
