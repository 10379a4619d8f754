"""The core's objects as Python sees them: buckets, ring, ready lists, counters, commands and sleep."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings, strategies as st

import conftest
from orchestra.model.errors import ResourceLimit
from orchestra.model.exits import OtherExit
from orchestra.model.spec import Limit, Meter
from orchestra.native import core as core_module, ffi, lib
from orchestra.native.core import (
    BUCKETS,
    NEVER,
    REASON_NAMES,
    REASON_NUMBERS,
    RING_RECORDS,
    Bucket,
    Command,
    FleetCore,
    VcpuCore,
    install_signal,
    monotonic_ns,
    reason_name,
)
from orchestra.native.records import BUS_LOCK, EVENT_BUS_LOCK, build, event_mask, unpack

SECOND = 1_000_000_000
EVERYTHING = (1 << 64) - 1
ID = 8  # of a record's unpacked fields


@pytest.fixture
def fleet() -> Iterator[FleetCore]:
    made = FleetCore()
    yield made
    made.close()


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    made = Bucket()
    yield made
    made.close()


@pytest.fixture
def vcpu(fleet: FleetCore, bucket: Bucket) -> Iterator[VcpuCore]:
    made = VcpuCore(fleet, 7)  # gone before the bucket that it may hold tickets of
    yield made
    made.close()


def account(vcpu: VcpuCore, reason: str | int = "hlt", now: int = 1, flags: int = 0, **more: object) -> int:
    return int(lib.orc_vcpu_account(vcpu.handle, build(reason, flags=flags, **more), now))  # type: ignore[arg-type]


def drained(fleet: FleetCore) -> list[tuple[int, ...]]:
    return [unpack(record) for record in conftest.drained(fleet)]


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


# ---- counting


def test_exits_are_counted_by_the_kernels_name(vcpu):
    for reason in ("io", "io", "hlt"):
        account(vcpu, reason)
    assert vcpu.counters(1).exits == {"io": 2, "hlt": 1}


def test_reasons_without_a_name_are_counted_by_number_and_the_last_counter_takes_the_rest(vcpu):
    for number in (13, 62, 63, 64, 0xFFFF):
        account(vcpu, number)
    assert vcpu.counters(1).exits == {"exit_13": 1, "exit_62": 1, "other": 3}


@pytest.mark.parametrize(
    ("reason", "flags", "locks"),
    [
        ("x86_bus_lock", BUS_LOCK, 1),
        ("x86_bus_lock", 0, 0),
        ("io", BUS_LOCK, 1),
        ("mmio", BUS_LOCK, 1),
        ("unknown", BUS_LOCK, 1),
        (0xFFFF, BUS_LOCK | 1 | 4, 1),
        ("io", 1 | 4, 0),
    ],
)
def test_bus_lock_is_counted_once_by_the_flag_and_by_nothing_else(vcpu, reason, flags, locks):
    account(vcpu, reason, flags=flags)
    counters = vcpu.counters(1)
    assert counters.bus_locks == locks
    assert sum(counters.exits.values()) == 1


def test_a_look_tells_what_was_new_since_the_last_one_by_reason(vcpu):
    for reason in ("io", "hlt", 62, 0xFFFF, "io"):
        account(vcpu, reason, flags=BUS_LOCK)
    exits, *sums = vcpu.look(1)
    assert {reason_name(number): count for number, count in exits.items()} == {
        "io": 2,
        "hlt": 1,
        "exit_62": 1,
        "other": 1,
    }
    assert {reason_name(number): count for number, count in exits.items()} == vcpu.counters(1).exits
    assert sums == [5, [0] * len(BUCKETS), 0]
    account(vcpu, "hlt")
    assert vcpu.look(2) == ({REASON_NUMBERS["hlt"]: 1}, 5, [0] * len(BUCKETS), 0)
    assert vcpu.look(3) == ({}, 5, [0] * len(BUCKETS), 0)


def test_new_vcpu_has_counted_nothing(vcpu):
    counters = vcpu.counters(1)
    assert (counters.exits, counters.throttled_since) == ({}, None)
    assert not any(getattr(counters, name) for name in ("bus_locks", "waits", "released", "missed", "kicks"))


# ---- told exits


def test_nothing_is_told_unless_asked_for(fleet, vcpu):
    account(vcpu)
    assert drained(fleet) == []


def test_only_reasons_of_the_mask_are_told_with_the_vcpus_id_and_the_time(fleet, vcpu):
    vcpu.subscribe(1 << REASON_NUMBERS["io"])
    account(vcpu, "hlt", now=5)
    account(vcpu, "io", now=6, args=(0xE9, 1, 1, 1))
    (record,) = drained(fleet)
    assert (record[0], record[3], record[ID]) == (6, 0xE9, 7)


def test_any_exit_with_a_bus_lock_is_told_to_who_asked_for_bus_locks(fleet, vcpu):
    vcpu.subscribe(EVENT_BUS_LOCK)
    account(vcpu, "mmio", flags=BUS_LOCK)
    account(vcpu, "mmio")
    account(vcpu, 63)  # its counter's number is the bit that asks for bus locks
    assert [record[9] for record in drained(fleet)] == [REASON_NUMBERS["mmio"]]


@pytest.mark.parametrize("number", [13, 62, 63, 64, 0xFFFF])
def test_numbers_without_a_type_are_told_to_who_asked_for_the_others(fleet, vcpu, number):
    vcpu.subscribe(event_mask((OtherExit,)))
    account(vcpu, number)
    account(vcpu, "hlt")
    assert [record[9] for record in drained(fleet)] == [number]


def test_more_than_the_ring_holds_is_missed_and_counted_all_the_same(fleet, vcpu):
    vcpu.subscribe(EVERYTHING)
    for i in range(RING_RECORDS + 5):
        account(vcpu, "hlt", now=i + 1)
    assert [record[0] for record in drained(fleet)] == list(range(1, RING_RECORDS + 1))
    counters = vcpu.counters(1)
    assert (counters.missed, counters.exits["hlt"]) == (5, RING_RECORDS + 5)


def test_ring_takes_records_again_after_it_was_drained(fleet, vcpu):
    vcpu.subscribe(EVERYTHING)
    for round in range(3):
        for i in range(RING_RECORDS - 1):
            account(vcpu, now=round * RING_RECORDS + i + 1)
        assert len(drained(fleet)) == RING_RECORDS - 1
    assert vcpu.counters(1).missed == 0


def test_records_of_several_vcpus_keep_each_ones_order(fleet):
    vcpus = [VcpuCore(fleet, id) for id in range(5)]
    for vcpu in vcpus:
        vcpu.subscribe(EVERYTHING)
    for time in range(1, 401):
        for vcpu in vcpus:
            account(vcpu, now=time)
    found = drained(fleet)
    for id in range(5):
        assert [record[0] for record in found if record[ID] == id] == list(range(1, 401))
    for vcpu in vcpus:
        vcpu.close()


def test_wait_is_told_with_the_exit(fleet, vcpu, bucket):
    bucket.set(Limit(rate=1, burst=1), 0)
    vcpu.set_bucket(Meter.EXITS, 2, bucket)
    vcpu.subscribe(EVERYTHING)
    turn = account(vcpu, now=10)
    ((_, _, wait, *_),) = drained(fleet)
    assert wait == turn - 10 == pytest.approx(SECOND, abs=1e5)


# ---- the eventfd and the lists


def test_eventfd_is_written_once_and_only_when_the_reader_sleeps(fleet, vcpu):
    vcpu.subscribe(EVERYTHING)
    account(vcpu)
    assert not readable(fleet.eventfd)
    assert not fleet.may_sleep()  # there is something
    drained(fleet)
    assert fleet.may_sleep()
    account(vcpu)
    account(vcpu)
    assert readable(fleet.eventfd)
    assert int.from_bytes(os.read(fleet.eventfd, 8), "little") == 1


def test_reader_may_sleep_again_after_an_old_wake_up(fleet, vcpu):
    vcpu.subscribe(EVERYTHING)
    assert fleet.may_sleep()
    account(vcpu)
    drained(fleet)
    assert fleet.may_sleep()
    assert not readable(fleet.eventfd)  # nothing is left of it


def test_active_lists_each_vcpu_once_since_the_last_look(fleet):
    vcpus = [VcpuCore(fleet, id) for id in range(3)]
    for vcpu in (vcpus[2], vcpus[0], vcpus[2]):
        account(vcpu)
    assert sorted(fleet.active()) == [0, 2]
    assert fleet.active() == []
    account(vcpus[1])
    assert fleet.active() == [1]
    for vcpu in vcpus:
        vcpu.close()


def test_active_lists_more_vcpus_than_one_batch(fleet):
    vcpus = [VcpuCore(fleet, id) for id in range(FleetCore.BATCH + 3)]
    for vcpu in vcpus:
        account(vcpu)
    assert sorted(fleet.active()) == list(range(FleetCore.BATCH + 3))
    for vcpu in vcpus:
        vcpu.close()


def test_a_look_ends_although_vcpus_become_active_again_meanwhile(fleet, monkeypatch):
    vcpus = [VcpuCore(fleet, id) for id in range(3)]
    for vcpu in vcpus:
        account(vcpu)
    take, taken = lib.orc_fleet_active, []

    class Busy:
        """Whoever is told makes an exit before the next question."""

        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        def orc_fleet_active(self, *args: object) -> int:
            taken.append(n := take(*args))
            assert len(taken) < 10, "the vCPUs decide when it ends"
            for vcpu in vcpus:
                account(vcpu)
            return int(n)

    with monkeypatch.context() as patch:
        patch.setattr(core_module, "lib", Busy())
        assert sorted(fleet.active()) == [0, 1, 2]
    assert sorted(fleet.active()) == [0, 1, 2]
    for vcpu in vcpus:
        vcpu.close()


def test_records_of_one_vcpu_can_be_drained_alone(fleet):
    vcpus = [VcpuCore(fleet, id) for id in range(3)]
    for vcpu in vcpus:
        vcpu.subscribe(EVERYTHING)
        for time in (1, 2, 3):
            account(vcpu, now=time)
    records = conftest.drained(fleet, vcpus[1])
    assert [(record.id, record.time) for record in records] == [(1, 1), (1, 2), (1, 3)]
    assert not conftest.drained(fleet, vcpus[1])
    assert sorted(record[ID] for record in drained(fleet)) == [0, 0, 0, 2, 2, 2]
    for vcpu in vcpus:
        vcpu.close()


@pytest.mark.parametrize("dying", range(3))
def test_vcpu_that_goes_takes_its_records_along_and_nobody_elses(fleet, dying):
    vcpus = [VcpuCore(fleet, id) for id in range(3)]
    for vcpu in vcpus:
        vcpu.subscribe(EVERYTHING)
        account(vcpu)
    vcpus.pop(dying).close()
    left = sorted({0, 1, 2} - {dying})
    assert sorted(fleet.active()) == left
    assert sorted(record[ID] for record in drained(fleet)) == left
    for vcpu in vcpus:
        vcpu.close()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["tell", "drain", "active", "renew"]), st.integers(0, 3)), max_size=40))
def test_in_any_order_of_work_every_told_record_comes_once(steps):
    fleet = FleetCore()
    vcpus = {slot: VcpuCore(fleet, slot) for slot in range(4)}
    waiting = dict.fromkeys(range(4), 0)
    for vcpu in vcpus.values():
        vcpu.subscribe(EVERYTHING)
    for step, slot in [*steps, ("drain", 0)]:
        if step == "tell":
            account(vcpus[slot])
            waiting[slot] += 1
        elif step == "renew":
            vcpus[slot].close()
            vcpus[slot] = VcpuCore(fleet, slot)
            vcpus[slot].subscribe(EVERYTHING)
            waiting[slot] = 0
        elif step == "active":
            assert set(fleet.active()) <= set(vcpus)
        else:
            ids = [record[ID] for record in drained(fleet)]
            assert {slot: ids.count(slot) for slot in vcpus} == waiting
            waiting = dict.fromkeys(range(4), 0)
    for vcpu in vcpus.values():
        vcpu.close()
    fleet.close()


# ---- buckets and turns


def test_within_the_burst_nobody_waits_and_beyond_it_each_by_one_more(vcpu, bucket):
    bucket.set(Limit(rate=10, burst=3), 0)
    vcpu.set_bucket(Meter.EXITS, 0, bucket)
    turns = [account(vcpu, now=SECOND) for _ in range(5)]
    assert turns[:2] == [NEVER, NEVER]
    assert turns[2:] == pytest.approx([SECOND * 1.1, SECOND * 1.2, SECOND * 1.3], abs=1e5)


def test_waiters_of_one_bucket_are_served_in_order(fleet, bucket):
    bucket.set(Limit(rate=10, burst=1), 0)
    vcpus = [VcpuCore(fleet, id) for id in range(4)]
    for vcpu in vcpus:
        vcpu.set_bucket(Meter.BUS_LOCKS, 0, bucket)
    turns = [account(vcpu, "x86_bus_lock", flags=BUS_LOCK) for vcpu in vcpus]
    assert turns == pytest.approx([SECOND * i // 10 for i in (1, 2, 3, 4)], abs=1e5)
    for vcpu in vcpus:
        vcpu.close()


def test_turn_follows_a_changed_limit(fleet, vcpu, bucket):
    bucket.set(Limit(rate=1, burst=1, max_delay=None), 0)
    vcpu.set_bucket(Meter.EXITS, 1, bucket)
    account(vcpu, now=0)
    assert lib.orc_vcpu_turn(vcpu.handle) == pytest.approx(SECOND, abs=1e5)
    bucket.set(Limit(rate=2, burst=1, max_delay=None), SECOND // 2)
    assert lib.orc_vcpu_turn(vcpu.handle) == pytest.approx(SECOND * 3 // 4, abs=1e5)
    bucket.set(None, SECOND // 2)
    assert lib.orc_vcpu_turn(vcpu.handle) == NEVER


def test_max_delay_bounds_one_wait_and_who_goes_by_it_is_released(vcpu, bucket):
    bucket.set(Limit(rate=0.001, burst=1, max_delay=2), 0)
    vcpu.set_bucket(Meter.EXITS, 3, bucket)
    turn = account(vcpu, now=1)
    assert turn == 1 + 2 * SECOND
    lib.orc_vcpu_wait_begin(vcpu.handle, 1)
    lib.orc_vcpu_wait_end(vcpu.handle, turn, True)
    assert vcpu.counters(turn).released == 1


def test_who_waits_for_its_turn_is_not_released(vcpu, bucket):
    bucket.set(Limit(rate=1, burst=1, max_delay=2), 0)
    vcpu.set_bucket(Meter.EXITS, 3, bucket)
    turn = account(vcpu, now=1)
    lib.orc_vcpu_wait_begin(vcpu.handle, 1)
    lib.orc_vcpu_wait_end(vcpu.handle, turn, True)
    counters = vcpu.counters(turn)
    assert (counters.released, counters.waits, counters.throttled) == (0, 1, turn - 1)
    assert lib.orc_vcpu_turn(vcpu.handle) == NEVER


def test_wait_in_progress_counts_up_to_now(vcpu):
    lib.orc_vcpu_wait_begin(vcpu.handle, 100)
    counters = vcpu.counters(150)
    assert (counters.throttled, counters.throttled_since, counters.waits) == (50, 100, 1)
    assert vcpu.look(160) == ({}, 0, [60] + [0] * (len(BUCKETS) - 1), 0)
    lib.orc_vcpu_wait_end(vcpu.handle, 170, False)
    counters = vcpu.counters(1000)
    assert (counters.throttled, counters.throttled_since) == (70, None)


def test_interrupted_wait_leaves_the_turn_as_it_was(vcpu, bucket):
    bucket.set(Limit(rate=1, burst=1), 0)
    vcpu.set_bucket(Meter.EXITS, 0, bucket)
    turn = account(vcpu, now=1)
    lib.orc_vcpu_wait_begin(vcpu.handle, 1)
    lib.orc_vcpu_wait_end(vcpu.handle, 5, False)
    assert lib.orc_vcpu_turn(vcpu.handle) == turn


def test_setting_the_same_limit_again_gives_no_new_burst(vcpu, bucket):
    limit = Limit(rate=1, burst=2, max_delay=None)
    bucket.set(limit, 0)
    vcpu.set_bucket(Meter.EXITS, 0, bucket)
    assert account(vcpu, now=0) == NEVER
    bucket.set(Limit(rate=1, burst=2, max_delay=None), 0)
    assert bucket.limit == limit
    assert account(vcpu, now=0) == pytest.approx(SECOND, abs=1e5)


@given(
    st.floats(0.1, 1e6),
    st.floats(1, 1000),
    st.lists(st.integers(0, 10 * SECOND), min_size=1, max_size=60),
)
def test_one_vcpu_keeps_to_burst_and_rate_in_every_window(rate, burst, pauses):
    fleet, bucket = FleetCore(), Bucket()
    vcpu = VcpuCore(fleet, 1)
    bucket.set(Limit(rate=rate, burst=burst, max_delay=None), 0)
    vcpu.set_bucket(Meter.EXITS, 0, bucket)
    now, times = 1, []
    for pause in pauses:
        now += pause
        times.append(now)
        now = max(now, account(vcpu, now=now))
    for first in range(len(times)):
        for last in range(first, len(times)):
            allowed = burst + rate * (times[last] - times[first]) / 1e9
            assert last - first + 1 <= allowed * (1 + 1e-6) + 1e-3
    vcpu.close()
    bucket.close()
    fleet.close()


# Without a max_delay, which lets go early.
LIMITS = st.builds(Limit, rate=st.floats(1e-3, 1e4), burst=st.floats(1, 4), max_delay=st.none())
PAUSES = (0, 0, 0, 1, SECOND // 100, 10 * SECOND)
STEPS = ("ask", "ask", "ask", "ask", "look", "look at all", "none", "set", "off and on", "off and on")
CHANGES = st.lists(st.tuples(st.integers(0, len(PAUSES) - 1), st.sampled_from(STEPS), LIMITS), min_size=20, max_size=80)


class Waiters:
    """What `vcpus` of one bucket do, as the core has them do it: each asks, waits for its turn, and goes."""

    def __init__(self, vcpus: int) -> None:
        self.fleet, self.bucket = FleetCore(), Bucket()
        self.vcpus = [VcpuCore(self.fleet, id) for id in range(vcpus)]
        for vcpu in self.vcpus:
            vcpu.set_bucket(Meter.EXITS, 0, self.bucket)
        self.waiting: list[VcpuCore] = []  # in the order in which they asked
        self.went: list[tuple[int, float]] = []  # when somebody went under a limit, and its burst

    def ask(self, index: int, now: int) -> None:
        vcpu = self.vcpus[index % len(self.vcpus)]
        if vcpu in self.waiting:
            return
        if account(vcpu, now=now) != NEVER:
            self.waiting.append(vcpu)
        elif self.bucket.limit is not None:
            self.went.append((now, self.bucket.limit.tokens))

    def turns(self) -> list[int]:
        return [int(lib.orc_vcpu_turn(vcpu.handle)) for vcpu in self.waiting]

    def look(self, index: int, now: int) -> None:
        """One that waits goes, if its turn has come."""
        if not self.waiting:
            return
        vcpu = self.waiting[index % len(self.waiting)]
        if lib.orc_vcpu_turn(vcpu.handle) <= now:
            self.waiting.remove(vcpu)
            lib.orc_vcpu_wait_begin(vcpu.handle, now)
            lib.orc_vcpu_wait_end(vcpu.handle, now, True)
            if self.bucket.limit is not None:
                self.went.append((now, self.bucket.limit.tokens))

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.bucket.close()
        self.fleet.close()


@given(st.integers(1, 4), LIMITS, CHANGES)
def test_whatever_limits_come_and_go_no_window_has_more_than_burst_and_rate_and_nobody_overtakes(vcpus, first, changes):
    waiters = Waiters(vcpus)
    now, rate = 1, first.rate
    waiters.bucket.set(first, now)
    made = [(now, 0.0)]  # tokens that the rates in force made so far; the last one goes on where there is none
    for index, what, limit in changes:
        now += PAUSES[index]
        made.append((now, made[-1][1] + rate * (now - made[-1][0]) / 1e9))
        if what == "ask":
            waiters.ask(index, now)
        elif what == "look":
            waiters.look(index, now)
        elif what == "look at all":
            for _ in range(vcpus):
                waiters.look(0, now)
        elif what == "none":
            waiters.bucket.set(None, now)
        elif what == "off and on":
            same = waiters.bucket.limit
            waiters.bucket.set(None, now)
            waiters.bucket.set(same, now)
        else:
            waiters.bucket.set(limit, now)
            rate = limit.rate
        turns = [max(turn, now) for turn in waiters.turns()]
        assert turns == sorted(turns), "somebody who asked later goes first"
    tokens = dict(made)
    # Each of several may look late and then go with the next; and one that waits on may go earlier by one, for one that
    # went while there was no limit.
    early = vcpus - 1
    for index, (begun, burst) in enumerate(waiters.went):
        for count, (ended, _) in enumerate(waiters.went[index:], 1):
            assert count <= (burst + tokens[ended] - tokens[begun]) * (1 + 1e-6) + 1e-3 + early
    waiters.close()


@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0, 0.02), st.booleans()), min_size=1, max_size=45),
    st.floats(1e-3, 1e3),
)
def test_no_part_of_a_token_is_lost_however_often_the_rate_changes(changes, first):
    """What a slow limit makes between two changes is less than the core's smallest unit of a token."""
    waiters = Waiters(1)
    limits = [first, *(rate for rate, _, _ in changes)]
    waiters.bucket.set(Limit(rate=first, burst=1, max_delay=None), 1)
    waiters.ask(0, 1)
    now, made = 1, 0.0
    for before, (rate, part, off) in zip(limits, changes, strict=False):
        pause = round(part / before * 1e9)
        now, made = now + pause, made + before * pause / 1e9
        if off:
            waiters.bucket.set(None, now)
        waiters.bucket.set(Limit(rate=rate, burst=1, max_delay=None), now)
    (turn,) = waiters.turns()
    assert turn == pytest.approx(now + (1 - made) / limits[-1] * 1e9, abs=2 + 1e-7 / limits[-1] * 1e9)
    waiters.close()


