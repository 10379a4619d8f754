"""Pages that guests write: how many each reading of a log tells, who is asked and when, and where the figures go."""

from __future__ import annotations

import sqlite3
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, strategies as st

import orchestra as orc
from conftest import Stage, blank, play, word
from orchestra.backend.kvm.dirty import DirtyLog, read_logs
from orchestra.backend.scripted import hlt
from orchestra.fleet import dirty
from orchestra.journal import Journal, read_journal, schema
from orchestra.journal.upgrade import upgrade
from orchestra.machine.devices.requests import Request
from orchestra.model.memory import PAGE
from orchestra.native import ffi, lib
from orchestra.policy import HostFacts, VmFacts

FIRST = 0x10000
PARAMETERS = 0x8000
"""How many pages, the first, and whether to ask: see guests/pages_32.asm."""
PORT = range(0x500, 0x501)
SECOND = 1_000_000_000
NEVER = 10**15


class Told:
    """A policy that remembers what it was told of the VM "guest"."""

    name = "told"

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.facts: list[VmFacts] = []
        self.host = HostFacts()
        self.ticks = 0
        self._more = trio.Event()

    def decide(self, facts: orc.Facts) -> Iterable[orc.Action]:
        self.facts += [vm for vm in facts.vms.values() if vm.name == "guest"]
        self.host = facts.host
        self.ticks += 1
        self._more.set()
        self._more = trio.Event()
        return ()

    async def until(self, enough: Callable[[], object]) -> None:
        with trio.fail_after(20):
            while not enough():
                await self._more.wait()

    def pages(self) -> list[int]:
        return [vm.dirty_pages for vm in self.facts if vm.dirty_pages is not None]


@pytest.fixture
def kvm(nothing_left: Callable[[], None]) -> Stage:
    return Stage("kvm")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs are read every 10 ms."""
    monkeypatch.setattr(dirty, "EVERY", 10_000_000)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs are not read but by the test, and at the end."""
    monkeypatch.setattr(dirty, "EVERY", NEVER)


def writer(stage: Stage, name: str = "guest", **more: object) -> orc.VmSpec:
    return stage.spec("pages_32", name, mode=32, **{"log_dirty": True, "memory": 4 * orc.MiB, **more})


def write(vm: orc.Vm, pages: int, first: int = FIRST, asks: bool = False) -> None:
    """Have it write so many pages from now on."""
    vm.write_memory(PARAMETERS, struct.pack("<III", pages, first, asks))


class Rounds:
    """A guest that does one round when it is told to. `before`: pages counted before the first."""

    def __init__(self, vm: orc.Vm, requests: AsyncIterator[Request]) -> None:
        self._vm, self._requests = vm, requests
        self._request: Request

    async def begin(self) -> None:
        """It has read its code and its parameters. Where KVM maps what is read for the first time as writable, it takes
        these pages for written."""
        write(self._vm, 0, asks=True)
        self._request = await anext(self._requests)
        read(self._vm)
        self.before = self._vm.statistics().dirty_pages or 0
        assert self.before <= 2

    async def one(self, pages: int, first: int = FIRST) -> None:
        """Have these pages written once; returns when they are."""
        write(self._vm, pages, first, asks=True)
        self._request.answer()
        self._request = await anext(self._requests)

    def pages(self) -> int:
        """Counted since."""
        return (self._vm.statistics().dirty_pages or 0) - self.before


@asynccontextmanager
async def in_rounds(vm: orc.Vm) -> AsyncIterator[Rounds]:
    async with vm.requests(ports=PORT) as requests:
        with trio.fail_after(20):
            rounds = Rounds(vm, aiter(requests))
            await rounds.begin()
            yield rounds


def logged(vm: orc.Vm) -> bool:
    """The kernel logs its memory, or will in the run that it waits for."""
    guest = vm._control.guest
    if guest.dirty is None or vm.outcome is not None:
        return False
    return vm.desired.logs_dirty(vm.spec) if guest.life.has_ended else guest.dirty.on


def read(vm: orc.Vm) -> int:
    """Read its log now; how many pages that told."""
    log = vm._control.guest.dirty
    before = log.sums()[0]
    assert read_logs([log]) is None
    return log.sums()[0] - before


