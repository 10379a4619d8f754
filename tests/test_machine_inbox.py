"""Who is served in a round of the event loop, whoever asks for how much; and what becomes of a question."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from orchestra.machine.devices.bus import Bus
from orchestra.machine.devices.requests import Request, Requests
from orchestra.machine.inbox import Inbox
from orchestra.native import ffi, lib
from orchestra.native.core import FleetCore, VcpuCore

PORT, ONES = 0x80, 0xFF


class Engine:
    """Counts the kicks that an engine without a thread needs."""

    def __init__(self) -> None:
        self.kicks = 0

    def kick(self) -> None:
        self.kicks += 1


class Guest:
    """A VM whose vCPUs ask as an engine without a thread does; its port is claimed by a task."""

    def __init__(self, rig: Rig, tenant: str, name: str, vcpus: int = 1) -> None:
        self.tenant, self.name = tenant, name
        self.ports, self.mmio = Bus("ports", 1 << 16), Bus("mmio", 1 << 52)
        self.requests = Requests(rig.inbox)
        self.claim = self.ports.claim(range(PORT, PORT + 1), self.requests)
        self.engine = Engine()
        self.failures: list[Exception] = []
        self.cores: list[VcpuCore] = []
        self.data = [ffi.new("uint8_t[]", 8) for _ in range(vcpus)]
        for index in range(vcpus):
            core = VcpuCore(rig.core, rig.next_id())
            core.set_buses(self.ports.handle, self.mmio.handle)
            rig.inbox.add(core, self.engine, index, (tenant, name), (self.ports, self.mmio), self.failures.append)
            self.cores.append(core)

    def ask(self, vcpu: int = 0) -> None:
        core = self.cores[vcpu]
        assert lib.orc_access_begin(core.handle, lib.ORC_IO, PORT, 1, 1, False, self.data[vcpu]) == lib.ORC_IO
        core.ask(5)

    def taken(self) -> list[Request]:
        queue = list(self.requests._queue)
        self.requests._queue.clear()
        return queue


class Rig:
    def __init__(self) -> None:
        self.core = FleetCore()
        self.inbox = Inbox(self.core)
        self.guests: list[Guest] = []
        self._ids = 0

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    def guest(self, tenant: str, name: str, vcpus: int = 1) -> Guest:
        self.guests.append(Guest(self, tenant, name, vcpus))
        return self.guests[-1]

    def play(self) -> list[str]:
        """Whose requests come to their tasks in the next round."""
        self.inbox.serve()
        return [f"{guest.name}{request.vcpu}" for guest in self.guests for request in guest.taken()]

    def close(self) -> None:
        for guest in self.guests:
            for core in guest.cores:
                core.close()
        self.core.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


# ---- turns


def test_each_tenant_has_one_question_in_a_round_however_many_it_has(rig):
    hostile, innocent = rig.guest("hostile", "h", 20), rig.guest("innocent", "i", 2)
    for vcpu in range(20):
        hostile.ask(vcpu)
    innocent.ask(0)
    assert sorted(name[0] for name in rig.play()) == ["h", "i"]
    innocent.ask(1)
    assert sorted(name[0] for name in rig.play()) == ["h", "i"]
    assert [len(rig.play()) for _ in range(19)] == [1] * 18 + [0]


def test_the_vms_of_a_tenant_take_turns(rig):
    one, two = rig.guest("acme", "a", 3), rig.guest("acme", "b", 3)
    for vcpu in range(3):
        one.ask(vcpu)
        two.ask(vcpu)
    served = ["".join(name[0] for name in rig.play()) for _ in range(7)]
    assert sorted(served[:2]) == sorted(served[2:4]) == sorted(served[4:6]) == ["a", "b"]
    assert served[6] == ""


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=40))
def test_all_are_served_once_and_at_most_one_of_a_tenant_in_a_round(asked):
    rig = Rig()
    guests = [rig.guest(tenant, name, 3) for tenant, name in [("x", "a"), ("x", "b"), ("y", "c"), ("z", "d")]]
    tenant_of = {guest.name: guest.tenant for guest in guests}
    waiting: set[str] = set()

    def round_() -> bool:
        served = rig.play()
        assert len({tenant_of[name[0]] for name in served}) == len(served)
        assert {tenant_of[name[0]] for name in served} == {tenant_of[name[0]] for name in waiting}
        waiting.difference_update(served)
        for name in served:  # settled, so that this vCPU may ask again
            guest = next(guest for guest in guests if guest.name == name[0])
            guest.cores[int(name[1])].settled()
        return bool(served)

    for number, vcpu, then_a_round in asked:
        name = f"{guests[number].name}{vcpu}"
        if name not in waiting:
            guests[number].ask(vcpu)
            waiting.add(name)
        if then_a_round:
            round_()
    while round_():
        pass
    assert not waiting
    rig.close()


# ---- what becomes of a question


def test_an_answer_goes_to_the_vcpu_that_asked_and_wakes_it(rig):
    guest = rig.guest("acme", "a", 2)
    guest.ask(0)
    guest.ask(1)
    rig.inbox.serve()
    rig.inbox.serve()
    for request in guest.taken():
        assert (request.address, request.size, request.write, request.data) == (PORT, 1, False, b"")
        before = guest.cores[request.vcpu].wakes()
        request.answer(bytes([40 + request.vcpu]))
        assert guest.cores[request.vcpu].wakes() != before
    assert guest.engine.kicks == 2
    for vcpu, core in enumerate(guest.cores):
        assert not core.is_asking()
        core.settled()
        assert (guest.data[vcpu][0], lib.orc_vcpu_access(core.handle).count) == (40 + vcpu, 1)


def test_a_question_about_a_claim_that_is_gone_goes_back_to_the_core(rig):
    guest = rig.guest("acme", "a")
    guest.ask()
    guest.ports.release(guest.claim)
    assert rig.play() == []
    guest.cores[0].settled()
    assert lib.orc_vcpu_access(guest.cores[0].handle).count == 0
    assert not lib.orc_access_next(guest.cores[0].handle)
    assert guest.data[0][0] == ONES


@pytest.mark.parametrize("released", [False, True])
def test_who_answers_no_more_gives_back_what_was_asked(rig, released):
    guest = rig.guest("acme", "a")
    guest.ask()
    rig.inbox.serve()
    if released:
        guest.ports.release(guest.claim)
    guest.requests.close()
    guest.cores[0].settled()
    answered = lib.orc_vcpu_access(guest.cores[0].handle).count
    assert (answered, guest.data[0][0]) == ((0, 0) if released else (1, ONES))


def test_an_answer_that_comes_too_late_changes_nothing(rig):
    guest = rig.guest("acme", "a")
    guest.ask()
    rig.inbox.serve()
    (late,) = guest.taken()
    guest.cores[0].settled()  # it was told to stop
    guest.ask()
    late.answer(b"\1")
    assert guest.cores[0].is_asking()
    assert guest.engine.kicks == 0
    guest.cores[0].settled()
    assert guest.data[0][0] == 0


def test_a_vcpu_that_has_ended_is_not_served_and_an_answer_to_it_is_no_error(rig):
    guest = rig.guest("acme", "a", 2)
    guest.ask(0)
    rig.inbox.serve()
    (late,) = guest.taken()
    guest.ask(1)
    for core in guest.cores:
        rig.inbox.remove(core.id)
        rig.inbox.remove(core.id)
    assert rig.play() == []
    for core in guest.cores:
        core.close()
    guest.cores.clear()
    late.answer(b"\1")
    assert guest.engine.kicks == 0


# ---- the task


async def test_threads_ask_and_each_gets_its_answer(rig):
    """The runner's side as an engine that blocks has it: it asks, and sleeps on the futex."""
    guests = [rig.guest(f"tenant {number % 2}", f"{number}", 2) for number in range(2)]
    rounds, seen = 200, Counter[tuple[str, int]]()

    def vcpu(guest: Guest, index: int) -> None:
        core = guest.cores[index]
        for n in range(rounds):
            guest.ask(index)
            while core.is_asking():
                wakes = core.wakes()
                if core.is_asking():
                    lib.orc_vcpu_sleep(core.handle, wakes)
            core.settled()
            assert guest.data[index][0] == n % 256
            seen[guest.name, index] += 1

    async def answer(guest: Guest) -> None:
        counts = [0, 0]
        async for request in guest.requests:
            request.answer(bytes([counts[request.vcpu] % 256]))
            counts[request.vcpu] += 1

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.inbox.run)
            for guest in guests:
                nursery.start_soon(answer, guest)
            threads = [threading.Thread(target=vcpu, args=(guest, n)) for guest in guests for n in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                await trio.to_thread.run_sync(thread.join)
            nursery.cancel_scope.cancel()
    assert seen == {(guest.name, n): rounds for guest in guests for n in range(2)}


# ---- errors and ends


@pytest.mark.parametrize("asking", [1, 2])
def test_a_turn_that_raises_fails_its_vm_and_the_others_are_served(rig, monkeypatch, asking):
    broken, other = rig.guest("acme", "b"), rig.guest("umbra", "o")
    monkeypatch.setattr(broken.requests, "deliver", lambda request: 1 / 0)
    broken.ask()
    if asking == 2:  # otherwise there is nothing to take turns with, which is a way of its own
        other.ask()
    assert rig.play() == ["o0"] * (asking - 1)
    assert [type(error) for error in broken.failures] == [ZeroDivisionError]
    assert other.failures == []


@pytest.mark.parametrize("taken", [False, True])
def test_what_a_vcpu_asked_before_its_end_is_no_question_of_the_next_run(rig, taken):
    guest = rig.guest("acme", "a")
    guest.ask()
    rig.inbox.serve()
    requests = guest.taken() if taken else []
    rig.inbox.remove(guest.cores[0].id)
    assert guest.taken() == []
    assert not guest.requests._outstanding
    for request in requests:
        request.answer(b"\x01")  # no error, and nobody needs it
    assert guest.engine.kicks == 0


async def test_a_turn_that_came_after_the_task_was_cancelled_is_taken_by_the_next_task(rig):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.inbox.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    taken = trio.Event()
    rig.inbox.put(("acme", "a"), taken.set)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.inbox.run)
            await taken.wait()
            nursery.cancel_scope.cancel()