# ---- commands, sleep and wake


def test_commands_are_set_and_cleared_one_by_one(vcpu):
    vcpu.command(set=Command.PAUSE)
    vcpu.command(set=Command.STOP)
    assert vcpu.commands() == Command.PAUSE | Command.STOP
    vcpu.command(clear=Command.PAUSE)
    assert vcpu.commands() == Command.STOP


@pytest.mark.parametrize(
    "change",
    [lambda v: v.wake(), lambda v: v.command(set=Command.STOP), lambda v: v.command(clear=Command.PAUSE)],
    ids=["wake", "set", "clear"],
)
def test_whoever_sleeps_is_woken(vcpu, change: Callable[[VcpuCore], None]):
    seen = vcpu.wakes()
    begun, woken = threading.Event(), threading.Event()

    def run() -> None:
        begun.set()
        lib.orc_vcpu_sleep(vcpu.handle, seen)
        woken.set()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait(10)
    assert not woken.is_set()
    change(vcpu)
    thread.join(10)
    assert woken.is_set()


def test_wake_up_before_the_sleep_is_not_lost(vcpu):
    seen = vcpu.wakes()
    vcpu.wake()
    lib.orc_vcpu_sleep(vcpu.handle, seen)  # returns at once
    assert vcpu.wakes() == seen + 1


