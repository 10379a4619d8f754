"""From the core's records to exits: every reason, every field, and whatever bytes may be in a record."""

from __future__ import annotations

import functools
import operator
import struct

import pytest
from hypothesis import given, strategies as st

from orchestra.model import exits
from orchestra.native import ffi, records
from orchestra.native.core import REASON_NAMES, REASON_NUMBERS
from orchestra.native.records import (
    BUS_LOCK,
    EVENT_BUS_LOCK,
    GUEST_MODE,
    RECORD_SIZE,
    SMM,
    build,
    decode,
    decode_all,
    event_mask,
    unpack,
)

U64 = (1 << 64) - 1
# For each reason: the type, what the record's arguments and data are, and the fields that come of it.
REASONS: dict[str, tuple[type[exits.Exit], tuple[int, ...], bytes, dict[str, object]]] = {
    "unknown": (exits.UnknownExit, (7,), b"", {"hardware_exit_reason": 7}),
    "exception": (exits.ExceptionExit, (13, 8, 9), b"", {"exception": 13, "error_code": 8, "address": 9}),
    "io": (
        exits.Io,
        (0x3F8, 2, 3, 1),
        b"abcdef",
        {"port": 0x3F8, "size": 2, "count": 3, "write": True, "data": b"abcdef"},
    ),
    "hypercall": (exits.Hypercall, (12, 1, 2, U64, 4), b"", {"number": 12, "args": (1, 2, U64)}),
    "debug": (exits.Debug, (1, 0x1000, 0x4000, 0x400), b"", {"exception": 1, "pc": 0x1000, "dr6": 0x4000, "dr7": 1024}),
    "hlt": (exits.Hlt, (), b"", {}),
    "mmio": (
        exits.Mmio,
        (0xFEE0_0000, 4, 1),
        b"\1\2\3\4",
        {"address": 0xFEE0_0000, "size": 4, "write": True, "data": b"\1\2\3\4"},
    ),
    "irq_window_open": (exits.IrqWindowOpen, (), b"", {}),
    "shutdown": (exits.ShutdownExit, (), b"", {}),
    "fail_entry": (exits.FailEntry, (1 << 31, 3), b"", {"hardware_entry_failure_reason": 1 << 31, "cpu": 3}),
    "intr": (exits.Interrupted, (), b"", {}),
    "set_tpr": (exits.SetTpr, (9,), b"", {"cr8": 9}),
    "tpr_access": (exits.TprAccess, (0x2000, 1), b"", {"pc": 0x2000, "write": True}),
    "nmi": (exits.Nmi, (), b"", {}),
    "internal_error": (exits.InternalError, (1,), b"\x0f\x0b", {"suberror": 1, "instruction": b"\x0f\x0b"}),
    "system_event": (exits.SystemEvent, (2, 2, 10, 11, 12), b"", {"type": 2, "data": (10, 11)}),
    "ioapic_eoi": (exits.IoapicEoi, (33,), b"", {"vector": 33}),
    "hyperv": (exits.Hyperv, (2,), b"", {"type": 2}),
    "x86_rdmsr": (exits.Rdmsr, (0xC000_0080, 1), b"", {"index": 0xC000_0080, "reason": 1}),
    "x86_wrmsr": (exits.Wrmsr, (0x10, 2, U64), b"", {"index": 0x10, "reason": 2, "value": U64}),
    "dirty_ring_full": (exits.DirtyRingFull, (), b"", {}),
    "x86_bus_lock": (exits.BusLock, (), b"", {}),
    "xen": (exits.Xen, (1,), b"", {"type": 1}),
    "notify": (exits.Notify, (1,), b"", {"flags": 1}),
    "memory_fault": (exits.MemoryFault, (8, 0x5000, 4096), b"", {"flags": 8, "address": 0x5000, "size": 4096}),
}
COMMON = {"vm", "vcpu", "time", "rip", "wait", "bus_lock", "guest_mode", "smm"}


def fields_of(exit: exits.Exit) -> dict[str, object]:
    names = {field.name for field in type(exit).__attrs_attrs__}  # type: ignore[attr-defined]
    return {name: getattr(exit, name) for name in names - COMMON}


def decoded(record: object) -> exits.Exit:
    return decode(unpack(record), "vm", 3)


def test_layout_is_that_of_the_c_struct():
    names = ["time", "rip", "wait", "arg", "id", "reason", "flags", "has_rip", "data_size", "data", "vm", "vcpu"]
    offsets = [ffi.offsetof("struct orc_record", name) for name in names]
    assert offsets == [0, 8, 16, 24, 64, 68, 70, 72, 73, 74, 108, 112]
    assert records._LAYOUT.size == ffi.sizeof("struct orc_record") == 128
    raw = struct.pack("=8QI2H2B32s2x2I12x", *range(1, 14), b"data", 14, 15)
    record = ffi.new("struct orc_record *")
    ffi.memmove(record, raw, len(raw))
    assert (record.time, record.rip, record.wait, list(record.arg)) == (1, 2, 3, [4, 5, 6, 7, 8])
    assert (record.id, record.reason, record.flags, record.has_rip, record.data_size) == (9, 10, 11, 12, 13)
    assert ffi.buffer(record.data)[:5] == b"data\0"
    assert (record.vm, record.vcpu) == (14, 15)


def test_every_reason_of_the_core_is_tried_here_and_has_a_type_of_its_own():
    assert set(REASONS) == set(REASON_NUMBERS)
    kinds = [kind for kind, *_ in REASONS.values()]
    assert len(set(kinds)) == len(kinds)
    assert all(kind.kernel_name == name for name, (kind, *_) in REASONS.items())