# ---- a reading


@pytest.mark.kvm
async def test_a_reading_tells_exactly_the_pages_written_since_the_last(kvm, by_hand):
    async with kvm.open() as fleet, in_rounds(await fleet.launch(writer(kvm))) as rounds:
        vm = fleet.vm("guest")
        assert read(vm) == 0
        await rounds.one(37)
        assert read(vm) == 37
        assert read(vm) == 0
        for _ in range(3):
            await rounds.one(5)
        assert read(vm) == 5  # once in a reading, however often it was written
        await rounds.one(5)
        await rounds.one(10, FIRST + 3 * PAGE)
        assert read(vm) == 13  # the union
        assert rounds.pages() == 37 + 5 + 13
        await rounds.one(2)
    assert rounds.pages() == 37 + 5 + 13 + 2  # what was written last counts as well


@pytest.mark.kvm
@pytest.mark.parametrize("pages", [64, 65, 127, 128, 129])
async def test_every_page_of_a_memory_of_any_size_is_told_to_the_last(kvm, by_hand, pages):
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm, memory=pages * PAGE))
        async with in_rounds(vm) as rounds:
            await rounds.one(pages - FIRST // PAGE)  # over its tables as well, which it has read
            assert read(vm) == pages - FIRST // PAGE


@pytest.mark.kvm
async def test_memory_on_both_sides_of_the_hole_and_regions_are_told_together(kvm, by_hand):
    extra = orc.MemoryRegion(0xD0000000, 8 * PAGE)
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm, memory=3 * orc.GiB + 64 * PAGE, regions=[extra]))
        async with in_rounds(vm) as rounds:
            await rounds.one(3, 0xBF000000)
            await rounds.one(8, extra.address)
            assert read(vm) == 11
            assert [slot.log_dirty for slot in vm._control.guest.memory.regions] == [True] * 3


@pytest.mark.kvm
async def test_what_the_guest_may_not_write_is_not_logged_and_costs_nothing(kvm):
    regions = [orc.MemoryRegion(0x400000, 16 * PAGE, readonly=True), orc.MemoryRegion(0x500000, 16 * PAGE)]
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm, regions=regions))
        assert [slot.log_dirty for slot in vm._control.guest.memory.regions] == [True, False, True]
        async with in_rounds(vm) as rounds:
            await rounds.one(4, 0x400000)
            await rounds.one(4, 0x500000)
            await vm.log_dirty(False)
            await vm.log_dirty(True)
            await rounds.one(3, 0x400000)
            await rounds.one(2, 0x500000)
    assert rounds.pages() == 4 + 2
    assert vm.statistics().exits["mmio"] >= 4 + 3


@pytest.mark.kvm
async def test_one_region_may_be_logged_alone(kvm):
    region = orc.MemoryRegion(0x400000, 16 * PAGE, log_dirty=True)
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm, log_dirty=False, regions=[region]))
        assert logged(vm)
        async with in_rounds(vm) as rounds:
            await rounds.one(9)
            await rounds.one(5, region.address)
    assert vm.statistics().dirty_pages == 5  # its code is not in it


@given(st.lists(st.one_of(st.just(0), st.integers(0, 2**64 - 1)), max_size=300))
def test_ones_are_counted_as_python_does(words):
    bitmap = ffi.new("uint64_t[]", words or [0])
    assert lib.orc_dirty_ones(bitmap, len(words)) == sum(word.bit_count() for word in words)


# ---- on and off


@pytest.mark.kvm
async def test_logging_goes_on_and_off_while_it_runs(kvm, quick):
    told = Told()
    async with kvm.open(policies=[told]) as fleet:
        vm = await fleet.launch(writer(kvm, log_dirty=False))
        write(vm, 20)
        await told.until(lambda: len(told.facts) > 3)
        assert not logged(vm)
        assert told.pages() == []
        assert vm.statistics().dirty_pages is None  # not 0
        await vm.log_dirty()
        assert logged(vm)
        await told.until(lambda: told.pages().count(20) > 2)
        assert told.facts[-1].dirty_rate > 0
        await vm.log_dirty(False)
        assert not logged(vm)
        ended = vm.statistics().dirty_pages
        assert ended >= 60
        ticks = told.ticks
        await told.until(lambda: told.ticks > ticks + 1)  # what was told at the end of it is taken along
        told.facts.clear()
        await told.until(lambda: len(told.facts) > 5)
        assert {(vm.dirty_pages, vm.dirty_rate) for vm in told.facts} == {(None, None)}
        assert vm.statistics().dirty_pages == ended
        await vm.log_dirty(True)
        await told.until(lambda: 20 in told.pages())


