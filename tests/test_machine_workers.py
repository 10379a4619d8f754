"""Work that would hold up the event loop: where it is done, who waits for whom, and what happens without threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import attrs
import pytest
import trio

from orchestra.machine import workers as module
from orchestra.machine.workers import BIG, THREADS, Workers


@attrs.define(eq=False)
class Piece:
    """A region of a memory, as far as its size matters."""

    span: range


class Memory:
    def __init__(self, size: int) -> None:
        self.regions = [Piece(range(size))]
        self.on_write = None

    def detach(self) -> list[Piece]:
        regions, self.regions = self.regions, []
        return regions


class Unmaps:
    """Stands in for `unmap`: notes who is unmapped and on which thread, and waits until it is let go."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.begun: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, regions: list[Piece]) -> None:
        self.begun += [len(region.span) for region in regions]
        self.threads.add(threading.get_ident())
        if threading.current_thread() is not threading.main_thread():
            assert self.go_on.wait(20)


@pytest.fixture
def unmaps(monkeypatch):
    unmaps = Unmaps()
    monkeypatch.setattr(module, "unmap", unmaps)
    yield unmaps
    unmaps.go_on.set()


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not true():  # noqa: ASYNC110  # another thread tells nobody
            await trio.sleep(0.001)


async def test_memory_is_unmapped_on_another_thread_and_can_be_waited_for(unmaps):
    workers = Workers(threaded=True)
    memory = Memory(4096)
    done = workers.discard(memory)
    assert memory.regions == []
    assert not done.is_set()
    unmaps.go_on.set()
    with trio.fail_after(20):
        await done.wait()
        await workers.idle()
    assert threading.get_ident() not in unmaps.threads


async def test_what_is_big_leaves_a_thread_to_what_is_small(unmaps):
    workers = Workers(threaded=True)
    for _ in range(2 * THREADS):
        workers.discard(Memory(BIG))
    await until(lambda: len(unmaps.begun) == THREADS - 1)
    small = workers.discard(Memory(4096))
    await until(lambda: unmaps.begun[-1] == 4096)
    assert not small.is_set()
    unmaps.go_on.set()
    with trio.fail_after(20):
        await workers.idle()
    assert unmaps.begun == [BIG] * (THREADS - 1) + [4096] + [BIG] * (THREADS + 1)


async def test_the_small_come_first(unmaps):
    workers = Workers(threaded=True)
    for size in (5, 4, 3, 2, 9, 8, 7, 6):
        workers.discard(Memory(size))
    await until(lambda: len(unmaps.begun) == 4)
    assert sorted(unmaps.begun) == [2, 3, 4, 5]
    unmaps.go_on.set()
    with trio.fail_after(20):
        await workers.idle()
    assert len(unmaps.begun) == 8


def refuse(*args: object, **more: object) -> None:
    raise RuntimeError("can't start new thread")


async def test_without_a_thread_it_is_done_here(unmaps, monkeypatch):
    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", refuse)
    workers = Workers(threaded=True)
    assert workers.discard(Memory(4096)).is_set()
    await workers.idle()
    assert unmaps.threads == {threading.get_ident()}


async def test_without_another_thread_one_that_is_at_work_does_it(unmaps, monkeypatch):
    workers = Workers(threaded=True)
    workers.discard(Memory(1))
    await until(lambda: unmaps.begun == [1])
    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "start_thread_soon", refuse)
        second = workers.discard(Memory(2))
        assert not second.is_set()
    unmaps.go_on.set()
    with trio.fail_after(20):
        await second.wait()
        await workers.idle()


async def test_one_that_cant_be_unmapped_is_told_and_holds_nobody_up(monkeypatch, caplog):
    monkeypatch.setattr(module, "unmap", lambda regions: 1 / 0)
    workers = Workers(threaded=True)
    with trio.fail_after(20):
        await workers.discard(Memory(1)).wait()
        await workers.idle()
    assert "could not be unmapped" in caplog.text


async def test_virtual_time_knows_of_no_threads(unmaps):
    workers = Workers(threaded=False)
    assert workers.discard(Memory(1)).is_set()
    assert await workers.run(threading.get_ident, workers.setup) == threading.get_ident()
    assert unmaps.threads == {threading.get_ident()}


async def test_what_is_run_is_run_once_on_a_thread_or_here(monkeypatch):
    workers = Workers(threaded=True)
    assert await workers.run(threading.get_ident, workers.teardown) != threading.get_ident()
    with pytest.raises(RuntimeError, match="of its own"):
        await workers.run(lambda: refuse_of_its_own(), workers.teardown)
    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", refuse)
    assert await workers.run(threading.get_ident, workers.teardown) == threading.get_ident()
    assert workers.teardown.borrowed_tokens == 0


def refuse_of_its_own() -> None:
    raise RuntimeError("of its own")


async def test_no_kind_of_work_waits_for_another():
    workers = Workers(threaded=True)
    go_on = threading.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(THREADS):
                nursery.start_soon(workers.run, go_on.wait, workers.teardown)
            await until(lambda: workers.teardown.available_tokens == 0)
            assert await workers.run(lambda: "set up", workers.setup) == "set up"
            assert await workers.run(lambda: "logged", workers.dirty) == "logged"
            go_on.set()


async def test_what_waits_for_its_turn_can_be_cancelled_and_what_runs_is_waited_for():
    workers, go_on, ran = Workers(threaded=True), threading.Event(), []

    def work() -> None:
        assert go_on.wait(20)
        ran.append(True)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(THREADS):
                nursery.start_soon(workers.run, work, workers.setup)
            await until(lambda: workers.setup.available_tokens == 0)
            with trio.move_on_after(0.01) as scope:
                await workers.run(lambda: ran.append(False), workers.setup)
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()
            go_on.set()
    assert ran == [True] * THREADS
    assert workers.setup.borrowed_tokens == 0
    with trio.CancelScope() as scope:
        scope.cancel()
        await workers.run(lambda: ran.append(False), workers.setup)
    assert scope.cancelled_caught
    assert False not in ran
