"""Who answers where on a bus: claims, overlaps, and look-ups while claims come and go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from orchestra.machine.devices.bus import Bus, Claim, Device
from orchestra.machine.devices.console import Console
from orchestra.machine.devices.peripheral import Hooks
from orchestra.machine.devices.ports import DebugConsolePort
from orchestra.machine.devices.requests import Requests
from orchestra.model.errors import SpecError, StateError
from orchestra.native import ffi, lib
from orchestra.native.core import FleetCore, VcpuCore


class Null:
    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


def debug_console(console: Console) -> DebugConsolePort:
    """A device of the core."""
    return DebugConsolePort(orc.DebugConsole(), Hooks(memory=None, timer=None, console=console, end=print))  # type: ignore[arg-type]


@pytest.fixture
def bus() -> Bus:
    return Bus("ports", 1 << 16)


def test_nobody_answers_on_a_new_bus(bus):
    assert bus.find(0) is None
    assert bus.find(0xFFFF) is None
    assert bus.claims() == []


def test_claim_is_found_at_each_of_its_addresses_and_nowhere_else(bus):
    claim = bus.claim(range(0x100, 0x108), Null())
    assert [address for address in range(0xF0, 0x110) if bus.find(address) is claim] == list(range(0x100, 0x108))


def test_claims_are_kept_in_order_whatever_order_they_came_in(bus):
    claims = [bus.claim(range(start, start + 2), Null()) for start in (6, 2, 4, 0)]
    assert bus.claims() == [claims[3], claims[1], claims[2], claims[0]]
    assert [bus.find(start) for start in (6, 2, 4, 0)] == claims


def test_released_range_is_free_again(bus):
    device = Null()
    claim = bus.claim(range(4), device)
    other = bus.claim(range(4, 8), device)
    bus.release(claim)
    bus.release(claim)
    assert bus.find(0) is None
    assert bus.find(4) is other
    assert bus.claim(range(4), Null()) is bus.find(3)


def test_whoever_looks_up_meanwhile_sees_the_old_table_or_the_new_one(bus):
    table = bus.claims()
    bus.claim(range(4), Null())
    assert table == []  # it is replaced, not changed


def test_each_claim_has_a_version_of_its_own(bus):
    one = bus.claim(range(4), Null())
    bus.release(one)
    other = bus.claim(range(4), Null())
    assert one.version != other.version
    assert (one.live, other.live) == (False, True)
    assert list(bus.claimed.values()) == [other]


# ---- moving


def test_a_claim_that_is_moved_answers_there_and_no_longer_here(bus):
    before = bus.claim(range(0x100, 0x110), Null())
    after = bus.move(before, range(0x200, 0x210))
    assert (bus.find(0x100), bus.find(0x200), bus.find(0x20F)) == (None, after, after)
    assert (after.handler, after.device, after.lock) == (before.handler, before.device, before.lock)
    assert after.version != before.version
    assert (before.live, after.live) == (False, True)


def test_a_claim_may_be_moved_to_where_it_overlaps_itself(bus):
    claim = bus.claim(range(0x100, 0x110), Null())
    moved = bus.move(claim, range(0x108, 0x118))
    assert [bus.find(address) for address in (0x100, 0x108, 0x117)] == [None, moved, moved]


def test_a_move_to_where_somebody_is_moves_nothing(bus):
    claim, other = bus.claim(range(0x100, 0x110), Null()), bus.claim(range(0x200, 0x210), Null())
    with pytest.raises(SpecError, match=r"0x200-0x20f is claimed by Null already; choose other addresses"):
        bus.move(claim, range(0x1F8, 0x208))
    assert bus.claims() == [claim, other]
    assert claim.live


def test_what_was_released_or_moved_can_not_be_moved(bus):
    claim = bus.claim(range(4), Null())
    moved = bus.move(claim, range(4, 8))
    with pytest.raises(StateError, match="claimed no more"):
        bus.move(claim, range(8, 12))
    bus.release(moved)
    with pytest.raises(StateError, match="claimed no more"):
        bus.move(moved, range(8, 12))


def test_a_vcpu_that_looks_up_while_a_claim_moves_finds_it_at_one_of_the_two_places_each_time(bus):
    here, there = range(0x100, 0x104), range(0x102, 0x106)
    claim = bus.claim(here, Null())
    ended = threading.Event()
    seen: set[tuple[int, ...]] = set()

    def look() -> None:
        with vcpu_on(bus) as vcpu:
            while not ended.is_set():
                pieces, _ = vcpu.read(0x100, 4, 1)
                seen.add(tuple(piece.address for piece in pieces))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(300):
            claim = bus.move(claim, there)
            claim = bus.move(claim, here)
    finally:
        ended.set()
        thread.join()
    assert seen <= {(0x100,), (0x102,)}
    assert lib.orc_bus_tables(bus.handle) == 1  # however often it was moved


# ---- releasing while somebody is called


class Slow:
    """A device that stays in a call until it is let go."""

    def __init__(self) -> None:
        self.called, self.let_go = threading.Event(), threading.Event()
        self.calls = 0
        self.running = 0

    def read(self, offset: int, size: int) -> int:
        self.calls += 1
        self.running += 1
        self.called.set()
        assert self.let_go.wait(20)
        self.running -= 1
        return 0

    def write(self, offset: int, size: int, value: int) -> None: ...


def call(claim: Claim) -> None:
    """As a vCPU does."""
    with claim.lock:
        if claim.live:
            assert claim.device is not None
            claim.device.read(0, 1)


@pytest.mark.parametrize(
    "leave", [lambda bus, claim: bus.release(claim), lambda bus, claim: bus.move(claim, range(8, 12))]
)
def test_release_and_move_wait_for_the_call_in_flight_and_none_begins_afterwards(bus, leave):
    device = Slow()
    claim = bus.claim(range(4), device)
    vcpu = threading.Thread(target=call, args=(claim,))
    vcpu.start()
    assert device.called.wait(20)
    released = threading.Event()

    def release() -> None:
        leave(bus, claim)
        assert device.running == 0
        released.set()

    owner = threading.Thread(target=release)
    owner.start()
    while bus.find(0) is not None:  # from now on it only waits
        pass
    assert not released.is_set()
    device.let_go.set()
    owner.join(20)
    vcpu.join(20)
    assert released.is_set()
    call(claim)  # a vCPU that looked up before and comes only now
    assert device.calls == 1


def test_a_handler_may_release_its_own_claim(bus):
    class Leaves(Null):
        def read(self, offset: int, size: int) -> int:
            bus.release(claim)
            return 1

    claim = bus.claim(range(4), Leaves())
    thread = threading.Thread(target=call, args=(claim,), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert bus.find(0) is None


def test_threads_that_claim_and_release_at_once_lose_no_claim(bus):
    def work(start: int) -> None:
        for _ in range(200):
            claims = [bus.claim(range(start + 2 * i, start + 2 * i + 2), Null()) for i in range(3)]
            for claim in claims:
                bus.release(claim)
        bus.claim(range(start, start + 2), Null())

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 64, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [claim.span.start for claim in bus.claims()] == [0, 16, 32, 48]
    assert len(bus.claimed) == 4


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (range(5, 5), "at least one"),
        (range(0, 8, 2), "step 1"),
        (range(8, 0, -1), "step 1"),
        ((0, 8), "must be a range"),
        (0x3F8, "must be a range"),
        (range(-1, 3), r"ports=-0x1-0x2: must lie in 0-0xffff"),
        (range(0xFFFF, 0x10001), r"ports=0xffff-0x10000: must lie in 0-0xffff"),
    ],
)
def test_range_that_can_not_be_claimed_is_refused(bus, span, message):
    with pytest.raises(SpecError, match=message):
        bus.claim(span, Null())
    assert bus.claims() == []


@pytest.mark.parametrize("span", [range(0x100, 0x101), range(0x10F, 0x120), range(0xF0, 0x101), range(0, 0x1000)])
def test_overlap_names_both_ranges_and_who_is_there(bus, span):
    claim = bus.claim(range(0x100, 0x110), Null())
    with pytest.raises(SpecError, match=r"ports=.*: 0x100-0x10f is claimed by Null already"):
        bus.claim(span, Null())
    assert bus.claims() == [claim]


def test_whole_address_space_can_be_claimed(bus):
    claim = bus.claim(range(1 << 16), Null())
    assert bus.find(0xFFFF) is claim
    assert bus.find(0x10000) is None


def test_device_answers_at_once_and_a_task_does_not(bus):
    device, requests = Null(), Requests()
    assert isinstance(device, Device)
    assert bus.claim(range(4), device).device is device
    asked = bus.claim(range(4, 8), requests)
    assert (asked.handler, asked.device) == (requests, None)


STEPS = st.tuples(st.sampled_from(["claim", "release"]), st.integers(-2, 34), st.integers(0, 8))


@given(st.lists(STEPS, max_size=30))
def test_any_claims_and_releases_leave_each_address_to_one_or_nobody(steps):
    bus = Bus("mmio", 32)
    model: dict[int, object] = {}
    for what, start, size in steps:
        span = range(start, start + size)
        if what == "release":
            claim = bus.find(start) if start >= 0 else None
            assert claim is model.get(start)
            if claim is not None:
                bus.release(claim)
                model = {address: owner for address, owner in model.items() if owner is not claim}
        elif size == 0 or start < 0 or span.stop > 32 or any(address in model for address in span):
            with pytest.raises(SpecError):
                bus.claim(span, Null())
        else:
            model.update(dict.fromkeys(span, bus.claim(span, Null())))
    for address in range(34):
        assert bus.find(address) is model.get(address)
    assert {claim.version for claim in bus.claims()} == set(bus.claimed)


# ---- accesses in pieces


@attrs.frozen
class Piece:
    """What a handler was asked."""

    address: int
    size: int
    offset: int
    data: bytes


class Vcpu:
    """A vCPU without a guest: its accesses go to the core, which is answered as by `orchestra.machine.vcpu`."""

    def __init__(self, core: VcpuCore, bus: Bus) -> None:
        self.core, self.bus = core, bus
        self.access = lib.orc_vcpu_access(core.handle)

    def _play(self, address: int, size: int, count: int, write: bool, buffer: Any) -> list[Piece]:
        pieces = []
        more = lib.orc_access_begin(self.core.handle, lib.ORC_MMIO, address, size, count, write, buffer)
        assert more in (lib.ORC_MMIO, lib.ORC_ANSWERED)
        while more not in (lib.ORC_ANSWERED, False):
            access = self.access
            claim = self.bus.claimed.get(access.claim)
            if claim is None:
                access.count = 0
            else:
                assert 1 <= access.count <= lib.ORC_CHUNK
                for i in range(access.count):
                    where = access.data + i * access.size
                    offset = access.address - claim.span.start
                    pieces.append(Piece(access.address, access.size, offset, bytes(ffi.buffer(where, access.size))))
                    if not write:
                        ffi.memmove(where, answer(claim, access.offset, access.size), access.size)
            more = lib.orc_access_next(self.core.handle)
        return pieces

    def read(self, address: int, size: int, count: int) -> tuple[list[Piece], bytes]:
        buffer = ffi.new("uint8_t[]", size * count)
        pieces = self._play(address, size, count, False, buffer)
        return pieces, bytes(ffi.buffer(buffer))

    def write(self, address: int, size: int, data: bytes) -> list[Piece]:
        return self._play(address, size, len(data) // size, True, ffi.new("uint8_t[]", data))

    @property
    def unclaimed(self) -> int:
        return self.core.counters(1).unclaimed


@contextmanager
def vcpu_on(bus: Bus) -> Iterator[Vcpu]:
    fleet = FleetCore()
    core = VcpuCore(fleet, 1)
    core.set_buses(bus.handle, bus.handle)
    try:
        yield Vcpu(core, bus)
    finally:
        core.close()
        fleet.close()


def answer(claim: Claim, offset: int, size: int) -> bytes:
    """A byte for each address, so that one that is in the wrong place shows."""
    return bytes((claim.span.start + offset + i) * 7 & 0x7F for i in range(size))


def pieces_of(bus: Bus, address: int, size: int) -> list[tuple[int, int]]:
    """(address, size) of what handlers get of one access. A reference, as plain as can be."""
    owners = [bus.find(address + i) for i in range(size)]
    if owners[0] is not None and len(set(owners)) == 1 and size in (1, 2, 4, 8):
        return [(address, size)]
    pieces, at = [], 0
    while at < size:
        if owners[at] is None:
            at += 1
            continue
        fits = [
            n
            for n in (1, 2, 4, 8)
            if (address + at) % n == 0 and at + n <= size and set(owners[at : at + n]) == {owners[at]}
        ]
        pieces.append((address + at, fits[-1]))
        at += fits[-1]
    return pieces


@pytest.mark.parametrize(
    ("address", "size", "pieces"),
    [
        (0x100, 4, [(0x100, 4)]),
        (0x101, 2, [(0x101, 2)]),  # unaligned, and its own: as the guest did it
        (0x101, 4, [(0x101, 1), (0x102, 2)]),
        (0x103, 2, [(0x103, 1)]),
        (0x0FE, 4, [(0x100, 2)]),
        (0x0FD, 8, [(0x100, 4)]),
        (0x100, 3, [(0x100, 2), (0x102, 1)]),
        (0x106, 8, [(0x106, 2), (0x108, 4)]),  # two neighbours
        (0x10D, 2, []),
        (0xFFF, 2, [(0xFFF, 1)]),  # behind the last address there is nobody
    ],
)
def test_an_access_reaches_those_who_claim_its_addresses_in_aligned_pieces(address, size, pieces):
    bus = Bus("ports", 1 << 12)
    bus.claim(range(0x100, 0x104), Null())
    bus.claim(range(0x106, 0x108), Null())
    bus.claim(range(0x108, 0x10C), Null())
    bus.claim(range(0xFFF, 0x1000), Null())
    with vcpu_on(bus) as vcpu:
        asked, data = vcpu.read(address, size, 1)
        assert [(piece.address, piece.size) for piece in asked] == pieces == pieces_of(bus, address, size)
        covered = {a + i for a, n in pieces for i in range(n)}
        assert data == bytes((address + i) * 7 & 0x7F if address + i in covered else 0xFF for i in range(size))
        assert vcpu.unclaimed == (len(covered) < size)


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=6)


@given(SPANS, st.integers(0, 48), st.integers(1, 8), st.integers(1, 70), st.data())
def test_each_byte_of_any_access_goes_to_its_owner_once_and_the_rest_is_ones(spans, address, size, count, data):
    bus = Bus("mmio", 64)
    for start, length in spans:
        if all(bus.find(address) is None for address in range(start, start + length)):
            bus.claim(range(start, start + length), Null())
    written = data.draw(st.binary(min_size=size * count, max_size=size * count))
    expected = pieces_of(bus, address, size)
    with vcpu_on(bus) as vcpu:
        asked, got = vcpu.read(address, size, count)
        assert [(piece.address, piece.size) for piece in asked] == expected * count
        covered = {a + i for a, n in expected for i in range(n)}
        element = bytes((address + i) * 7 & 0x7F if address + i in covered else 0xFF for i in range(size))
        assert got == element * count
        assert vcpu.unclaimed == (len(covered) < size)

        told = vcpu.write(address, size, written)
        assert [(piece.address, piece.size) for piece in told] == expected * count
        assert [piece.data for piece in told] == [
            written[at + a - address : at + a - address + n] for at in range(0, len(written), size) for a, n in expected
        ]
        assert all(piece.offset == piece.address - bus.find(piece.address).span.start for piece in told)


def test_what_is_not_answered_is_looked_up_again(bus):
    claim = bus.claim(range(4), Null())
    with vcpu_on(bus) as vcpu:
        buffer = ffi.new("uint8_t[]", 100)
        assert lib.orc_access_begin(vcpu.core.handle, lib.ORC_IO, 0, 1, 100, False, buffer) == lib.ORC_IO
        assert vcpu.access.count == 64
        ffi.memmove(vcpu.access.data, bytes(10), 10)
        vcpu.access.count = 10
        bus.release(claim)
        assert not lib.orc_access_next(vcpu.core.handle)
        assert bytes(ffi.buffer(buffer)) == bytes(10) + b"\xff" * 90
        assert vcpu.unclaimed == 1


def test_a_program_that_claims_and_releases_for_ever_keeps_one_table_for_each_vcpu_at_most(bus):
    device = debug_console(Console(lambda wake: wake()))
    with vcpu_on(bus), vcpu_on(bus):
        for _ in range(1000):
            bus.release(bus.claim(range(4), device))
            assert lib.orc_bus_tables(bus.handle) <= 3
    assert bus.claims() == []
    assert bus.claimed == {}


def test_a_device_of_the_core_answers_without_python(bus):
    console = Console(lambda wake: wake())
    bus.claim(range(0xE9, 0xEA), debug_console(console))
    with vcpu_on(bus) as vcpu:
        assert vcpu.write(0xE9, 1, b"hello" * 200) == []
        assert console.log() == b"hello" * 200
        assert vcpu.write(0xE9, 2, b"h.i.") == []  # to one port of the two
        assert console.log().endswith(b"hellohi")
        assert vcpu.read(0xE9, 1, 3) == ([], b"\xe9" * 3)
        assert vcpu.unclaimed == 1
