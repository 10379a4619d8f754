"""Who answers where on a bus: claims, overlaps, and look-ups while claims come and go."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from orchestra.devices.bus import Bus, Device
from orchestra.devices.requests import Requests
from orchestra.errors import SpecError


class Null:
    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


@pytest.fixture
def bus() -> Bus:
    return Bus("ports", 1 << 16)


def test_nobody_answers_on_a_new_bus(bus):
    assert bus.find(0, 1) is None
    assert bus.find(0xFFFF, 1) is None
    assert bus.claims() == []


def test_claim_is_found_at_each_of_its_addresses_and_nowhere_else(bus):
    claim = bus.claim(range(0x100, 0x108), Null())
    assert [address for address in range(0xF0, 0x110) if bus.find(address, 1) is claim] == list(range(0x100, 0x108))


@pytest.mark.parametrize(("address", "size", "found"), [(0x104, 4, True), (0x105, 4, False), (0xFE, 4, False)])
def test_access_that_reaches_over_an_end_of_the_claim_is_not_its(bus, address, size, found):
    claim = bus.claim(range(0x100, 0x108), Null())
    assert (bus.find(address, size) is claim) == found


def test_access_across_two_claims_is_nobodys(bus):
    bus.claim(range(0x100, 0x104), Null())
    bus.claim(range(0x104, 0x108), Null())
    assert bus.find(0x102, 4) is None


def test_claims_are_kept_in_order_whatever_order_they_came_in(bus):
    claims = [bus.claim(range(start, start + 2), Null()) for start in (6, 2, 4, 0)]
    assert bus.claims() == [claims[3], claims[1], claims[2], claims[0]]
    assert [bus.find(start, 2) for start in (6, 2, 4, 0)] == claims


def test_released_range_is_free_again(bus):
    device = Null()
    claim = bus.claim(range(4), device)
    other = bus.claim(range(4, 8), device)
    bus.release(claim)
    bus.release(claim)
    assert bus.find(0, 1) is None
    assert bus.find(4, 1) is other
    assert bus.claim(range(4), Null()) is bus.find(3, 1)


def test_whoever_looks_up_meanwhile_sees_the_old_table_or_the_new_one(bus):
    table = bus.claims()
    bus.claim(range(4), Null())
    assert table == []  # it is replaced, not changed


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
    assert bus.find(0xFFFF, 1) is claim
    assert bus.find(0xFFFF, 2) is None


def test_device_answers_at_once_and_a_task_does_not(bus):
    device, requests = Null(), Requests(lambda *_: None)
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
            claim = bus.find(start, 1)
            assert claim is model.get(start)
            if claim is not None:
                bus.release(claim)
                model = {address: owner for address, owner in model.items() if owner is not claim}
        elif size == 0 or start < 0 or span.stop > 32 or any(address in model for address in span):
            with pytest.raises(SpecError):
                bus.claim(span, Null())
        else:
            model.update(dict.fromkeys(span, bus.claim(span, Null())))
    for address in range(-1, 34):
        for size in (1, 2, 4, 8):
            owners = {model.get(a) for a in range(address, address + size)}
            assert bus.find(address, size) is (owners.pop() if len(owners) == 1 else None)
