"""Who is served in a round of the event loop, whoever asks for how much."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio
from hypothesis import given, strategies as st

from orchestra.machine.inbox import Inbox


class Rounds:
    """Rounds of an event loop, played by hand."""

    def __init__(self) -> None:
        self.posted: list[Callable[[], None]] = []
        self.inbox = Inbox(self.posted.append)
        self.served: list[str] = []

    def put(self, tenant: str, vm: str, what: str) -> None:
        self.inbox.put((tenant, vm), partial(self.served.append, what))

    def play(self) -> list[str]:
        """What the next round serves."""
        self.served.clear()
        posted, self.posted[:] = list(self.posted), []
        for call in posted:
            call()
        return list(self.served)


def test_each_tenant_has_one_call_in_a_round_however_many_it_has():
    rounds = Rounds()
    for n in range(100):
        rounds.put("hostile", "flood", f"h{n}")
    rounds.put("innocent", "vm", "i0")
    assert rounds.play() == ["h0", "i0"]
    rounds.put("innocent", "vm", "i1")
    assert sorted(rounds.play()) == ["h1", "i1"]
    assert rounds.play() == ["h2"]


def test_the_vms_of_a_tenant_take_turns():
    rounds = Rounds()
    for vm in ("a", "b"):
        for n in range(3):
            rounds.put("acme", vm, f"{vm}{n}")
    assert [rounds.play() for _ in range(7)] == [["a0"], ["b0"], ["a1"], ["b1"], ["a2"], ["b2"], []]


def test_nothing_is_posted_while_there_is_nothing_to_do():
    rounds = Rounds()
    rounds.put("acme", "a", "one")
    assert len(rounds.posted) == 1
    rounds.put("acme", "b", "two")
    assert len(rounds.posted) == 1, "it is called already"
    assert rounds.play() == ["one"]
    assert rounds.play() == ["two"]
    assert not rounds.posted


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("ab"), st.booleans()), max_size=60))
def test_all_are_served_those_of_a_vm_in_order(asked):
    rounds = Rounds()
    served: list[str] = []
    for n, (tenant, vm, then_a_round) in enumerate(asked):
        rounds.put(tenant, vm, f"{tenant}{vm} {n}")
        if then_a_round:
            served += rounds.play()
    while rounds.posted:
        served += rounds.play()
    wanted = [f"{tenant}{vm} {n}" for n, (tenant, vm, _) in enumerate(asked)]
    assert sorted(served) == sorted(wanted)
    for key in {name.split()[0] for name in wanted}:
        assert [name for name in served if name.startswith(key)] == [name for name in wanted if name.startswith(key)]


async def test_threads_ask_and_none_is_lost():
    token = trio.lowlevel.current_trio_token()
    inbox, served, done = Inbox(token.run_sync_soon), [], trio.Event()

    def serve(what: tuple[int, int]) -> None:
        served.append(what)
        if len(served) == 4 * 200:
            done.set()

    def vcpu(number: int) -> None:
        for n in range(200):
            inbox.put((f"tenant {number % 2}", f"vm {number}"), partial(serve, (number, n)))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(trio.to_thread.run_sync, vcpu, number)
        await done.wait()
    for number in range(4):
        assert [n for one, n in served if one == number] == list(range(200))
