"""Accesses answered by a task: in order, none lost, answered once and with the right bytes."""

from __future__ import annotations

import array
from collections.abc import Callable

import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import wait_all_tasks_blocked

from orchestra.machine.devices.requests import Request, Requests
from orchestra.model.errors import SpecError, StateError


class Rig:
    """Requests, and a vCPU that asks on this same thread."""

    def __init__(self) -> None:
        self.woken: list[int] = []
        self.requests = Requests(lambda function, *args: function(*args))

    def ask(
        self, address: int = 0x500, size: int = 1, write: bool = False, data: bytes = b"", vcpu: int = 0
    ) -> Request:
        return self.requests.submit(vcpu, address, size, write, data, lambda: self.woken.append(address))


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
async def soon():
    """Nothing here may take long."""
    with trio.fail_after(10):
        yield


async def test_accesses_come_in_the_order_they_were_made(rig, soon):
    asked = [rig.ask(address) for address in range(5)]
    assert [await anext(rig.requests) for _ in range(5)] == asked


async def test_request_says_what_is_accessed_and_by_whom(rig, soon):
    rig.ask(0x510, 2, True, b"\1\2", vcpu=3)
    request = await anext(rig.requests)
    assert (request.vcpu, request.address, request.size, request.write, request.data) == (3, 0x510, 2, True, b"\1\2")
    assert repr(request) == r"<Request write b'\x01\x02' of 2 bytes at 0x510 by vCPU 3>"
    assert repr(rig.ask(4)) == "<Request read of 1 bytes at 0x4 by vCPU 0>"


async def test_answer_lets_the_vcpu_go_on_with_its_value(rig, soon):
    request = rig.ask(0x500, 4)
    assert not request.answered
    request.answer(b"\x78\x56\x34\x12")
    assert request.answered
    assert request.value == 0x12345678
    assert rig.woken == [0x500]


async def test_write_is_answered_with_nothing(rig, soon):
    request = rig.ask(write=True, data=b"\1")
    request.answer()
    assert (request.answered, request.value) == (True, 0)


@pytest.mark.parametrize("data", [bytearray(b"\2\1"), memoryview(b"\2\1"), memoryview(array.array("H", [0x0102]))])
async def test_read_is_answered_with_any_kind_of_bytes(rig, data, soon):
    request = rig.ask(size=2)
    request.answer(data)
    assert request.value == 0x0102


@pytest.mark.parametrize("data", [b"", b"\1", b"\1\2\3", None, 5, "ab", memoryview(array.array("Q", [1, 2]))])
async def test_wrong_answer_to_a_read_names_the_size_and_answers_nothing(rig, data, soon):
    request = rig.ask(size=2)
    with pytest.raises(SpecError, match=r"data=.*: this read wants exactly 2 bytes"):
        request.answer(data)
    assert not request.answered
    assert rig.woken == []
    request.answer(b"ok")


@pytest.mark.parametrize("data", [b"", b"\1"])
async def test_write_answered_with_data_is_refused(rig, data, soon):
    request = rig.ask(write=True, data=b"\1")
    with pytest.raises(SpecError, match="a write is answered without data"):
        request.answer(data)
    assert not request.answered


@pytest.mark.parametrize("write", [False, True])
async def test_second_answer_is_refused_and_the_first_counts(rig, write, soon):
    request = rig.ask(0x510, write=write)
    request.answer(None if write else b"\1")
    with pytest.raises(StateError, match=f"the {'write' if write else 'read'} at 0x510 is answered already"):
        request.answer(None if write else b"\2")
    assert request.value == (0 if write else 1)
    assert rig.woken == [0x510]


async def test_reader_waits_until_something_is_asked(rig, soon):
    got: list[Request] = []

    async def read() -> None:
        got.append(await anext(rig.requests))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert got == []
        asked = rig.ask()
    assert got == [asked]


async def test_second_reader_is_told_that_there_is_one(rig, soon):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(anext, rig.requests)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await anext(rig.requests)
        rig.ask()


async def test_reader_whose_access_was_taken_by_another_never_displaces_a_third(rig, soon):
    """Three tasks at once is against the rules: each gets an access or an error, and none is forgotten."""
    outcomes: list[object] = []

    async def read() -> None:
        try:
            outcomes.append(await anext(rig.requests))
        except trio.BusyResourceError as error:
            outcomes.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        rig.ask(1)  # wakes the first, which has not run yet
        nursery.start_soon(read)
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        rig.ask(2)
        rig.ask(3)
    assert len(outcomes) == 3


