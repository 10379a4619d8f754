"""A guest's output: kept, bounded, and followed by tasks while threads write it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import wait_all_tasks_blocked

from orchestra.machine.devices.console import KEPT, Console


def at_once(function: Callable[[], None]) -> None:
    function()


async def collect(console: Console, into: bytearray) -> None:
    with trio.fail_after(20):
        async for chunk in console.follow():
            assert chunk
            into += chunk


async def test_output_is_what_was_written():
    console = Console(at_once)
    assert (console.output, console.text, console.total) == (b"", "", 0)
    console.write(b"hello ")
    console.write("wörld".encode())
    assert console.text == "hello wörld"
    assert console.total == len(console.output) == 12


async def test_bytes_that_are_no_text_are_replaced():
    console = Console(at_once)
    console.write(b"a\xffb")
    assert console.text == "a\ufffdb"


@pytest.mark.parametrize("piece", [1000, KEPT, 3 * KEPT])
async def test_last_64_kib_are_kept_and_everything_is_counted(piece):
    console = Console(at_once)
    written = bytearray()
    for i in range(300 * 1024 // piece):
        data = bytes([i % 251]) * piece
        console.write(data)
        written += data
    assert console.output == written[-KEPT:]
    assert console.total == len(written)


async def test_follower_gets_what_was_there_and_what_comes_until_it_is_closed():
    console = Console(at_once)
    console.write(b"early ")
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, console, got)
        await wait_all_tasks_blocked()
        assert got == b"early "
        console.write(b"late")
        await wait_all_tasks_blocked()
        assert got == b"early late"
        console.close()
    assert got == b"early late"


async def test_two_followers_get_all_of_it_each():
    console = Console(at_once)
    one, other = bytearray(), bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, console, one)
        nursery.start_soon(collect, console, other)
        await wait_all_tasks_blocked()
        console.write(b"both")
        console.close()
    assert one == other == b"both"


async def test_output_of_an_ended_vm_can_still_be_followed_to_its_end():
    console = Console(at_once)
    console.write(b"last words")
    console.close()
    got = bytearray()
    with trio.fail_after(5):
        await collect(console, got)
    assert got == b"last words"


async def test_close_without_any_output_ends_the_followers():
    console = Console(at_once)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, console, bytearray())
            await wait_all_tasks_blocked()
            console.close()


async def test_follower_that_falls_far_behind_loses_the_oldest_output():
    console = Console(at_once)
    follower = console.follow()
    console.write(b"first")
    assert await anext(follower) == b"first"
    console.write(b"lost" * KEPT)
    console.write(b"x" * 2 * KEPT + b"end")
    chunk = await anext(follower)
    assert chunk.endswith(b"end")
    assert KEPT <= len(chunk) <= 2 * KEPT + 3
    assert b"lost" not in chunk
    await follower.aclose()


async def test_writes_are_announced_once_until_whoever_follows_has_looked():
    posted: list[Callable[[], None]] = []
    console = Console(posted.append)
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, console, got)
        await wait_all_tasks_blocked()
        for _ in range(1000):
            console.write(b"x")
        assert len(posted) == 1
        posted.pop()()
        console.write(b"y")
        assert not posted  # it is about to look
        await wait_all_tasks_blocked()
        assert got == b"x" * 1000 + b"y"
        console.write(b"z")
        assert len(posted) == 1
        console.close()
    assert got.endswith(b"yz")


async def test_writes_that_nobody_follows_wake_nobody():
    posted: list[Callable[[], None]] = []
    console = Console(posted.append)
    console.write(b"x")
    assert posted == []
    assert console.output == b"x"


async def test_output_written_between_a_look_and_the_wait_is_not_missed():
    posted: list[Callable[[], None]] = []
    console = Console(posted.append)
    got = bytearray()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, console, got)
            await wait_all_tasks_blocked()
            console.write(b"a")
            posted.pop()()
            console.write(b"b")  # before the follower ran
            await wait_all_tasks_blocked()
            assert got == b"ab"
            console.close()


async def test_threads_write_at_the_same_time_and_nothing_is_lost():
    token = trio.lowlevel.current_trio_token()
    console = Console(token.run_sync_soon)
    pieces = [bytes([letter]) * 7 for letter in b"abcd"]

    def write(piece: bytes) -> None:
        for _ in range(200):
            console.write(piece)

    got = bytearray()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, console, got)
            threads = [threading.Thread(target=write, args=(piece,)) for piece in pieces]
            for thread in threads:
                thread.start()
            for thread in threads:
                await trio.to_thread.run_sync(thread.join)
            console.close()
    assert sorted(got[i : i + 7] for i in range(0, len(got), 7)) == sorted(pieces * 200)


async def test_a_follower_that_leaves_has_the_next_output_announced_at_most_once_more():
    posted: list[Callable[[], None]] = []
    console = Console(posted.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, console, bytearray())
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    for _ in range(10):
        console.write(b"x")
    assert len(posted) == 1


@given(st.lists(st.one_of(st.binary(max_size=50), st.integers(1, 2 * KEPT).map(lambda n: b"z" * n)), max_size=8))
def test_any_writes_keep_their_end(pieces):
    async def main() -> None:
        console = Console(at_once)
        for piece in pieces:
            console.write(piece)
        whole = b"".join(pieces)
        assert console.output == whole[-KEPT:]
        assert console.total == len(whole)
        console.close()
        got = bytearray()
        await collect(console, got)
        assert whole.endswith(got)
        assert len(got) >= min(len(whole), KEPT)

    trio.run(main)