# ---- in the place of `run`


class Steps(trio.abc.Instrument):
    """Counts the steps of each task, by its name."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.of[task.name] += 1


@asynccontextmanager
async def serving(rig: Rig) -> AsyncIterator[trio.Nursery]:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.inbox.run, name="inbox")
            await trio.testing.wait_all_tasks_blocked()
            yield nursery
            nursery.cancel_scope.cancel()


def one_answers(guest: Guest) -> None:
    """The vCPU takes its answer, so that it may ask again."""
    assert not guest.cores[0].is_asking()
    guest.cores[0].settled()


async def answer_all(guest: Guest) -> None:
    async for request in guest.requests:
        request.answer(b"\1")


async def played(guest: Guest) -> None:
    """One question and its answer."""
    guest.ask()
    await trio.testing.wait_all_tasks_blocked()
    one_answers(guest)


async def test_a_task_that_is_asked_again_and_again_is_the_only_one_to_wake(rig):
    guest, steps = rig.guest("acme", "a"), Steps()
    async with serving(rig) as nursery:
        nursery.start_soon(answer_all, guest, name="reader")
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
        for _ in range(20):
            await played(guest)
        trio.lowlevel.remove_instrument(steps)
    assert (steps.of["inbox"], steps.of["reader"]) == (0, 20)


async def test_a_question_that_comes_while_the_last_is_answered_wakes_nobody_else(rig):
    """As if the vCPU's thread ran at once whenever an answer wakes it."""
    guest, steps, asked = rig.guest("acme", "a"), Steps(), 1

    async def read() -> None:
        nonlocal asked
        async for request in guest.requests:
            request.answer(b"\1")
            one_answers(guest)
            if asked < 20:
                guest.ask()
                asked += 1

    async with serving(rig) as nursery:
        nursery.start_soon(read, name="reader")
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
        guest.ask()
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(steps)
    assert (asked, steps.of["inbox"], steps.of["reader"]) == (20, 0, 20)