class Fails:
    """A device that ends its VM."""

    def read(self, offset: int, size: int) -> int:
        raise AssertionError("the guest only writes")

    def write(self, offset: int, size: int, value: int) -> None:
        raise ValueError("so that it is restarted")


@pytest.mark.kvm
async def test_a_vm_that_is_restarted_starts_anew_and_stays_logged(kvm, by_hand):
    restart = orc.Restart("on-failure", backoff=0.001, most=3)
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm, log_dirty=False, restart=restart), devices=[(PORT, None, Fails())])
        await vm.log_dirty()
        first = vm._control.guest
        write(vm, 50)
        with trio.fail_after(20):
            while word(vm, FIRST) < 2:  # noqa: ASYNC110  # the guest tells nobody
                await trio.sleep(0.001)
            write(vm, 50, asks=True)
            while vm._control.guest is first:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert logged(vm)
        before = vm.statistics().dirty_pages
        assert 50 <= before <= 52  # what it wrote before counts, once
        assert read(vm) <= 2  # and is not in the new log
        write(vm, 3)
        with trio.fail_after(20):
            while word(vm, FIRST) < 2:  # noqa: ASYNC110
                await trio.sleep(0.001)
        await vm.stop()
        assert before + 3 <= vm.statistics().dirty_pages <= before + 5


@pytest.mark.kvm
async def test_what_is_switched_while_a_vm_waits_to_be_restarted_holds_for_the_next_run(kvm, by_hand):
    restart = orc.Restart("on-failure", backoff=0.05, most=1)
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm, restart=restart), devices=[(PORT, None, Fails())])
        first = vm._control.guest
        write(vm, 1, asks=True)
        with trio.fail_after(20):
            while not first.life.has_ended:  # an inner state that nothing tells
                await trio.lowlevel.checkpoint()
            assert logged(vm)
            await vm.log_dirty(False)
            assert not logged(vm)
            while vm._control.guest is first:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert not logged(vm)


@pytest.mark.kvm
async def test_switching_it_many_times_at_once_ends_as_the_last_said(kvm, by_hand):
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm))
        write(vm, 10)
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(vm.log_dirty, number % 2 == 0)
        await vm.log_dirty(False)
        assert not logged(vm)
        assert vm.statistics().dirty_pages <= 21 * 10


# ---- who is asked, and when


@pytest.mark.kvm
async def test_each_reading_is_told_once_and_all_of_them_are_what_the_statistics_say(kvm, quick, tmp_path, monkeypatch):
    told, journal, found = Told(), Journal(tmp_path / "fleet.db"), []

    def remember(logs: list[DirtyLog]) -> str | None:
        before = logs[0].sums()[0]
        problem = read_logs(logs)
        found.append(logs[0].sums()[0] - before)
        return problem

    monkeypatch.setattr(dirty, "read_logs", remember)
    async with kvm.open(policies=[told], journal=journal, journal_interval=0.02) as fleet:
        vm = await fleet.launch(writer(kvm))
        write(vm, 37)
        await told.until(
            lambda: (
                found.count(37) >= 5
                and told.pages()
                and any(vm.dirty_pages is None and vm.dirty_rate for vm in told.facts)  # the last one's holds
            )
        )
        assert max(found[found.index(37) :]) == 37  # by then it has touched all that it will
        assert sum(vm.statistics().exits.values()) == 0  # nothing but its clock said that it does something
    with read_journal(tmp_path / "fleet.db") as rows:
        seen = [row.dirty_pages for row in rows.aggregates(vm="guest") if row.dirty_pages is not None]
    assert sum(seen) == vm.statistics().dirty_pages


