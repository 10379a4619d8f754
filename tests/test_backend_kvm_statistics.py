"""The parser of KVM's binary statistics: what kernels write, what they may write one day, and what is no such file."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import attrs
import pytest
from hypothesis import given, strategies as st

from orchestra.backend.kvm.statistics import Statistic, StatisticsReader, parse
from orchestra.backend.kvm.system import Kvm
from orchestra.model.errors import BackendUnavailable, KvmError, OrchestraError
from orchestra.native import lib

NAME = 48
CUMULATIVE, INSTANT = lib.KVM_STATS_TYPE_CUMULATIVE, lib.KVM_STATS_TYPE_INSTANT
LINEAR, LOGARITHMIC = lib.KVM_STATS_TYPE_LINEAR_HIST, lib.KVM_STATS_TYPE_LOG_HIST


@attrs.frozen
class Entry:
    name: str
    values: tuple[int, ...] = (0,)
    flags: int = CUMULATIVE
    exponent: int = 0
    bucket_size: int = 0
    offset: int | None = None
    size: int | None = None


def build(*entries, name_size=NAME, identity=b"kvm-1\0", gap=0):
    """A statistics file as api.rst lays it out: header, id, descriptors, data."""
    identity = identity.ljust(name_size, b"\0")
    descriptors, data = b"", b""
    for entry in entries:
        descriptors += struct.pack(
            "=IhHII",
            entry.flags,
            entry.exponent,
            len(entry.values) if entry.size is None else entry.size,
            len(data) if entry.offset is None else entry.offset,
            entry.bucket_size,
        ) + entry.name.encode().ljust(name_size, b"\0")
        data += struct.pack(f"={len(entry.values)}Q", *entry.values)
    start = 24 + len(identity) + gap
    header = struct.pack("=IIIIII", 0, name_size, len(entries), 24, start, start + len(descriptors) + gap)
    return header + identity + bytes(gap) + descriptors + bytes(gap) + data


def test_each_statistic_has_its_name_kind_unit_and_value():
    stats = parse(
        build(
            Entry("exits", (7,)),
            Entry("halt_wait_ns", (1_500_000_000,), INSTANT | lib.KVM_STATS_UNIT_SECONDS, exponent=-9),
            Entry(
                "pages", (3,), lib.KVM_STATS_TYPE_PEAK | lib.KVM_STATS_UNIT_BYTES | lib.KVM_STATS_BASE_POW2, exponent=12
            ),
            Entry("guest_mode", (1,), INSTANT | lib.KVM_STATS_UNIT_BOOLEAN),
            Entry("tsc", (5,), lib.KVM_STATS_UNIT_CYCLES),
        )
    )
    assert stats["exits"] == Statistic(name="exits", kind="cumulative", unit="", base=10, exponent=0, values=(7,))
    assert (stats["halt_wait_ns"].kind, stats["halt_wait_ns"].unit) == ("instant", "seconds")
    assert stats["halt_wait_ns"].scaled == pytest.approx(1.5)
    assert (stats["pages"].kind, stats["pages"].unit, stats["pages"].base) == ("peak", "bytes", 2)
    assert stats["pages"].scaled == 3 * 4096
    assert stats["guest_mode"].unit == "boolean"
    assert stats["tsc"].unit == "cycles"


def test_histograms_keep_all_their_buckets():
    stats = parse(build(Entry("linear", (1, 2, 3), LINEAR, bucket_size=5), Entry("log", (4, 5), LOGARITHMIC)))
    assert (stats["linear"].kind, stats["linear"].values, stats["linear"].bucket_size) == (
        "linear histogram",
        (1, 2, 3),
        5,
    )
    assert (stats["log"].kind, stats["log"].values) == ("logarithmic histogram", (4, 5))


def test_kinds_and_units_from_the_future_are_kept_as_unknown():
    stat = parse(build(Entry("new", (9,), flags=0xF | 0xF0)))["new"]
    assert (stat.kind, stat.unit, stat.value) == ("unknown (15)", "unknown (240)", 9)


def test_a_file_may_have_no_statistics_and_may_have_gaps():
    assert parse(build()) == {}
    assert parse(build(Entry("a", (1,)), gap=40))["a"].value == 1


def test_a_name_that_fills_its_field_needs_no_end_and_strange_bytes_are_escaped():
    assert list(parse(build(Entry("abcd"), name_size=4))) == ["abcd"]
    assert list(parse(build(Entry("é")))) == ["\\xc3\\xa9"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (build(Entry("a"))[:23], "23 bytes"),
        (build(Entry("a"))[:100], "descriptors end"),
        (build(Entry("a"))[:-1], "ends at byte 8 of a data block of 7"),
        (build(Entry("a", offset=8)), "ends at byte 16"),
        (build(Entry("a", offset=0xFFFFFFFF)), "ends at byte"),
        (build(Entry("a", size=0xFFFF)), "ends at byte"),
        (build(Entry("a", size=0)), "0 values"),
        (build(Entry("a", flags=0xF00)), "flags 0xf00"),
        (build(Entry("a", exponent=-32768)), "exponent -32768"),
        (struct.pack("=IIIIII", 0, 0, 0, 24, 24, 24), "no length"),
        (struct.pack("=IIIIII", 0, 48, 0, 24, 8, 24), "inside the header"),
        (struct.pack("=IIIIII", 0, 48, 0, 24, 24, 0), "inside the header"),
        (struct.pack("=IIIIII", 0, 0xFFFFFFFF, 0xFFFFFFFF, 24, 24, 24), "4294967295 descriptors"),
    ],
)
def test_what_is_no_statistics_file_is_refused_with_the_reason(data, words):
    with pytest.raises(KvmError, match=words):
        parse(data)


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_our_errors(data):
    try:
        parse(data)
    except OrchestraError:
        pass


@given(data=st.data())
def test_a_file_with_broken_bytes_raises_nothing_but_our_errors(data):
    whole = bytearray(
        build(Entry("exits", (1,)), Entry("hist", (1, 2, 3), LINEAR), Entry("x", (1 << 63,), exponent=-9))
    )
    for at, value in data.draw(
        st.dictionaries(st.integers(0, len(whole) - 1), st.integers(0, 255), max_size=8)
    ).items():
        whole[at] = value
    try:
        stats = parse(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except OrchestraError:
        return
    for stat in stats.values():
        assert isinstance(stat.scaled, float)


# ---- the reader


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "stats"
    path.write_bytes(build(Entry("exits", (1,)), Entry("wait", (2, 3), LOGARITHMIC)))
    return path


def test_a_reader_sees_values_as_they_change(written):
    reader = StatisticsReader(os.open(written, os.O_RDONLY))
    assert {name: stat.values for name, stat in reader.read().items()} == {"exits": (1,), "wait": (2, 3)}
    written.write_bytes(build(Entry("exits", (10,)), Entry("wait", (20, 30), LOGARITHMIC)))
    assert {name: stat.values for name, stat in reader.read().items()} == {"exits": (10,), "wait": (20, 30)}
    reader.close()


def test_a_file_that_shrinks_is_an_error_and_not_a_wrong_number(written):
    reader = StatisticsReader(os.open(written, os.O_RDONLY))
    os.truncate(written, written.stat().st_size - 8)
    with pytest.raises(KvmError, match="were announced"):
        reader.read()
    reader.close()


def test_an_announced_data_block_of_gigabytes_is_refused(tmp_path):
    path = tmp_path / "stats"
    path.write_bytes(build(Entry("a", offset=1 << 31)))
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(KvmError, match="data block"):
        StatisticsReader(fd)
    os.close(fd)


def test_a_closed_reader_reads_no_more(written):
    reader = StatisticsReader(os.open(written, os.O_RDONLY))
    reader.close()
    reader.close()
    with pytest.raises(KvmError, match="Bad file descriptor"):
        reader.read()


def test_a_file_that_is_not_understood_leaves_no_descriptor(monkeypatch, tmp_path):
    (tmp_path / "garbage").write_bytes(b"garbage")
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("orchestra.backend.kvm.statistics.call", lambda *_: os.open(tmp_path / "garbage", os.O_RDONLY))
    with pytest.raises(KvmError, match="not understood"):
        StatisticsReader.open(-1)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.kvm
def test_the_kernels_own_statistics_are_understood():
    try:
        kvm = Kvm.open()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        if not vm.extension(lib.KVM_CAP_BINARY_STATS_FD):
            pytest.skip("this kernel has no binary statistics")
        for stats in (vm.statistics(), vcpu.statistics()):
            assert len(stats) > 5
            for name, stat in stats.items():
                assert name.isidentifier()
                assert not stat.kind.startswith("unknown")
                assert not stat.unit.startswith("unknown")
                assert stat.scaled >= 0
