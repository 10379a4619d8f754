"""Memory that is taken at launch, and memory that a host can't give."""

from __future__ import annotations

import struct
from pathlib import Path

import attrs
import pytest
import trio

import orchestra as orc
from conftest import blank
from orchestra.backend.memory import GuestMemory, Part
from orchestra.backend.scripted import hlt
from orchestra.host.observe.room import Bound, MemoryRoom
from orchestra.machine import prefault
from orchestra.machine.prefault import Claim, check_room, claim, populate
from orchestra.machine.workers import Workers
from orchestra.native import lib

MiB = orc.MiB
FULL = orc.Memory(64 * MiB, prefault=True)


def room(most: int, free: int) -> MemoryRoom:
    return MemoryRoom(Bound(most * MiB, "MemTotal"), Bound(free * MiB, "MemAvailable"))


def resident(memory: GuestMemory) -> int:
    """Bytes that the host has given for it, as /proc/self/pagemap says (bit 63: present)."""
    found = 0
    for region in memory.regions:
        pages = len(region.span) // 4096
        with Path("/proc/self/pagemap").open("rb", buffering=0) as entries:
            entries.seek(region.host // 4096 * 8)
            words = struct.unpack(f"<{pages}Q", entries.read(pages * 8))
        found += 4096 * sum(word >> 63 for word in words)
    return found


# ---- what is refused


@pytest.mark.parametrize(
    "memory",
    [
        orc.Memory(100 * MiB),
        orc.Memory(100 * MiB, backing="shared"),
        orc.Memory(100 * MiB, backing="file", path="/image"),
        orc.Memory(100 * MiB, transparent_huge_pages=True),
    ],
    ids=str,
)
def test_guests_may_be_promised_what_is_not_free_but_not_more_than_there_is(memory):
    spec = blank(memory=memory)
    check_room(spec, room=room(most=100, free=1))
    if memory.backing == "file":  # it can be read all the same
        check_room(spec, room=room(most=99, free=1))
    else:
        with pytest.raises(orc.ResourceLimit, match=rf"vm 'guest' has {100 * MiB} bytes, and MemTotal is {99 * MiB}"):
            check_room(spec, room=room(most=99, free=99))


def test_regions_count_and_small_vms_need_no_look():
    region = orc.MemoryRegion(1 << 30, 50 * MiB)
    with pytest.raises(orc.ResourceLimit, match=f"has {100 * MiB} bytes"):
        check_room(blank(memory=50 * MiB, regions=[region]), room=room(most=99, free=99))
    check_room(blank(memory=64 * MiB), room=room(most=1, free=1))


@pytest.mark.parametrize("backing", ["anonymous", "shared", "file"])
def test_what_is_taken_at_launch_must_be_free_then(backing):
    path = "/image" if backing == "file" else None
    spec = blank(memory=attrs.evolve(FULL, backing=backing, path=path))
    check_room(spec, room=room(most=1000, free=64))
    with pytest.raises(orc.ResourceLimit, match=rf"prefault=True: .* takes {64 * MiB} bytes at launch"):
        check_room(spec, room=room(most=1000, free=63))
    with pytest.raises(orc.ResourceLimit, match=f"of which other launches take {MiB} bytes now"):
        check_room(spec, others=MiB, room=room(most=1000, free=64))


def test_where_nothing_is_known_nothing_is_refused():
    check_room(blank(memory=FULL), room=MemoryRoom(None, None))
    check_room(blank(memory=1 << 40), room=MemoryRoom(None, None))


async def test_a_launch_that_the_host_has_no_room_for_makes_nothing(nothing_left, monkeypatch):
    monkeypatch.setattr(prefault, "memory_room", lambda: room(most=50, free=50))
    async with orc.open_fleet(backend=orc.ScriptedBackend(lambda spec, vcpu: [hlt(after=1e9)])) as fleet:
        for memory in (100 * MiB, FULL):
            with pytest.raises(orc.ResourceLimit, match="memory: "):
                await fleet.launch(blank(memory=memory))
        assert dict(fleet.vms) == {}
        assert fleet._context.workers.claimed == 0
        await fleet.launch(blank(memory=50 * MiB))


# ---- what is taken


async def test_claims_are_the_sum_of_what_launches_are_about_to_take(autojump_clock):
    workers = Workers(threaded=False)
    with claim(workers, blank(memory=FULL)) as one, claim(workers, blank(memory=128 * MiB)) as small:
        assert (one.others, small.others) == (0, 64 * MiB)
        one.taken(60 * MiB)
        assert small.others == 4 * MiB
        one.taken(60 * MiB)
        assert workers.claimed == 0
    with pytest.raises(KeyError), claim(workers, blank(memory=FULL)):
        raise KeyError
    assert workers.claimed == 0


@pytest.mark.parametrize("backing", ["anonymous", "shared", "file"])
async def test_all_of_it_is_there_when_the_guest_starts_and_what_was_there_stays(nothing_left, tmp_path, backing):
    path = None
    if backing == "file":
        (path := tmp_path / "image").write_bytes(b"kept" + bytes(64 * MiB))
    memory = attrs.evolve(FULL, backing=backing, path=path and str(path))
    async with orc.open_fleet(backend="auto", bus_locks="auto") as fleet:
        vm = await fleet.launch(orc.VmSpec(name="vm", boot=orc.FlatImage(code=b"\xf4"), memory=memory), paused=True)
        assert resident(vm._control.guest.memory) == 64 * MiB
        assert fleet._context.workers.claimed == 0
        assert vm.read_memory(0, 4) == (b"kept" if backing == "file" else bytes(4))
        await vm.reset()
        assert resident(vm._control.guest.memory) == 64 * MiB
        await vm.stop()


def test_a_kernel_that_can_not_populate_touches_each_page_and_changes_none():
    memory = GuestMemory(blank(memory=4 * MiB))
    memory.write(4096, b"\1\2\3")
    for part in memory.parts(1 * MiB):
        lib.orc_touch(part.region.view + part.start, part.size)
    assert resident(memory) == 4 * MiB
    assert memory.read(4096, 4) == b"\1\2\3\0"
    assert memory.read(8192, 4096) == bytes(4096)
    memory.close()


async def test_a_launch_that_is_cancelled_meanwhile_gives_back_what_it_took(nothing_left, monkeypatch):
    begun, taken = trio.Event(), []
    token = trio.lowlevel.current_trio_token()
    real = Part.populate

    def slow(part: Part) -> None:
        real(part)
        taken.append(part.size)
        trio.from_thread.run_sync(begun.set, trio_token=token)

    monkeypatch.setattr(prefault, "STEP", MiB)
    monkeypatch.setattr(Part, "populate", slow)
    async with orc.open_fleet(backend="auto", bus_locks="auto") as fleet:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet.launch, orc.VmSpec(name="vm", boot=orc.FlatImage(code=b"\xf4"), memory=FULL))
            await begun.wait()
            nursery.cancel_scope.cancel()
        assert sum(taken) < 64 * MiB
        assert dict(fleet.vms) == {}
        assert fleet._context.workers.claimed == 0