async def test_while_the_task_that_stood_in_does_something_else_the_others_are_served(rig):
    slow, other = rig.guest("acme", "a"), rig.guest("umbrella", "b")

    async with serving(rig) as nursery:
        nursery.start_soon(answer_all, other)

        async def read_one() -> None:
            request = await anext(slow.requests)
            await trio.sleep_forever()
            request.answer(b"\1")

        nursery.start_soon(read_one)
        await trio.testing.wait_all_tasks_blocked()
        slow.ask()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            await played(other)
        assert slow.cores[0].is_asking()


async def test_questions_to_others_come_to_them_whoever_stands_in(rig):
    one, two, three = (rig.guest(f"tenant {n}", str(n)) for n in range(3))
    async with serving(rig) as nursery:
        for guest in (one, two, three):
            nursery.start_soon(answer_all, guest)
            await trio.testing.wait_all_tasks_blocked()
        for guest in (one, two, two, three, one, three, three, two):
            await played(guest)
        for guest in (one, two, three):
            guest.ask()
        await trio.testing.wait_all_tasks_blocked()
        for guest in (one, two, three):
            one_answers(guest)


async def test_a_question_is_served_though_the_task_that_stands_in_is_cancelled_when_it_comes(rig):
    gone, other = rig.guest("acme", "a"), rig.guest("umbrella", "b")
    async with serving(rig) as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as readers:
                readers.start_soon(answer_all, gone)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(answer_all, other)
                await trio.testing.wait_all_tasks_blocked()
                other.ask()
                gone.ask()
                scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        one_answers(other)
        nursery.start_soon(answer_all, gone)  # nothing is lost: the next task gets it
        await trio.testing.wait_all_tasks_blocked()
        one_answers(gone)
        await played(other)