@pytest.mark.kvm
async def test_logs_are_read_without_any_policy_and_of_those_alone_that_did_something(kvm, quick, monkeypatch):
    asked: list[DirtyLog] = []
    enough = threading.Event()

    def remember(logs: list[DirtyLog]) -> str | None:
        asked.extend(logs)
        if asked.count(busy._control.guest.dirty) > 5:
            enough.set()
        return read_logs(logs)

    async with kvm.open() as fleet:
        paused = await fleet.launch(writer(kvm, "paused"), paused=True)
        busy = await fleet.launch(writer(kvm, "busy"), paused=True)
        plain = await fleet.launch(writer(kvm, "plain", log_dirty=False))
        for vm in (paused, busy, plain):
            write(vm, 5)
        monkeypatch.setattr(dirty, "read_logs", remember)
        await busy.resume()
        with trio.fail_after(20):
            await trio.to_thread.run_sync(enough.wait)
        assert busy.statistics().dirty_pages > 0
        assert plain._control.guest.dirty not in asked
        assert asked.count(paused._control.guest.dirty) <= 1  # it was pausing when its first second began


@pytest.mark.kvm
async def test_a_log_that_takes_its_time_holds_up_neither_ticks_nor_loop_and_is_told_later(kvm, quick, monkeypatch):
    told, go_on, reads = Told(), threading.Event(), []

    def slow(logs: list[DirtyLog]) -> str | None:
        reads.append(len(logs))
        go_on.wait(20)
        return read_logs(logs)

    monkeypatch.setattr(dirty, "read_logs", slow)
    async with kvm.open(policies=[told]) as fleet:
        vm = await fleet.launch(writer(kvm))
        write(vm, 12)
        await told.until(lambda: reads)
        ticks = told.ticks
        await told.until(lambda: told.ticks > ticks + 5)
        assert reads == [1]  # one reading at a time
        assert told.pages() == []
        go_on.set()
        await told.until(lambda: told.pages())
        assert told.pages()[0] >= 12


@pytest.mark.kvm
@pytest.mark.parametrize(("rested", "passed"), [(0, 100), (99, 1)])
async def test_a_rate_is_of_the_time_since_the_last_reading_but_for_a_rest(kvm, by_hand, rested, passed):
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm))
        async with in_rounds(vm) as rounds:
            await rounds.one(500)
        begun = fleet.now() - 100 * SECOND
        logs = dirty.DirtyLogs()
        assert list(logs.watch(vm._control, vm._control.guest.dirty, begun)) == []
        logs.stir(vm._control, begun + rested * SECOND, begun + 100 * SECOND)
        assert read(vm) == 500
        ((of, pages, time),) = logs.forget(vm._control, vm._control.guest.dirty)
        assert (of, pages) == (vm._control, 500)
        assert time / SECOND == pytest.approx(passed, abs=0.5)