def test_a_wake_up_that_comes_after_the_end_does_nothing(fleet):
    vcpu = VcpuCore(fleet, 1)
    assert vcpu.wake()
    vcpu.close()
    assert not vcpu.wake()


def test_wake_ups_may_come_from_other_threads_as_it_is_closed(fleet):
    for id in range(200):
        vcpu = VcpuCore(fleet, id)
        threads = [threading.Thread(target=lambda v=vcpu: [v.wake() for _ in range(20)]) for _ in range(2)]
        for thread in threads:
            thread.start()
        vcpu.close()
        for thread in threads:
            thread.join()


def test_changed_limit_wakes_those_that_wait_for_a_turn_and_no_others(fleet):
    waiting, idle = VcpuCore(fleet, 1), VcpuCore(fleet, 2)
    lib.orc_vcpu_wait_begin(waiting.handle, 1)
    before = waiting.wakes(), idle.wakes()
    fleet.limits_changed()
    assert (waiting.wakes(), idle.wakes()) == (before[0] + 1, before[1])
    lib.orc_vcpu_wait_end(waiting.handle, 2, False)
    fleet.limits_changed()
    assert waiting.wakes() == before[0] + 1
    waiting.close()
    idle.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_waiters_may_leave_in_any_order(fleet, order):
    vcpus = [VcpuCore(fleet, id) for id in range(3)]
    for vcpu in vcpus:
        lib.orc_vcpu_wait_begin(vcpu.handle, 1)
    left = set(range(3))
    for index in order:
        lib.orc_vcpu_wait_end(vcpus[index].handle, 2, False)
        left.discard(index)
        before = [vcpu.wakes() for vcpu in vcpus]
        fleet.limits_changed()
        assert {i for i in range(3) if vcpus[i].wakes() != before[i]} == left
    for vcpu in vcpus:
        vcpu.close()