async def test_a_device_has_its_turn_in_the_inbox_task_whoever_stands_in(rig):
    guest, turns = rig.guest("acme", "a"), list[str]()
    async with serving(rig) as nursery:
        nursery.start_soon(answer_all, guest)
        await trio.testing.wait_all_tasks_blocked()
        rig.inbox.put(("acme", "a"), lambda: turns.append(trio.lowlevel.current_task().name))
        await trio.testing.wait_all_tasks_blocked()
        assert turns == ["inbox"]
        await played(guest)


@pytest.mark.parametrize("how", [Requests.end, Requests.close])
async def test_the_vms_end_lets_a_task_that_stands_in_stop_and_the_others_are_served(rig, how):
    guest, other = rig.guest("acme", "a"), rig.guest("umbrella", "b")
    async with serving(rig) as nursery:
        nursery.start_soon(answer_all, other)
        async with trio.open_nursery() as readers:
            readers.start_soon(answer_all, guest)
            await trio.testing.wait_all_tasks_blocked()
            await played(guest)
            how(guest.requests)
        await played(other)


async def test_a_task_that_was_recalled_leaves_the_place_to_the_one_that_took_it_meanwhile(rig):
    """As when a VM ends, and the reader of another VM comes back for its next question in the same round."""
    gone, other = rig.guest("acme", "a"), rig.guest("umbrella", "b")
    async with serving(rig) as nursery:
        async with trio.open_nursery() as readers:
            readers.start_soon(answer_all, gone)
            await trio.testing.wait_all_tasks_blocked()

            async def read() -> None:
                gone.requests.end()
                assert rig.inbox.may_stand_in()
                await answer_all(other)

            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await played(other)


async def test_a_task_that_stands_in_when_the_fleet_closes_does_not_use_the_core_any_more():
    rig = Rig()
    guest = rig.guest("acme", "a")
    with trio.fail_after(10):
        async with trio.open_nursery() as readers:
            async with serving(rig):
                readers.start_soon(answer_all, guest)
                await trio.testing.wait_all_tasks_blocked()
                await played(guest)
            rig.close()
            guest.requests.end()
