"""A guest's output: kept, bounded, and followed by tasks while threads write it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import trio
from hypothesis import given, strategies as st
from trio.testing import wait_all_tasks_blocked

from orchestra.machine.devices.console import KEPT, Console, ConsoleState
from orchestra.model.codec import decode, encode
from orchestra.model.errors import ConsoleTimeout, SpecError, StateError
from orchestra.native import lib


def at_once(function: Callable[[], None]) -> None:
    function()


async def collect(console: Console, into: bytearray) -> None:
    with trio.fail_after(20):
        async for chunk in console.follow():
            assert chunk
            into += chunk


async def test_output_is_what_was_written():
    console = Console(at_once)
    assert (console.log(), console.text, console.total) == (b"", "", 0)
    console.put(b"hello ")
    console.put("wörld".encode())
    assert console.text == "hello wörld"
    assert console.total == len(console.log()) == 12


async def test_bytes_that_are_no_text_are_replaced():
    console = Console(at_once)
    console.put(b"a\xffb")
    assert console.text == "a\ufffdb"


@pytest.mark.parametrize("piece", [1000, KEPT, 3 * KEPT])
async def test_last_64_kib_are_kept_and_everything_is_counted(piece):
    console = Console(at_once)
    written = bytearray()
    for i in range(300 * 1024 // piece):
        data = bytes([i % 251]) * piece
        console.put(data)
        written += data
    assert console.log() == written[-KEPT:]
    assert console.total == len(written)


async def test_follower_gets_what_was_there_and_what_comes_until_it_is_closed():
    console = Console(at_once)
    console.put(b"early ")
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect, console, got)
        await wait_all_tasks_blocked()
        assert got == b"early "
        console.put(b"late")
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
        console.put(b"both")
        console.close()
    assert one == other == b"both"


async def test_output_of_an_ended_vm_can_still_be_followed_to_its_end():
    console = Console(at_once)
    console.put(b"last words")
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
    console.put(b"first")
    assert await anext(follower) == b"first"
    console.put(b"lost" * KEPT)
    console.put(b"x" * 2 * KEPT + b"end")
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
            console.put(b"x")
        assert len(posted) == 1
        posted.pop()()
        console.put(b"y")
        assert not posted  # it is about to look
        await wait_all_tasks_blocked()
        assert got == b"x" * 1000 + b"y"
        console.put(b"z")
        assert len(posted) == 1
        console.close()
    assert got.endswith(b"yz")


async def test_writes_that_nobody_follows_wake_nobody():
    posted: list[Callable[[], None]] = []
    console = Console(posted.append)
    console.put(b"x")
    assert posted == []
    assert console.log() == b"x"


async def test_output_written_between_a_look_and_the_wait_is_not_missed():
    posted: list[Callable[[], None]] = []
    console = Console(posted.append)
    got = bytearray()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, console, got)
            await wait_all_tasks_blocked()
            console.put(b"a")
            posted.pop()()
            console.put(b"b")  # before the follower ran
            await wait_all_tasks_blocked()
            assert got == b"ab"
            console.close()


async def test_threads_write_at_the_same_time_and_nothing_is_lost():
    token = trio.lowlevel.current_trio_token()
    console = Console(token.run_sync_soon)
    pieces = [bytes([letter]) * 7 for letter in b"abcd"]

    def write(piece: bytes) -> None:
        for _ in range(200):
            console.put(piece)

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
        console.put(b"x")
    assert len(posted) == 1


@given(st.lists(st.one_of(st.binary(max_size=50), st.integers(1, 2 * KEPT).map(lambda n: b"z" * n)), max_size=8))
def test_any_writes_keep_their_end(pieces):
    async def main() -> None:
        console = Console(at_once)
        for piece in pieces:
            console.put(piece)
        whole = b"".join(pieces)
        assert console.log() == whole[-KEPT:]
        assert console.total == len(whole)
        console.close()
        got = bytearray()
        await collect(console, got)
        assert whole.endswith(got)
        assert len(got) >= min(len(whole), KEPT)

    trio.run(main)


# ---- state


@given(st.lists(st.integers(0, KEPT), max_size=4), st.binary(max_size=50))
def test_a_console_that_goes_on_keeps_the_same_and_counts_on(sizes, more):
    console = Console(at_once)
    for number, size in enumerate(sizes):
        console.put(bytes([number]) * size)
    state = decode(ConsoleState, encode(console.state()))
    again = Console.from_state(at_once, state)
    for one in (console, again):
        one.put(more)
    assert (again.total, again.log()) == (console.total, console.log())
    assert again.state() == console.state()


async def test_a_console_that_goes_on_waits_for_what_comes_next_and_keeps_what_is_typed():
    console = Console(at_once, "one")
    lib.orc_console_type(console.handle, b"typed", 5)
    console.put(b"login: root\npassword: ")
    await console.wait_for("login: ")
    again = Console.from_state(at_once, decode(ConsoleState, encode(console.state())), "two")
    assert again.state() == console.state()
    assert lib.orc_console_typed(again.handle) == 5
    assert await again.wait_for("password: ") == b"root\npassword: "
    with pytest.raises(ConsoleTimeout, match="vm 'two'"):
        await again.wait_for("login: ", timeout=0)


@pytest.mark.parametrize("typed", [b"", b"a", bytes(n % 251 for n in range(4096 + 16))])
def test_input_that_waits_is_part_of_the_state(typed):
    again = Console.from_state(at_once, ConsoleState(typed=typed))
    assert again.state() == ConsoleState(typed=typed)


@pytest.mark.parametrize(
    "wrong", [{"found": 4}, {"found": -1}, {"typed": bytes(4113)}, {"typed": "a"}, {"kept": "abc"}]
)
def test_a_console_can_not_be_in_another_state(wrong):
    with pytest.raises(SpecError, match=next(iter(wrong))):
        ConsoleState(**{"total": 3, "kept": b"abc"} | wrong)


async def test_typing_without_memory_for_it_is_an_error_and_no_wait(monkeypatch):
    class Full:
        """The core, whose allocations fail."""

        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

        @staticmethod
        def orc_console_type(*_: object) -> int:
            return -errno.ENOMEM

        @staticmethod
        def orc_console_listened(_: object) -> bool:
            return True

    for module in ("console", "stream"):
        monkeypatch.setattr(f"orchestra.machine.devices.{module}.lib", Full())
    with trio.fail_after(5), pytest.raises(MemoryError, match="vm 'one': no memory for what is typed"):
        await Console(at_once, "one").write(b"x")


@pytest.mark.parametrize(("total", "kept"), [(3, b"ab"), (1, b"ab"), (KEPT + 1, b"ab"), (-1, b"")])
def test_a_console_can_not_have_kept_more_or_less_than_it_does(total, kept):
    with pytest.raises(SpecError, match=r"kept|total"):
        ConsoleState(total, kept)


# ---- waiting for output, and typing


async def test_wait_for_finds_what_was_there_and_what_comes_each_once():
    console = Console(at_once)
    console.put(b"boot ok\nlogin: ")
    assert await console.wait_for("login: ") == b"boot ok\nlogin: "
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def second() -> None:
            assert await console.wait_for(b"login: ") == b"root\nlogin: "

        await wait_all_tasks_blocked()
        console.put(b"root\nlog")
        await wait_all_tasks_blocked()
        console.put(b"in: # ")
    assert await console.wait_for("# ") == b"# "


async def test_wait_for_names_what_did_not_come_and_shows_the_last_lines(autojump_clock):
    console = Console(at_once, "db-1")
    console.put(b"one\ntwo\nKernel panic\n")
    with pytest.raises(
        ConsoleTimeout, match=r"(?s)vm 'db-1': b'login:' did not come within 5 s; .*\ntwo\nKernel panic"
    ):
        await console.wait_for("login:", timeout=5)
    assert await console.wait_for("two") == b"one\ntwo"  # nothing was consumed


async def test_wait_for_a_silent_vm_says_so(autojump_clock):
    with pytest.raises(TimeoutError, match="it wrote nothing"):
        await Console(at_once).wait_for(b"x", timeout=1)


class Talkative(Console):
    """A console whose guest writes on after each look at its output, as one does that another CPU runs."""

    def _since(self, position: int) -> tuple[bytes, int]:
        found = super()._since(position)
        assert self.total < 100 * len(self.words), "the event loop has no turn"
        self.put(self.words)
        return found

    words = b"a" * 100


async def test_wait_for_leaves_the_event_loop_to_others_while_the_guest_writes_on_and_on():
    turns = 0

    async def other() -> None:
        nonlocal turns
        for _ in range(10):
            turns += 1
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

    console = Talkative(at_once)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await console.wait_for(b"x")
    assert turns == 10


async def test_wait_for_returns_the_match_though_the_guest_has_overwritten_it_since():
    class Flood(Console):
        def _since(self, position: int) -> tuple[bytes, int]:
            found = super()._since(position)
            if b"login" in found[0]:
                self.put(b"z" * (KEPT + 100))
            return found

    console = Flood(at_once)
    console.put(b"boot\nlogin: ")
    assert await console.wait_for(b"login:") == b"login:"


async def test_wait_for_ends_with_the_vm():
    console = Console(at_once)
    console.put(b"power down")
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def waits() -> None:
            with pytest.raises(StateError, match=r"(?s)ended before b'login:' came.*power down"):
                await console.wait_for("login:")

        await wait_all_tasks_blocked()
        console.close()


async def test_wait_for_nothing_is_refused():
    with pytest.raises(SpecError, match="pattern=''"):
        await Console(at_once).wait_for("")
    with pytest.raises(SpecError, match="timeout"):
        await Console(at_once).wait_for("x", timeout="soon")  # type: ignore[arg-type]


@given(data=st.data())
async def test_wait_for_finds_a_pattern_however_the_output_comes(data):
    pattern = data.draw(st.binary(min_size=1, max_size=6))
    before = data.draw(st.binary(max_size=40)).replace(pattern[:1], b"")
    text = before + pattern
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    console = Console(at_once)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def waits() -> None:
            assert await console.wait_for(pattern) == text

        await wait_all_tasks_blocked()
        for start, stop in pairwise([0, *cuts, len(text)]):
            console.put(text[start:stop])
            await wait_all_tasks_blocked()


async def test_typing_without_a_device_that_takes_it_is_an_error():
    with pytest.raises(StateError, match=r"nothing takes input now: .*Serial\(\)"):
        await Console(at_once).write(b"ls\n")