# ---- the rest


def test_names_and_numbers_of_reasons_belong_together():
    assert {REASON_NUMBERS[name]: name for name in REASON_NUMBERS} == REASON_NAMES
    # include/uapi/linux/kvm.h
    assert {name: REASON_NUMBERS[name] for name in ("unknown", "io", "hlt", "mmio", "x86_bus_lock")} == {
        "unknown": 0,
        "io": 2,
        "hlt": 5,
        "mmio": 6,
        "x86_bus_lock": 33,
    }


def test_clock_does_not_run_backwards():
    times = [monotonic_ns() for _ in range(100)]
    assert times == sorted(times)
    assert times[0] > 0


def test_the_kicks_signal_may_be_installed_again_and_again():
    install_signal()
    install_signal()


@pytest.mark.parametrize(("number", "message"), [(errno.EBUSY, "another handler"), (errno.EPERM, "seccomp")])
def test_a_kick_that_cant_be_is_said_by_name(monkeypatch, number, message):
    class Refuses:
        orc_signal_number = staticmethod(lib.orc_signal_number)
        orc_signal_install = staticmethod(lambda: -number)

    monkeypatch.setattr(core_module, "lib", Refuses())
    with pytest.raises(ResourceLimit, match=f"SIGURG.*{message}") as caught:
        install_signal()
    assert caught.value.errno == number