# ---- cancellation


async def test_cancelled_before_it_waits_a_reader_takes_nothing(rig, soon):
    asked = rig.ask()
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(rig.requests)
    assert scope.cancelled_caught
    assert await anext(rig.requests) is asked


async def test_cancelled_while_it_waits_a_reader_makes_room_for_the_next(rig, soon):
    with trio.move_on_after(0):
        await anext(rig.requests)
    asked = rig.ask()
    assert await anext(rig.requests) is asked


async def test_access_that_comes_just_before_the_cancellation_is_not_lost(rig, soon):
    got: list[Request] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                async for request in rig.requests:
                    got.append(request)

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            first, second = rig.ask(1), rig.ask(2)
            scope.cancel()
    rest = [await anext(rig.requests)] if len(got) == 1 else []
    assert got + rest == [first, second]


async def test_taking_an_access_is_a_checkpoint(rig, soon):
    rig.ask()
    with trio.testing.assert_checkpoints():
        await anext(rig.requests)


# ---- the end


async def test_after_the_vms_end_a_reader_gets_what_is_left_and_stops(rig, soon):
    asked = [rig.ask(1), rig.ask(2)]
    rig.requests.end()
    assert [request async for request in rig.requests] == asked


async def test_end_lets_a_waiting_reader_stop(rig, soon):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drained, rig.requests)
        await wait_all_tasks_blocked()
        rig.requests.end()


async def test_close_lets_a_reader_in_another_task_stop(rig, soon):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drained, rig.requests)
        await wait_all_tasks_blocked()
        rig.requests.close()


async def drained(requests: Requests) -> None:
    async for _ in requests:
        raise AssertionError("nothing was asked")


async def test_close_gives_back_what_is_not_answered_whether_taken_or_not(rig, soon):
    taken, answered, queued = rig.ask(1), rig.ask(2), rig.ask(3)
    assert await anext(rig.requests) is taken
    (await anext(rig.requests)).answer(b"\0")
    rig.requests.close()
    assert [request.returned for request in (taken, answered, queued)] == [True, False, True]
    assert sorted(rig.woken) == [1, 2, 3]
    rig.requests.close()
    assert sorted(rig.woken) == [1, 2, 3]  # each is woken once


async def test_access_that_comes_after_close_goes_back_at_once(rig, soon):
    rig.requests.close()
    late = rig.ask(9)
    assert (late.returned, rig.woken) == (True, [9])


async def test_answered_accesses_are_not_kept(rig, soon):
    for _ in range(100):
        rig.ask()
        (await anext(rig.requests)).answer(b"\0")
    assert len(rig.requests._outstanding) <= 1


async def test_vcpus_ask_from_their_threads(soon):
    token = trio.lowlevel.current_trio_token()
    requests = Requests(token.run_sync_soon)
    events = [trio.Event() for _ in range(4)]

    def vcpu(index: int) -> Request:
        def wake() -> None:
            events[index].set()

        return requests.submit(index, index, 1, False, b"", wake)

    asked = [await trio.to_thread.run_sync(vcpu, index) for index in range(4)]
    for _ in range(4):
        request = await anext(requests)
        request.answer(bytes([request.vcpu * 2]))
    for event in events:
        await event.wait()
    assert [request.value for request in asked] == [0, 2, 4, 6]


STEPS = st.lists(st.sampled_from(["ask", "take", "take and answer", "cancelled take"]), max_size=30)


@settings(max_examples=50)
@given(STEPS)
def test_in_any_order_every_access_is_taken_once_and_ends_answered_or_given_back(steps):
    async def main() -> None:
        rig = Rig()
        asked: list[Request] = []
        taken: list[Request] = []
        takes: dict[str, Callable[[Request], None]] = {
            "take": lambda request: None,
            "take and answer": lambda request: request.answer(b"\0"),
        }
        for step in steps:
            if step == "ask":
                asked.append(rig.ask(len(asked)))
            elif step == "cancelled take":
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await anext(rig.requests)
                assert scope.cancelled_caught
            elif len(taken) < len(asked):
                taken.append(await anext(rig.requests))
                takes[step](taken[-1])
        assert taken == asked[: len(taken)]
        rig.requests.close()
        assert all(request.answered != request.returned for request in asked)
        assert sorted(rig.woken) == list(range(len(asked)))

    trio.run(main)
