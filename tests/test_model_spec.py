"""The words of what you want: every bad one is refused with field, value and remedy, every good one holds together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from orchestra.model.devices import DebugConsole, ExitPort, Serial
from orchestra.model.errors import SpecError
from orchestra.model.memory import MAX_MEMORY, MMIO_HOLE, PAGE
from orchestra.model.spec import (
    FlatImage,
    GiB,
    KiB,
    Limit,
    Memory,
    MemoryRegion,
    Meter,
    MiB,
    Restart,
    Tenant,
    VmSpec,
    as_meter,
    optional_limit,
)

HALT = FlatImage(code=b"\xf4")
NAN, INF = math.nan, math.inf
HUGE = 10**400  # beyond the floats
HUGER = 10**5000  # beyond what Python prints


def spec(**more: object) -> VmSpec:
    return VmSpec(**{"name": "vm", "boot": HALT, **more})  # type: ignore[arg-type]


def flat(**more: object) -> FlatImage:
    return FlatImage(**{"code": b"\xf4", **more})  # type: ignore[arg-type]


def region(**more: object) -> MemoryRegion:
    return MemoryRegion(**{"address": 2 * MiB, "size": PAGE, **more})  # type: ignore[arg-type]


BAD: list[tuple[Callable[[], object], str, str, str]] = [
    # how it is made, then what the message names: field, value, remedy
    (lambda: Limit(rate=0), "rate", "0", "more than 0"),
    (lambda: Limit(rate=-1.5), "rate", "-1.5", "pause()"),
    (lambda: Limit(rate=NAN), "rate", "nan", "finite"),
    (lambda: Limit(rate=INF), "rate", "inf", "None"),
    (lambda: Limit(rate=HUGE), "rate", "1000", "finite"),
    (lambda: Limit(rate=1e9 + 1), "rate", "1000000001.0", "1e9"),
    (lambda: Limit(rate="fast"), "rate", "'fast'", "a number"),  # type: ignore[arg-type]
    (lambda: Limit(rate=True), "rate", "True", "a number"),
    (lambda: Limit(rate=None), "rate", "None", "a number"),  # type: ignore[arg-type]
    (lambda: Limit(rate=1, burst=0.5), "burst", "0.5", "from 1"),
    (lambda: Limit(rate=1, burst=NAN), "burst", "nan", "finite"),
    (lambda: Limit(rate=1, burst=2e9), "burst", "2000000000.0", "1e9"),
    (lambda: Limit(rate=1, max_delay=0), "max_delay", "0", "None for no bound"),
    (lambda: Limit(rate=1, max_delay=-1), "max_delay", "-1", "more than 0"),
    (lambda: Limit(rate=1, max_delay=2e6), "max_delay", "2000000.0", "1e6 seconds"),
    (lambda: optional_limit("limit", 100), "limit", "100", "Limit(rate=100)"),
    (lambda: as_meter("io"), "meter", "'io'", '"bus_locks", "exits" or "answers"'),
    (lambda: Tenant(""), "tenant", "''", "letters"),
    (lambda: Tenant("a b"), "tenant", "'a b'", "letters"),
    (lambda: Tenant("a", weight=0), "weight", "0", "more than 0"),
    (lambda: Tenant("a", weight=NAN), "weight", "nan", "finite"),
    (lambda: Tenant("a", weight=HUGE), "weight", "1000", "finite"),
    (lambda: Tenant("a", weight=1e7), "weight", "10000000.0", "1e6"),
    (lambda: Tenant("a", limit=5), "limit", "5", "must be a Limit"),  # type: ignore[arg-type]
    (lambda: Tenant("a", exit_limit=5), "exit_limit", "5", "must be a Limit"),  # type: ignore[arg-type]
    (lambda: region(address=-PAGE), "region address", "-4096", "from 0"),
    (lambda: region(address=100), "region address", "100", "multiple of 4096"),
    (lambda: region(address=1.5), "region address", "1.5", "whole number"),
    (lambda: region(size=0), "region size", "0", "from 4096"),
    (lambda: region(size=5000), "region size", "5000", "multiple of 4096"),
    (lambda: region(size=HUGER), "region size", "<int>", "bytes"),
    (lambda: region(contents=b"x" * 4097), "region contents", "4097 bytes", "fit"),
    (lambda: region(contents="text"), "region contents", "'text'", "bytes"),
    (lambda: region(contents=None), "region contents", "None", "bytes"),
    (lambda: flat(code=b""), "code", "b''", "at least one"),
    (lambda: flat(code="hlt"), "code", "'hlt'", "bytes"),
    (lambda: flat(code=None), "code", "None", "bytes"),
    (lambda: flat(mode=8), "mode", "8", "16, 32 or 64"),
    (lambda: flat(mode="16"), "mode", "'16'", "16, 32 or 64"),
    (lambda: flat(mode=16.0), "mode", "16.0", "16, 32 or 64"),
    (lambda: flat(load=-1), "load", "-1", "from 0"),
    (lambda: flat(load=None), "load", "None", "whole number"),
    (lambda: flat(entry=-1), "entry", "-1", "from 0"),
    (lambda: flat(entry=0x10000), "entry", "0x10000", "64 KiB"),
    (lambda: flat(load=0x20000), "entry", "0x20000", "64 KiB"),
    (lambda: flat(entry=1 << 32, mode=64), "entry", "0x100000000", "4 GiB"),
    (lambda: DebugConsole(port=-1), "port", "-1", "from 0 to 65535"),
    (lambda: DebugConsole(port="com1"), "port", "'com1'", "whole number"),  # type: ignore[arg-type]
    (lambda: ExitPort(port=0xFFFE), "port", "65534", "65532"),
    (lambda: Serial(port=0xFFF9), "port", "65529", "65528"),
    (lambda: Serial(irq=24), "irq", "24", "from 0 to 23"),
    (lambda: Serial(irq="4"), "irq", "'4'", "whole number"),  # type: ignore[arg-type]
    (lambda: Restart(when="always"), "restart", "'always'", '"on-failure"'),  # type: ignore[arg-type]
    (lambda: Restart(backoff=0), "backoff", "0", "backoff_max=30.0"),
    (lambda: Restart(backoff=NAN), "backoff", "nan", "finite"),
    (lambda: Restart(backoff=60), "backoff", "60", "at most backoff_max"),
    (lambda: Restart(most=0), "most", "0", "from 1"),
    (lambda: spec(pit=1), "pit", "1", "True or False"),
    (lambda: spec(pit=True), "pit", "True", 'needs irqchip="full" (it is "none")'),
    (lambda: spec(pit=True, irqchip="split"), "pit", "True", 'needs irqchip="full" (it is "split")'),
    (lambda: spec(name=""), "name", "''", "letters"),
    (lambda: spec(name="-x"), "name", "'-x'", "first a letter or digit"),
    (lambda: spec(name="a\n"), "name", r"'a\n'", "letters"),
    (lambda: spec(name="x" * 65), "name", "x" * 65, "1 to 64"),
    (lambda: spec(name=7), "name", "7", "letters"),
    (lambda: spec(boot=b"\xf4"), "boot", r"b'\xf4'", "FlatImage"),
    (lambda: spec(memory=0), "memory", "0", "from 4096"),
    (lambda: spec(memory=MiB + 1), "memory", "1048577", "multiple of 4096"),
    (lambda: spec(memory=HUGE), "memory", "1000", "bytes"),
    (lambda: spec(memory=1e6), "memory", "1000000.0", "whole number"),
    (lambda: spec(vcpus=0), "vcpus", "0", "from 1"),
    (lambda: spec(vcpus=10**9), "vcpus", "1000000000", "4096"),
    (lambda: spec(vcpus=True), "vcpus", "True", "whole number"),
    (lambda: spec(tenant="a/b"), "tenant", "'a/b'", "letters"),
    (lambda: spec(weight=-1), "weight", "-1", "more than 0"),
    (lambda: spec(limit=200), "limit", "200", "must be a Limit"),
    (lambda: spec(exit_limit=200), "exit_limit", "200", "must be a Limit"),
    (lambda: spec(vcpu_limit=200), "vcpu_limit", "200", "must be a Limit"),
    (lambda: spec(vcpu_exit_limit=200), "vcpu_exit_limit", "200", "must be a Limit"),
    (lambda: spec(restart="sometimes"), "restart", "'sometimes'", '"never"'),
    (lambda: spec(restart=None), "restart", "None", '"never"'),
    (lambda: spec(regions=region()), "regions", "MemoryRegion(", "tuple or list"),
    (lambda: spec(regions=None), "regions", "None", "tuple or list"),
    (lambda: spec(regions=[4096]), "regions", "4096", "MemoryRegion"),
    (lambda: spec(devices=Serial()), "devices", "Serial(", "tuple or list"),
    (lambda: spec(devices=["serial"]), "devices", "'serial'", "Serial"),
    (lambda: spec(labels="web"), "labels", "'web'", "mapping"),
    (lambda: spec(boot=flat(code=bytes(2 * MiB))), "boot", "0x1000-0x200fff", "more memory"),
    (lambda: spec(boot=flat(entry=0x9000), memory=8 * PAGE), "entry", "0x9000", "0x8000"),
    (lambda: spec(regions=[region(address=MiB - PAGE)]), "regions", "0xff000-0xfffff", "move the region"),
    (lambda: spec(regions=[region(), region()]), "regions", "0x200000-0x200fff", "overlaps"),
    (lambda: spec(boot=flat(mode=64), memory=12 * PAGE), "memory", "49152", str(13 * PAGE)),
    (lambda: spec(boot=flat(mode=32), memory=16 * PAGE, vcpus=9), "memory", "65536", str(20 * PAGE)),
    (lambda: spec(boot=flat(mode=64, load=MiB - 3 * PAGE)), "boot", "0xfd000", "tables"),
    (lambda: spec(boot=flat(mode=64, load=MiB - 13 * PAGE)), "boot", "0xf3000", "stacks"),
]


@pytest.mark.parametrize(("make", "field", "value", "remedy"), BAD)
def test_what_cannot_be_is_refused_naming_field_value_and_remedy(make, field, value, remedy):
    with pytest.raises(SpecError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(field)
    assert value in message
    assert remedy in message
    assert len(message) < 600  # a value of a megabyte is shown by its beginning


def test_limit_allows_by_default_what_its_rate_gives_in_50_ms_and_at_least_one_event():
    assert Limit(rate=1000).tokens == 50
    assert Limit(rate=1).tokens == 1
    assert Limit(rate=1000, burst=7).tokens == 7


def test_limit_bounds_a_delay_by_default_so_that_a_guest_never_hangs():
    assert Limit(rate=1).max_delay == 10.0
    assert Limit(rate=1, max_delay=None).max_delay is None


def test_flat_image_starts_where_it_is_loaded_unless_told_otherwise():
    assert flat(load=0x2000).start == 0x2000
    assert flat(load=0x2000, entry=0).start == 0
    assert flat(code=b"abc", load=0x2000).span == range(0x2000, 0x2003)


def test_flat_image_and_region_keep_copies_of_what_may_change():
    code = bytearray(b"\xf4")
    image, memory = flat(code=code), region(contents=code)
    code[0] = 0x90
    assert image.code == memory.contents == b"\xf4"


def test_long_contents_stay_out_of_the_repr():
    assert len(repr(spec(boot=flat(code=bytes(MiB // 2)), regions=[region(contents=bytes(PAGE))]))) < 1000


def test_region_spans_its_addresses():
    assert region(address=PAGE, size=2 * PAGE).span == range(PAGE, 3 * PAGE)


def test_regions_and_devices_are_taken_as_any_iterable():
    made = spec(regions=[region()], devices=iter([Serial(), DebugConsole()]))
    assert made.regions == (region(),)
    assert made.devices == (Serial(), DebugConsole())


def test_restart_may_be_named_by_a_word():
    assert spec(restart="on-failure").restart == Restart(when="on-failure")
    assert spec().restart.when == "never"


def test_memory_above_3_gib_goes_on_behind_the_mmio_hole():
    assert spec(memory=3 * GiB).ram == (range(3 * GiB),)
    assert spec(memory=5 * GiB).ram == (range(3 * GiB), range(4 * GiB, 6 * GiB))


def test_region_behind_the_hole_overlaps_ram_only_if_ram_goes_on_there():
    high = region(address=4 * GiB)
    spec(memory=3 * GiB, regions=[high])
    with pytest.raises(SpecError, match="overlaps"):
        spec(memory=3 * GiB + PAGE, regions=[high])


def test_image_may_lie_in_a_region_of_its_own():
    made = spec(boot=flat(load=2 * MiB, mode=32), regions=[region()])
    assert made.boot.start in made.regions[0].span


def test_image_may_not_reach_over_the_end_of_memory_by_a_single_byte():
    spec(memory=2 * PAGE, boot=flat(code=bytes(PAGE)))
    with pytest.raises(SpecError, match="more memory"):
        spec(memory=2 * PAGE, boot=flat(code=bytes(PAGE + 1)))


def test_16_bit_image_may_fill_all_the_memory_as_it_needs_no_tables():
    spec(memory=PAGE, boot=flat(code=bytes(PAGE), load=0))


@pytest.mark.parametrize("mode", [32, 64])
def test_tables_and_stacks_lie_below_the_end_of_the_first_ram(mode):
    made = spec(boot=flat(mode=mode), vcpus=3)
    image = made.boot
    assert image.tables(made.layout) == range(MiB - 12 * PAGE, MiB - 2 * PAGE)
    assert image.stacks(made.layout) == range(MiB - 15 * PAGE, MiB - 12 * PAGE)
    assert image.stacks(spec(boot=image, vcpus=100).layout) == range(MiB - 20 * PAGE, MiB - 12 * PAGE)
    assert image.tables(spec(boot=image, memory=5 * GiB).layout).stop == 3 * GiB - 2 * PAGE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": PAGE - 1}, "size=4095: must be from 4096"),
        ({"size": PAGE + 1}, "size=4097: must be a multiple of 4096 bytes"),
        ({"size": MiB, "huge_pages": True}, "size=1048576: must be from 2097152"),
        ({"size": 3 * MiB, "huge_pages": True}, "must be a multiple of 2097152 bytes"),
        ({"size": MiB, "backing": "disk"}, "backing='disk': must be"),
        ({"size": MiB, "backing": "file"}, 'path=None: must be given with backing="file"'),
        ({"size": MiB, "path": "x"}, "path='x': must be given with"),
        ({"size": MiB, "backing": "file", "path": ""}, "path='': must be the name of a file"),
        ({"size": MiB, "backing": "file", "path": "a\0b"}, "must be the name of a file"),
        ({"size": 2 * MiB, "backing": "file", "path": "x", "huge_pages": True}, "huge_pages=True: must be False"),
        ({"size": MiB, "huge_pages": 1}, "huge_pages=1: must be True or False"),
        ({"size": MiB, "prefault": None}, "prefault=None: must be True or False"),
        ({"size": MiB, "transparent_huge_pages": "yes"}, "transparent_huge_pages='yes': must be True, False, or None"),
        (
            {"size": 2 * MiB, "huge_pages": True, "transparent_huge_pages": False},
            "transparent_huge_pages=False: must be None with huge_pages=True",
        ),
        ({"size": MiB, "dirty_ring": 512}, "dirty_ring=512: must be from 1024 to 65536"),
        ({"size": MiB, "dirty_ring": 3000}, "dirty_ring=3000: must be a power of two"),
    ],
)
def test_a_memory_that_can_not_be_names_what_and_why(arguments, message):
    with pytest.raises(SpecError, match=message):
        Memory(**arguments)


def test_memory_is_a_number_or_says_what_it_is_made_of():
    assert spec(memory=5 * GiB).backing == Memory(5 * GiB)
    made = spec(memory=Memory(5 * GiB, backing="shared"))
    assert made.backing is made.memory
    assert made.ram == spec(memory=5 * GiB).ram


def test_specs_are_equal_by_value_frozen_and_hashable():
    assert spec(labels={"a": "b"}) == spec(labels={"a": "b"})
    assert spec(vcpus=2) != spec()
    assert hash(spec(labels={"a": "b"})) == hash(spec(labels={"a": "b"}))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        spec().memory = 5


def test_meter_is_taken_as_itself_or_by_its_name():
    assert as_meter("exits") is Meter.EXITS
    assert as_meter(Meter.BUS_LOCKS) is Meter.BUS_LOCKS


# ---- anything at all: a SpecError, or a spec whose promises hold

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.floats(),
    st.integers(),
    st.sampled_from([HUGE, -HUGE, HUGER, [], {}, object()]),
)
NUMBER = st.one_of(ODD, st.floats(0, 2e9), st.integers(0, 2 * 10**9))
PAGES = st.integers(0, 300).map(lambda n: n * PAGE)
ADDRESS = st.one_of(
    PAGES, ODD, st.integers(0, 2 * MiB), st.sampled_from([MAX_MEMORY, 3 * GiB, 4 * GiB - PAGE, 4 * GiB])
)


def made_or_refused(kind: type, arguments: dict[str, object]) -> object | None:
    try:
        return kind(**arguments)
    except SpecError:
        return None


def as_arguments(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries(fields)


@given(as_arguments(rate=NUMBER, burst=NUMBER, max_delay=NUMBER))
def test_any_limit_is_refused_or_in_its_bounds(arguments):
    limit = made_or_refused(Limit, arguments)
    if limit is not None:
        assert 0 < limit.rate <= 1e9
        assert 1 <= limit.tokens <= 1e9
        assert limit.max_delay is None or 0 < limit.max_delay <= 1e6


@given(as_arguments(address=ADDRESS, size=ADDRESS, contents=ODD))
def test_any_region_is_refused_or_whole_pages(arguments):
    made = made_or_refused(MemoryRegion, arguments)
    if made is not None:
        assert made.span.start % PAGE == made.span.stop % PAGE == 0
        assert 0 <= made.span.start < made.span.stop <= 2 * MAX_MEMORY
        assert len(made.contents) <= made.size


IMAGES = as_arguments(
    code=st.one_of(st.binary(max_size=3), st.integers(1, 64).map(lambda n: bytes(n * 1024)), ODD),
    load=ADDRESS,
    entry=st.one_of(st.none(), ADDRESS),
    mode=st.one_of(st.sampled_from([16, 32, 64]), ODD),
)


@given(IMAGES)
def test_any_image_is_refused_or_startable_in_its_mode(arguments):
    image = made_or_refused(FlatImage, arguments)
    if image is not None:
        assert len(image.code) >= 1
        assert 0 <= image.start <= (0xFFFF if image.mode == 16 else 0xFFFF_FFFF)


GOOD_IMAGES = st.builds(
    FlatImage,
    code=st.one_of(st.binary(min_size=1, max_size=9), st.integers(1, 200).map(lambda n: bytes(n * 1024))),
    load=st.integers(0, 0xFFFF),
    mode=st.sampled_from([16, 32, 64]),
)
GOOD_REGIONS = st.builds(MemoryRegion, address=PAGES, size=PAGES.map(lambda n: n + PAGE))


@settings(max_examples=300)
@given(
    as_arguments(
        name=st.one_of(st.just("vm"), ODD),
        boot=st.one_of(GOOD_IMAGES, GOOD_IMAGES, ODD),
        memory=st.one_of(PAGES, PAGES, st.sampled_from([3 * GiB, 5 * GiB]), ODD),
        vcpus=st.one_of(st.integers(1, 20), ODD),
        regions=st.one_of(st.lists(GOOD_REGIONS, max_size=3), ODD),
        devices=st.one_of(st.just([Serial()]), ODD),
        weight=st.one_of(st.just(1.0), NUMBER),
        labels=st.one_of(st.just({}), ODD),
    )
)
def test_any_vm_is_refused_or_laid_out_without_overlap(arguments):
    made = made_or_refused(VmSpec, arguments)
    if made is not None:
        spans = sorted([*made.ram, *(r.span for r in made.regions)], key=lambda span: span.start)
        for low, high in itertools.pairwise(spans):
            assert low.stop <= high.start
        assert sum(map(len, made.ram)) == made.memory
        assert not any(span.start < MMIO_HOLE.stop and MMIO_HOLE.start < span.stop for span in made.ram)
        assert any(made.boot.load in span and made.boot.span[-1] in span for span in spans)
        assert any(made.boot.start in span for span in spans)
        if made.boot.mode != 16:
            stacks, tables = made.boot.stacks(made.layout), made.boot.tables(made.layout)
            assert 0 <= stacks.start < stacks.stop == tables.start
            assert tables.stop <= made.ram[0].stop
            assert made.boot.span.stop <= stacks.start or tables.stop <= made.boot.span.start
        assert 1 <= made.vcpus <= 4096


def test_units_are_powers_of_two():
    assert (KiB, MiB, GiB) == (1 << 10, 1 << 20, 1 << 30)