async def test_a_host_that_gives_no_more_says_so(nothing_left, monkeypatch):
    def refuse(part: Part) -> None:
        if part.start >= 32 * MiB:
            raise orc.ResourceLimit(12, "memory: prefault=True: the host gives no more (Cannot allocate memory)")

    monkeypatch.setattr(Part, "populate", refuse)
    async with orc.open_fleet(backend="auto", bus_locks="auto") as fleet:
        with pytest.raises(orc.ResourceLimit, match="the host gives no more"):
            await fleet.launch(orc.VmSpec(name="vm", boot=orc.FlatImage(code=b"\xf4"), memory=FULL))
        assert dict(fleet.vms) == {}


def test_memory_that_is_not_mapped_can_not_be_populated():
    memory = GuestMemory(blank(memory=MiB))
    [part] = memory.parts(MiB)
    assert lib.orc_populate(part.region.view, 0) == 0
    part.populate()
    beyond = Part(part.region, 1 << 46, MiB)  # no address that a process has
    with pytest.raises(orc.ResourceLimit, match="the host gives no more"):
        beyond.populate()
    memory.close()


async def test_parts_that_are_populated_are_all_there_is(autojump_clock):
    memory = GuestMemory(blank(memory=5 * MiB, regions=[orc.MemoryRegion(64 * MiB, 3 * MiB)]))
    assert [(part.start, part.size) for part in memory.parts(2 * MiB)] == [
        (0, 2 * MiB),
        (2 * MiB, 2 * MiB),
        (4 * MiB, MiB),
        (0, 2 * MiB),
        (2 * MiB, MiB),
    ]
    workers = Workers(threaded=False)
    await populate(memory, workers, Claim(workers, 8 * MiB))
    assert resident(memory) == 8 * MiB
    assert workers.claimed == 0
    memory.close()