@pytest.mark.kvm
async def test_a_vm_is_due_a_second_after_its_last_reading_if_it_did_something(kvm):
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm), paused=True)
        logs, now = dirty.DirtyLogs(), fleet.now()
        assert logs.next(now) is None
        assert list(logs.watch(vm._control, vm._control.guest.dirty, now)) == []
        assert logs.next(now) == now + SECOND
        assert logs.due(now + 9 * SECOND) == []
        logs.stir(vm._control, now, now)
        assert logs.due(now + SECOND // 2) == []
        due = logs.due(now + SECOND)
        await logs.read(due, done := trio.Event())
        assert done.is_set()
        ((of, pages, _),) = logs.take()
        assert (of, pages, logs.rate(vm._control)) == (vm._control, 0, 0.0)
        assert list(logs.take()) == logs.due(now + 9 * SECOND) == []
        logs.stir(vm._control, now + 5 * SECOND, now + 6 * SECOND)
        assert logs.rate(vm._control) is None  # it had a rest: nothing is known of what it does now
        assert logs.due(now + 5 * SECOND) == []
        assert len(logs.due(now + 6 * SECOND)) == 1


# ---- where it can't be had


async def test_scripted_vms_write_nothing_and_none_are_told(autojump_clock):
    told = Told(interval=1.0)
    async with play([hlt(after=5)], policies=[told]) as fleet:
        vm = await fleet.launch(blank(log_dirty=True))
        vm.report_work(1)
        await trio.sleep(1.5)
        (fact,) = told.facts
        assert (fact.dirty_pages, fact.dirty_rate, vm.statistics().dirty_pages) == (None, None, None)
        assert {"dirty_pages", "dirty_rate"} <= set(told.host.absent)
        assert not logged(vm)
        with pytest.raises(orc.StateError, match=r"log the memory.*scripted"):
            await vm.log_dirty()


@pytest.mark.emulated
@pytest.mark.parametrize("more", [{"log_dirty": True}, {"regions": [orc.MemoryRegion(0x400000, PAGE, log_dirty=True)]}])
async def test_the_emulated_backend_refuses_it_before_anything_runs(more, nothing_left):
    async with orc.open_fleet(backend="emulated") as fleet:
        with pytest.raises(orc.SpecError, match=r"log_dirty=True.*backend='kvm'"):
            await fleet.launch(blank(**more))
        vm = await fleet.launch(blank(), paused=True)
        with pytest.raises(orc.StateError, match="emulated"):
            await vm.log_dirty()


@pytest.mark.kvm
@pytest.mark.parametrize("on", [1, "on", None])
async def test_what_is_neither_on_nor_off_is_refused(kvm, on):
    with pytest.raises(orc.SpecError, match=r"log_dirty=.*must be True or False"):
        blank(log_dirty=on)
    with pytest.raises(orc.SpecError, match=r"region log_dirty=.*must be True or False"):
        orc.MemoryRegion(0x400000, PAGE, log_dirty=on)
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm))
        with pytest.raises(orc.SpecError, match=r"on=.*must be True or False"):
            await vm.log_dirty(on)
        assert logged(vm)
        await vm.stop()
        assert not logged(vm)
        with pytest.raises(orc.StateError, match="can't log the memory"):
            await vm.log_dirty(True)


@pytest.mark.kvm
async def test_what_the_kernel_refuses_is_an_error_and_changes_nothing(kvm, by_hand):
    async with kvm.open() as fleet:
        vm = await fleet.launch(writer(kvm, log_dirty=False))
        slot = vm._control.guest._machine._slots[0]
        slot.memory_size += PAGE  # which no slot may grow by
        with pytest.raises(orc.KvmError, match=r"KVM_SET_USER_MEMORY_REGION.*log"):
            await vm.log_dirty()
        slot.memory_size -= PAGE
        assert not logged(vm)
        await vm.log_dirty()
        assert logged(vm)


# ---- the journal of older versions, and policies


def test_a_journal_from_before_gets_the_column_and_keeps_its_rows(tmp_path: Path, monkeypatch):
    path, row = tmp_path / "old.db", "1, 5, 1.0, 'a', 1, 'acme', 1.0, 1, NULL, 7, 0.0, 0.5, NULL, NULL, NULL"
    with monkeypatch.context() as older:
        older.setattr(schema, "_MIGRATIONS", schema._MIGRATIONS[:1])
        older.setattr(schema, "VERSION", 1)
        connection = schema.connect(path, readonly=False)
        schema.prepare(connection)
        connection.execute(f"INSERT INTO aggregates VALUES ({row})")
        connection.close()
    assert upgrade(path)[0] == 1
    with read_journal(path) as journal:
        (old,) = journal.aggregates()
    assert (old.vm, old.exits, old.cpu, old.dirty_pages) == ("a", 7, 0.5, None)
    with sqlite3.connect(path) as other:
        assert other.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
    other.close()


@pytest.mark.parametrize(("rate", "asked"), [(None, False), (900.0, False), (1100.0, True)])
def test_a_ladder_may_go_by_pages_a_second(rate, asked):
    ladder = orc.Ladder([orc.Step(rung="cap_cpu", when=orc.Condition("dirty_pages", over=1000), cpu=0.5)])
    vm = VmFacts("a", "acme", 1.0, 1, None, 0, 0.0, 1, dirty_rate=rate)
    actions = ladder.decide(orc.Facts(10**9, 0.1, None, None, {}, {"a": vm}))
    assert [type(action) for action in actions] == [orc.CapCpu] * asked
    if asked:
        assert "dirty_pages 1100 over 1000" in actions[0].reason
