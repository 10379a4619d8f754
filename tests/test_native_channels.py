"""Channels and batches: what a subscriber wants and no more, in order, and every exit is received or counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings, strategies as st

from orchestra.model import exits
from orchestra.model.errors import ResourceLimit
from orchestra.native import ffi, lib
from orchestra.native.channels import EVERY_VM, NO_VM, Channel, ExitBatch
from orchestra.native.core import FleetCore, VcpuCore
from orchestra.native.records import BUS_LOCK, RECORD_SIZE, build, decode_all, event_mask

EVERYTHING = (1 << 64) - 1
NAMES = {1: "one", 2: "two", 3: "three"}
KINDS = {"hlt": exits.Hlt, "io": exits.Io, "mmio": exits.Mmio, "x86_bus_lock": exits.BusLock, "x86_wrmsr": exits.Wrmsr}


@pytest.fixture
def fleet() -> Iterator[FleetCore]:
    made = FleetCore()
    yield made
    made.close()


def core_of(fleet: FleetCore, vm: int, vcpu: int) -> VcpuCore:
    core = VcpuCore(fleet, 10 * vm + vcpu)
    core.set_name(vm, vcpu)
    core.subscribe(EVERYTHING)
    return core


def account(core: VcpuCore, reason: str | int, now: int = 1, **more: object) -> None:
    lib.orc_vcpu_account(core.handle, build(reason, **more), now)  # type: ignore[arg-type]


def taken(channel: Channel, most: int = 1 << 20) -> list[exits.Exit]:
    return decode_all(channel.take(most), NAMES)


def test_a_channel_gets_the_kinds_and_the_vm_it_asked_for(fleet):
    one, two = core_of(fleet, 1, 0), core_of(fleet, 2, 3)
    every = Channel(fleet, EVERYTHING, EVERY_VM, 100, drop_oldest=True)
    locks = Channel(fleet, event_mask((exits.BusLock,)), EVERY_VM, 100, drop_oldest=True)
    of_two = Channel(fleet, EVERYTHING, 2, 100, drop_oldest=True)
    of_nobody = Channel(fleet, EVERYTHING, NO_VM, 100, drop_oldest=True)
    account(one, "hlt")
    account(two, "io", args=(0x80, 1, 1, 1), data=b"x", flags=BUS_LOCK)
    assert fleet.deliver() == 2
    assert sorted(exit.vm for exit in taken(every)) == ["one", "two"]
    assert [type(exit) for exit in taken(locks)] == [exits.Io]
    (exit,) = taken(of_two)
    assert (exit.vm, exit.vcpu) == ("two", 3)
    assert taken(of_nobody) == []
    of_nobody.follow(1)
    account(one, "nmi")
    account(two, "nmi")
    fleet.deliver()
    assert [exit.vm for exit in taken(of_nobody)] == ["one"]
    one.close()
    two.close()


def test_what_is_ended_gets_nothing_more_and_keeps_what_it_has(fleet):
    core = core_of(fleet, 1, 0)
    first, second = (Channel(fleet, EVERYTHING, EVERY_VM, 10, drop_oldest=True) for _ in range(2))
    account(core, "hlt")
    fleet.deliver()
    first.end()
    first.end()
    account(core, "nmi")
    fleet.deliver()
    assert [channel.received for channel in (first, second)] == [1, 2]
    assert [type(exit) for exit in taken(first)] == [exits.Hlt]
    core.close()


def test_records_of_one_vcpu_can_be_delivered_alone(fleet):
    cores = [core_of(fleet, vm, 0) for vm in NAMES]
    channel = Channel(fleet, EVERYTHING, EVERY_VM, 100, drop_oldest=True)
    for core in cores:
        for time in (1, 2, 3):
            account(core, "hlt", time)
    assert fleet.deliver(cores[1]) == 3
    assert [(exit.vm, exit.time) for exit in taken(channel)] == [("two", 1), ("two", 2), ("two", 3)]
    assert fleet.deliver(cores[1]) == 0
    assert fleet.deliver(most=4) == 4
    for core in cores:
        core.close()


def test_dropping_all_counts_it_as_missed(fleet):
    core = core_of(fleet, 1, 0)
    channel = Channel(fleet, EVERYTHING, EVERY_VM, 3, drop_oldest=True)
    for time in range(5):
        account(core, "hlt", time + 1)
    fleet.deliver()
    channel.drop()
    assert (channel.received, channel.missed, channel.waiting) == (5, 5, 0)
    account(core, "hlt", 9)
    fleet.deliver()
    assert [exit.time for exit in taken(channel)] == [9]
    core.close()


def test_a_channel_that_there_is_no_memory_for_says_so(fleet, monkeypatch):
    class Full:
        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        @staticmethod
        def orc_channel_new(*_: object) -> object:
            ffi.errno = 12
            return ffi.NULL

    monkeypatch.setattr("orchestra.native.channels.lib", Full())
    with pytest.raises(ResourceLimit, match="capacity=7: Cannot allocate memory: ask for fewer exits"):
        Channel(fleet, EVERYTHING, EVERY_VM, 7, drop_oldest=True)


STEP = st.one_of(
    st.tuples(st.just("exit"), st.integers(1, 3), st.sampled_from(sorted(KINDS)), st.sampled_from([0, BUS_LOCK])),
    st.tuples(st.just("deliver"), st.integers(1, 9)),
    st.tuples(st.just("take"), st.integers(0, 9)),
    st.tuples(st.just("drop")),
)


@settings(deadline=None)
@given(
    steps=st.lists(STEP, max_size=80),
    capacity=st.integers(1, 7),
    drop_oldest=st.booleans(),
    kinds=st.sets(st.sampled_from(sorted(KINDS)), min_size=1),
    vm=st.sampled_from([EVERY_VM, NO_VM, 1, 2]),
)
def test_a_channel_is_a_bounded_queue_of_what_it_wants(steps, capacity, drop_oldest, kinds, vm):
    """Against a list in Python that does the same: the same exits in the same order, and the same counts."""
    fleet = FleetCore()
    wanted = tuple(KINDS[name] for name in kinds)
    cores = {number: core_of(fleet, number, number + 1) for number in NAMES}
    channel = Channel(fleet, event_mask(wanted), vm, capacity, drop_oldest=drop_oldest)
    witness = Channel(fleet, EVERYTHING, EVERY_VM, 10_000, drop_oldest=True)  # in what order they are delivered
    model: deque[exits.Exit] = deque()
    received = missed = now = 0
    for step, *arguments in steps:
        if step == "exit":
            number, reason, flags = arguments
            now += 1
            account(cores[number], reason, now, flags=flags)
        elif step == "deliver":
            fleet.deliver(most=arguments[0])
            for exit in taken(witness):
                if not isinstance(exit, wanted) and not (exit.bus_lock and exits.BusLock in wanted):
                    continue
                if vm not in (EVERY_VM, next(number for number, name in NAMES.items() if name == exit.vm)):
                    continue
                received += 1
                if len(model) == capacity:
                    missed += 1
                    if drop_oldest:
                        model.popleft()
                if len(model) < capacity:
                    model.append(exit)
        elif step == "take":
            assert taken(channel, arguments[0]) == [model.popleft() for _ in range(min(arguments[0], len(model)))]
        else:
            missed += len(model)
            model.clear()
            channel.drop()
        assert (channel.received, channel.missed, channel.waiting) == (received, missed, len(model))
    assert taken(channel) == list(model)
    for core in cores.values():
        core.close()
    fleet.close()


# ---- batches

RECORD = st.tuples(
    st.sampled_from([*sorted(KINDS), 62, 1000]),
    st.integers(1, 3),
    st.integers(0, 9),
    st.integers(0, 7),
    st.one_of(st.none(), st.integers(0, (1 << 64) - 1)),
    st.tuples(*[st.integers(0, (1 << 64) - 1)] * 5),
    st.binary(max_size=32),
)


def raw(records: list[tuple[object, ...]]) -> bytes:
    made = []
    for index, (reason, vm, vcpu, flags, rip, args, data) in enumerate(records):
        record = build(reason, flags=flags, rip=rip, args=args, data=data)  # type: ignore[arg-type]
        record.vm, record.vcpu, record.time, record.wait = vm, vcpu, index, 2 * index
        made.append(bytes(ffi.buffer(record, RECORD_SIZE)))
    return b"".join(made)


@given(st.lists(RECORD, max_size=30))
def test_columns_say_what_the_exits_say(records):
    batch = ExitBatch(raw(records), NAMES)
    found = list(batch)
    assert len(batch) == len(found) == len(records)
    assert [batch[index] for index in range(-len(batch), len(batch))] == found * 2
    assert list(batch[1:7:2]) == found[1:7:2]
    assert [batch.vms[vm] for vm in batch.vm] == [exit.vm for exit in found]
    assert set(batch.vms.values()) == {exit.vm for exit in found}
    assert [batch.KINDS.get(kind, exits.OtherExit) for kind in batch.kind] == [type(exit) for exit in found]
    for name in ("time", "vcpu", "wait", "bus_lock", "guest_mode", "smm"):
        assert list(getattr(batch, name)) == [getattr(exit, name) for exit in found]
    rips = zip(batch.has_rip, batch.rip, strict=True)
    assert [rip if has_rip else None for has_rip, rip in rips] == [exit.rip for exit in found]
    assert all(has_rip or rip == 0 for has_rip, rip in zip(batch.has_rip, batch.rip, strict=True))
    assert batch.arguments.tolist() == [list(record[5]) for record in records]
    rows = batch.data.tolist()
    for index, (exit, record) in enumerate(zip(found, records, strict=True)):
        data = record[6]
        assert bytes(rows[index][: batch.data_size[index]]) == data
        assert not any(rows[index][len(data) :])
        assert batch.write[index] == (isinstance(exit, exits.Io | exits.Mmio) and exit.write)
        if isinstance(exit, exits.Io):
            assert (batch.address[index], batch.size[index]) == (exit.port, exit.size)
        elif isinstance(exit, exits.Mmio):
            assert (batch.address[index], batch.size[index]) == (exit.address, exit.size)


@given(st.lists(st.binary(min_size=RECORD_SIZE, max_size=RECORD_SIZE), min_size=1, max_size=5))
def test_whatever_bytes_records_have_there_are_columns(raws):
    class AnyName(dict[int, str]):
        def __missing__(self, number: int) -> str:
            return str(number)

    batch = ExitBatch(b"".join(raws), AnyName())
    assert [str(number) for number in batch.vm] == [exit.vm for exit in batch]
    columns = [name for name, value in vars(ExitBatch).items() if isinstance(value, property)]
    assert {len(getattr(batch, name)) for name in columns} == {len(raws)}
    assert max(batch.data_size) <= 32


def test_columns_are_read_only_contiguous_and_of_a_known_format(fleet):
    batch = ExitBatch(raw([("hlt", 1, 0, 0, None, (0,) * 5, b"")] * 3), NAMES)
    columns = {name: getattr(batch, name) for name, value in vars(ExitBatch).items() if isinstance(value, property)}
    assert {name: (column.format, column.shape) for name, column in columns.items()} == {
        **dict.fromkeys(["time", "rip", "wait", "address", "size"], ("Q", (3,))),
        **dict.fromkeys(["vm", "vcpu"], ("I", (3,))),
        **dict.fromkeys(["has_rip", "bus_lock", "guest_mode", "smm", "write"], ("?", (3,))),
        "kind": ("H", (3,)),
        "data_size": ("B", (3,)),
        "arguments": ("Q", (3, 5)),
        "data": ("B", (3, 32)),
    }
    assert all(column.readonly and column.c_contiguous for column in columns.values())
    assert batch.time is batch.time
    assert repr(batch) == "<ExitBatch of 3 exits of one>"


def test_numpy_takes_a_column_as_it_is():
    numpy = pytest.importorskip("numpy")
    batch = ExitBatch(raw([("hlt", 1, 0, 0, None, (0,) * 5, b"")] * 3), NAMES)
    times = numpy.frombuffer(batch.time, "u8")
    assert times.tolist() == [0, 1, 2]
    assert numpy.shares_memory(times, numpy.asarray(batch.time))


def test_an_empty_batch_has_empty_columns():
    batch = ExitBatch(b"", NAMES)
    columns = [name for name, value in vars(ExitBatch).items() if isinstance(value, property)]
    assert [len(getattr(batch, name)) for name in columns] == [0] * len(columns)
    assert (list(batch), repr(batch)) == ([], "<ExitBatch of 0 exits of nobody>")