@pytest.mark.parametrize("name", REASONS)
def test_reason_comes_back_as_its_type_with_its_fields(name):
    kind, args, data, expected = REASONS[name]
    exit = decoded(build(name, args=args, data=data))
    assert type(exit) is kind
    assert fields_of(exit) == expected
    assert (exit.vm, exit.vcpu) == ("vm", 3)


@pytest.mark.parametrize("name", REASONS)
@pytest.mark.parametrize(
    ("flags", "bus_lock", "guest_mode", "smm"),
    [
        (0, False, False, False),
        (BUS_LOCK, True, False, False),
        (GUEST_MODE, False, True, False),
        (SMM, False, False, True),
        (0xFFFF, True, True, True),
        (0xFFF8, False, False, False),
    ],
)
def test_flags_are_fields_of_every_exit(name, flags, bus_lock, guest_mode, smm):
    exit = decoded(build(name, flags=flags))
    assert (exit.bus_lock, exit.guest_mode, exit.smm) == (bus_lock, guest_mode, smm)


def test_flags_have_the_kernels_numbers():
    assert (SMM, BUS_LOCK, GUEST_MODE) == (1, 2, 4)


@pytest.mark.parametrize("name", ["io", "mmio", "tpr_access"])
def test_read_is_no_write(name):
    args = {"io": (1, 1, 1, 0), "mmio": (1, 1, 0), "tpr_access": (1, 0)}[name]
    assert decoded(build(name, args=args)).write is False  # type: ignore[attr-defined]


def test_rip_is_none_unless_it_was_sampled():
    assert decoded(build("hlt")).rip is None
    assert decoded(build("hlt", rip=0)).rip == 0
    assert decoded(build("hlt", rip=U64)).rip == U64


def test_time_and_wait_come_through():
    record = build("hlt")
    record.time, record.wait = 5, 6
    exit = decoded(record)
    assert (exit.time, exit.wait) == (5, 6)


@pytest.mark.parametrize("number", [13, 40, 62, 63, 64, 1000, 0xFFFF])
def test_number_from_the_future_is_an_exit_with_that_number(number):
    assert number not in REASON_NAMES
    exit = decoded(build(number, flags=BUS_LOCK))
    assert type(exit) is exits.OtherExit
    assert (exit.reason, exit.bus_lock) == (number, True)


def test_data_is_cut_to_what_a_record_holds():
    assert decoded(build("io", args=(1, 1, 40, 1), data=b"x" * 40)).data == b"x" * 32  # type: ignore[attr-defined]


@given(st.binary(min_size=128, max_size=128))
def test_whatever_bytes_a_record_has_it_is_an_exit(raw):
    fields = records._LAYOUT.unpack(raw)
    exit = decode(fields, "vm", 0)
    assert isinstance(exit, exits.Exit)
    assert (exit.time, exit.wait) == (fields[0], fields[2])
    assert exit.bus_lock == bool(fields[10] & 2)
    assert repr(exit)


@given(st.sampled_from(sorted(REASON_NUMBERS)), st.binary(min_size=128, max_size=128))
def test_known_reason_with_any_other_bytes_keeps_its_type(name, raw):
    record = ffi.new("struct orc_record *")
    ffi.memmove(record, raw, len(raw))
    record.reason = REASON_NUMBERS[name]
    assert type(decoded(record)) is REASONS[name][0]


# ---- records in a row


def told_by(vm: int, vcpu: int, reason: str) -> bytes:
    record = build(reason)
    record.vm, record.vcpu = vm, vcpu
    return bytes(ffi.buffer(record, RECORD_SIZE))


def test_records_in_a_row_say_whose_they_are():
    raw = told_by(2, 5, "hlt") + told_by(1, 0, "nmi") + told_by(2, 6, "intr")
    assert [(exit.vm, exit.vcpu, exit.kernel_name) for exit in decode_all(raw, {1: "a", 2: "b"})] == [
        ("b", 5, "hlt"),
        ("a", 0, "nmi"),
        ("b", 6, "intr"),
    ]
    assert decode_all(b"", {}) == []


# ---- which reasons are told


def bits(mask: int) -> set[int]:
    return {bit for bit in range(64) if mask >> bit & 1}


def test_nobody_listening_needs_nothing_told():
    assert event_mask(()) == 0


@pytest.mark.parametrize("name", sorted(set(REASONS) - {"x86_bus_lock"}))
def test_one_kind_needs_its_reason_only(name):
    assert event_mask((REASONS[name][0],)) == 1 << REASON_NUMBERS[name]


def test_bus_lock_needs_its_reason_and_every_exit_with_the_flag():
    assert event_mask((exits.BusLock,)) == 1 << REASON_NUMBERS["x86_bus_lock"] | EVENT_BUS_LOCK


def test_other_exits_need_all_reasons_without_a_type():
    assert bits(event_mask((exits.OtherExit,))) == set(range(63)) - set(REASON_NAMES)


def test_any_exit_needs_everything():
    assert bits(event_mask((exits.Exit,))) == set(range(64))


@given(st.lists(st.sampled_from([exits.OtherExit, *(kind for kind, *_ in REASONS.values())])))
def test_several_kinds_need_what_each_of_them_needs(kinds):
    alone = functools.reduce(operator.or_, (event_mask((kind,)) for kind in kinds), 0)
    assert event_mask(tuple(kinds)) == alone


def test_program_that_makes_a_record_with_an_unknown_name_hears_of_it():
    with pytest.raises(KeyError):
        build("buslock")