@pytest.mark.parametrize(
    ("handler", "problem"),
    [("lambda *_: None", "SIGURG has another handler"), ("signal.SIG_IGN", ""), ("signal.SIG_DFL", "")],
)
def test_the_kicks_signal_is_taken_from_nobody_who_handles_it(handler, problem):
    program = f"""
import signal
from orchestra.native.core import install_signal

signal.signal(signal.SIGURG, {handler})
install_signal()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == (not problem)
    assert problem in done.stderr


def test_a_guest_that_needs_an_interpreter_that_is_gone_does_not_keep_its_program_from_ending():
    """The "guest" waits in getchar() until the C library's end of the program, which comes after the interpreter's."""
    program = """
import ctypes, os
from orchestra.native import ffi
from orchestra.native.core import FleetCore, Runner, VcpuCore

libc = ctypes.CDLL(None)

def at_exit(function, argument):  # the last one first
    assert not libc.__cxa_atexit(function, ctypes.c_void_p(argument), None)

reading, writing = os.pipe()
os.dup2(reading, 0)
at_exit(libc.usleep, 100_000)
at_exit(libc.close, writing)
run = ffi.cast("enum orc_why (*)(orc_vcpu *)", ctypes.cast(libc.getchar, ctypes.c_void_p).value)
core = VcpuCore(FleetCore(), 1)
runner = Runner(core, "guest", 0, run, lambda why: None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_close_gives_the_eventfd_and_the_ring_back():
    def held() -> tuple[list[str], int]:
        with open("/proc/self/maps") as maps:
            return sorted(os.listdir("/proc/self/fd")), sum(1 for _ in maps)

    def life() -> None:
        fleet = FleetCore()
        vcpus = [VcpuCore(fleet, id) for id in range(10)]
        for vcpu in vcpus:
            vcpu.close()
            assert vcpu.handle == ffi.NULL
        fleet.close()
        assert fleet.handle == ffi.NULL

    life()
    fds, maps = held()
    for _ in range(20):
        life()
    after_fds, after_maps = held()
    assert after_fds == fds
    assert after_maps <= maps + 5  # 200 rings would be 200 mappings


def test_no_descriptor_left_for_the_eventfd_says_which_limit_to_raise(monkeypatch):
    class NoFds:
        orc_fleet_new = staticmethod(lambda: ffi.NULL)

    monkeypatch.setattr(core_module, "lib", NoFds)
    ffi.errno = errno.EMFILE
    with pytest.raises(ResourceLimit, match="ulimit -n") as caught:
        FleetCore()
    assert caught.value.errno == errno.EMFILE


def test_no_memory_for_a_ring_says_which_limit_to_raise(vcpu, monkeypatch):
    class NoMaps:
        orc_vcpu_subscribe = staticmethod(lambda *_: -errno.ENOMEM)

    with monkeypatch.context() as patch:
        patch.setattr(core_module, "lib", NoMaps)
        with pytest.raises(ResourceLimit, match=r"vm\.max_map_count") as caught:
            vcpu.subscribe(EVERYTHING)
    assert caught.value.errno == errno.ENOMEM


def address_space() -> int:
    """Bytes that this process has mapped."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * 4096


def test_ring_is_mapped_for_the_first_who_wants_to_be_told_and_goes_with_its_vcpu(fleet):
    ring, many = RING_RECORDS * 128, 50
    vcpus = [VcpuCore(fleet, id) for id in range(many)]
    before = address_space()
    for vcpu in vcpus:
        account(vcpu)
        vcpu.subscribe(0)
    assert address_space() - before < many * ring // 2
    for vcpu in vcpus:
        vcpu.subscribe(EVERYTHING)
        vcpu.subscribe(0)
        vcpu.subscribe(EVERYTHING)
    assert many * ring <= address_space() - before < many * ring * 3 // 2
    for vcpu in vcpus:
        vcpu.close()
    assert address_space() - before < many * ring // 2
