"""vhost-user messages: what a front-end says, and that no answer of a back-end passes that is not the right one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, strategies as st

import orchestra as orc
from orchestra.machine.devices.vhost.messages import (
    HEADER,
    RamRegion,
    Request,
    config,
    descriptor,
    parse_config,
    parse_header,
    parse_vring,
    request,
    table,
    vring,
    vring_addresses,
)

KINDS = st.sampled_from(list(Request))
WORDS = st.integers(0, 0xFFFFFFFF)


def test_request_is_its_header_and_its_payload():
    assert request(Request.SET_OWNER) == bytes.fromhex("03000000 01000000 00000000")
    assert request(Request.SET_VRING_NUM, vring(1, 128), acknowledged=True) == bytes.fromhex(
        "08000000 09000000 08000000 01000000 80000000"
    )


def test_table_has_no_address_of_this_process():
    made = table([RamRegion(0, 0x1000, 0), RamRegion(0x1_0000_0000, 0x2000, 0x1000)])
    words = struct.unpack("<II8Q", made)
    assert words == (2, 0, 0, 0x1000, 0, 0, 0x1_0000_0000, 0x2000, 0x1_0000_0000, 0x1000)


def test_table_has_one_to_eight_regions():
    for count in (0, 9):
        with pytest.raises(orc.VhostUserError, match=f"{count} regions of memory"):
            table([RamRegion(0, 0x1000, 0)] * count)


def test_addresses_are_in_the_order_of_the_protocol():
    assert struct.unpack("<IIQQQQ", vring_addresses(3, 1, 2, 4)) == (3, 0, 1, 4, 2, 0)


def test_descriptor_that_is_not_given_says_so():
    assert descriptor(2, given=True) == struct.pack("<Q", 2)
    assert descriptor(2, given=False) == struct.pack("<Q", 0x102)


@given(KINDS, WORDS, WORDS, WORDS, st.integers(0, 64))
def test_header_passes_only_if_it_is_the_one_answer(kind: Request, found: int, flags: int, length: int, size: int):
    right = (found, length) == (kind, size) and flags in (5, 13)
    try:
        parse_header(HEADER.pack(found, flags, length), kind, size)
    except orc.VhostUserError:
        assert not right
    else:
        assert right


@given(KINDS, st.sampled_from([5, 13]), st.integers(0, 64))
def test_right_header_passes(kind: Request, flags: int, size: int):
    parse_header(HEADER.pack(kind, flags, size), kind, size)


@given(st.binary(max_size=40), KINDS, st.integers(0, 64))
def test_no_bytes_make_the_parser_of_headers_fail_otherwise(data: bytes, kind: Request, size: int):
    problem = kind.name
    try:
        parse_header(data, kind, size)
    except orc.VhostUserError as error:
        problem = str(error)
    assert problem.startswith(kind.name)


@given(WORDS, WORDS, st.integers(0, 15))
def test_place_of_a_queue_is_of_that_queue_and_in_a_ring(found: int, base: int, index: int):
    try:
        place = parse_vring(struct.pack("<II", found, base), index)
    except orc.VhostUserError:
        assert found != index or base > 0xFFFF
    else:
        assert (found, base) == (index, place)
        assert place <= 0xFFFF


@given(st.integers(0, 0xFFFF))
def test_each_place_in_a_ring_is_taken(base: int):
    assert parse_vring(struct.pack("<II", 7, base), 7) == base


@given(WORDS, WORDS, WORDS)
def test_configuration_is_all_of_what_was_asked_for(offset: int, length: int, flags: int):
    payload = struct.pack("<III", offset, length, flags) + bytes(range(60))
    try:
        found = parse_config(payload, 60)
    except orc.VhostUserError:
        assert (offset, length) != (0, 60)
    else:
        assert found == bytes(range(60))


def test_request_for_a_configuration_is_as_long_as_its_answer():
    assert len(config(60)) == 72
    assert parse_config(config(60, bytes(range(60))), 60) == bytes(range(60))
