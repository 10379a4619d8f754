"""Subscriptions: who is told what, what is missed when nobody keeps up, and when a channel ends."""

from __future__ import annotations

import itertools
import time

import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

import orchestra as orc
from conftest import Stage, blank, drained, play
from orchestra.backend.scripted import ScriptedExit, bus_lock, hlt, io_write, mmio_write
from orchestra.fleet.channels import FEWEST, LATE, PACE, SLOWEST, Dispatcher, next_pace
from orchestra.native import lib
from orchestra.native.core import RING_RECORDS, FleetCore, VcpuCore
from orchestra.native.records import build

BUS_LOCK = 2
FOR_EVER = hlt(after=1e9)


async def told(fleet: orc.Fleet, *kinds: type[orc.Exit], vm: str = "guest", **more: object) -> list[orc.Exit]:
    """Launch, run to the end, and give what was told of it."""
    async with fleet.exits(*kinds, vm=vm, **more) as exits:
        await (await fleet.launch(blank(vm))).wait()
        return [exit async for exit in exits]


# ---- who is told what


async def test_a_subscriber_gets_the_kinds_it_asked_for(autojump_clock):
    script = [io_write(0x80, b"ab", after=1), bus_lock(after=1, rip=0x1234), mmio_write(0xD0000000, b"x"), hlt()]
    async with play(script) as fleet:
        for kinds, names in [
            ((orc.Io,), ["Io"]),
            ((orc.BusLock,), ["BusLock"]),
            ((orc.Hlt, orc.Mmio), ["Mmio", "Hlt"]),
            ((orc.Exit,), ["Io", "BusLock", "Mmio", "Hlt"]),
            ((), ["Io", "BusLock", "Mmio", "Hlt"]),
            ((orc.Notify, orc.OtherExit), []),
        ]:
            assert [type(exit).__name__ for exit in await told(fleet, *kinds)] == names


async def test_an_exit_says_who_when_where_and_what(autojump_clock):
    async with play([io_write(0x80, b"ab", after=1), bus_lock(after=2, rip=0x1234)]) as fleet:
        begun = fleet.now()
        io, lock, _ = await told(fleet)
        assert (io.vm, io.vcpu, io.port, io.size, io.count, io.write, io.data) == ("guest", 0, 0x80, 2, 1, True, b"ab")
        assert io.time - begun == pytest.approx(1e9, abs=10)
        assert lock.time - begun == pytest.approx(3e9, abs=10)
        assert (lock.rip, io.rip) == (0x1234, None)
        assert (lock.bus_lock, io.bus_lock) == (True, False)


async def test_an_exit_says_how_long_it_has_to_wait(autojump_clock):
    async with play([bus_lock()] * 3, limit=orc.Limit(rate=10, burst=2)) as fleet:
        waits = [exit.wait / 1e9 for exit in await told(fleet, orc.BusLock)]
        assert waits == pytest.approx([0, 0.1, 0.1], abs=1e-6)


async def test_a_subscriber_to_bus_locks_gets_every_exit_that_reports_one():
    script = [
        bus_lock(),
        io_write(0x80, b"x", flags=BUS_LOCK),
        io_write(0x80, b"y"),
        mmio_write(0xD0000000, b"z", flags=BUS_LOCK),
        mmio_write(0xD0000000, b"z"),
        ScriptedExit("intr", flags=BUS_LOCK),
    ]
    async with play(script) as fleet:
        exits = await told(fleet, orc.BusLock)
        assert [type(exit).__name__ for exit in exits] == ["BusLock", "Io", "Mmio", "Interrupted"]
        assert len(exits) == fleet.vms["guest"].statistics().bus_locks


async def test_a_subscriber_to_io_does_not_get_other_locks():
    async with play([bus_lock(), mmio_write(0xD0000000, b"z", flags=BUS_LOCK), io_write(0x80, b"x")]) as fleet:
        assert [type(exit).__name__ for exit in await told(fleet, orc.Io)] == ["Io"]


@pytest.mark.parametrize("reason", [28, 60, 62, 63, 1000, 65535])
async def test_reasons_that_have_no_name_are_told_as_other_exits(reason):
    async with play([ScriptedExit(reason)]) as fleet:
        names = [exit.reason for exit in await told(fleet, orc.OtherExit) if isinstance(exit, orc.OtherExit)]
        if reason != 28:  # that one has a name in some headers
            assert names == [reason]


async def test_a_filter_by_vm_takes_the_vm_or_its_name_also_before_it_is_launched(autojump_clock):
    async with play({"a": [hlt(after=1)], "b": [hlt(after=1)]}) as fleet:
        async with fleet.exits(vm="a") as early:
            a = await fleet.launch(blank("a"))
            b = await fleet.launch(blank("b"))
            async with fleet.exits(vm=a) as by_object, fleet.exits(vm="b") as by_name, fleet.exits() as every:
                await a.wait()
                await b.wait()
                assert [exit.vm async for exit in early] == ["a"]
                assert [exit.vm async for exit in by_object] == ["a"]
                assert [exit.vm async for exit in by_name] == ["b"]
                assert sorted([(await every.receive()).vm for _ in range(2)]) == ["a", "b"]


async def test_a_subscription_that_comes_while_it_runs_gets_what_comes_from_then_on(autojump_clock):
    async with play([bus_lock(after=1), bus_lock(after=1), io_write(0x80, b"x", after=1), hlt()]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        async with fleet.exits(vm=vm) as exits:
            await vm.wait()
            assert [type(exit).__name__ async for exit in exits] == ["BusLock", "Io", "Hlt"]


async def test_several_subscribers_get_the_same(autojump_clock):
    async with play([bus_lock()] * 100) as fleet:
        async with fleet.exits(orc.BusLock, vm="guest") as one, fleet.exits(vm="guest") as two:
            await (await fleet.launch(blank())).wait()
            first = [exit async for exit in one]
            second = [exit async for exit in two if isinstance(exit, orc.BusLock)]
        assert len(first) == 100
        assert first == second


async def test_without_a_subscriber_nothing_goes_to_the_ring(autojump_clock):
    async with play([bus_lock()] * (3 * RING_RECORDS)) as fleet:
        vm = await fleet.launch(blank())
        await vm.wait()
        assert vm.statistics().missed == 0
        assert drained(fleet._context.core) == []
        async with fleet.exits():
            pass
        again = await fleet.launch(blank())
        await again.wait()
        assert (again.statistics().missed, drained(fleet._context.core)) == (0, [])


async def test_a_subscriber_to_one_vm_does_not_put_anothers_exits_into_the_ring(autojump_clock):
    async with play({"quiet": [FOR_EVER], "loud": [bus_lock()] * 10}) as fleet:
        quiet = await fleet.launch(blank("quiet"))
        async with fleet.exits(vm=quiet) as exits:
            loud = await fleet.launch(blank("loud"))
            assert (
                loud._control.guest.context.event_mask("loud"),
                loud._control.guest.context.event_mask("quiet") > 0,
            ) == (0, True)
            await loud.wait()
            assert exits.statistics().received == 0


# ---- what is missed


@pytest.mark.parametrize(("drop", "kept"), [("oldest", range(90, 100)), ("newest", range(10))])
async def test_a_full_channel_drops_and_counts_while_everything_else_stays_exact(autojump_clock, drop, kept):
    script = [bus_lock(rip=number) for number in range(100)]
    async with play(script, limit=orc.Limit(rate=100, burst=1)) as fleet:
        begun = trio.current_time()
        async with fleet.exits(orc.BusLock, vm="guest", capacity=10, drop=drop) as exits:
            vm = await fleet.launch(blank())
            await vm.wait()
            assert trio.current_time() - begun == pytest.approx(1, abs=1e-3)
            assert exits.statistics() == orc.ExitsStatistics(received=100, missed=90, waiting=10)
            assert exits.missed == fleet.statistics().missed == 90
            assert [exit.rip async for exit in exits] == list(kept)
        assert fleet.statistics().missed == 90  # also when the channel is gone
        assert vm.statistics().bus_locks == fleet.statistics().bus_locks == 100


async def test_a_full_ring_drops_and_counts_while_the_counters_stay_exact(monkeypatch):
    rounds = RING_RECORDS + 1000
    async with play([bus_lock()] * rounds) as fleet:
        # A drain task that never comes round.
        monkeypatch.setattr(fleet._context.dispatcher, "deliver", lambda core=None, **_: False)
        monkeypatch.setattr(fleet._context.core, "may_sleep", lambda: True)
        async with fleet.exits(orc.BusLock, vm="guest") as exits:
            vm = await fleet.launch(blank())
            await vm.wait()
            assert vm.statistics().bus_locks == rounds
            assert vm.statistics().missed == fleet.statistics().missed == 1000
            assert [exit async for exit in exits] == []


async def test_retiring_a_vcpu_delivers_its_records_and_leaves_the_others_alone():
    """Whoever stops one VM does not pay for what the others do meanwhile, which may be without end."""
    core = FleetCore()
    switchboard = Dispatcher(core, paced=True)
    vcpus = [VcpuCore(core, id) for id in range(1, 33)]
    everything = switchboard.subscribe((), None, 100_000, "oldest")
    for vcpu in vcpus:
        switchboard.register(vcpu, f"vm{vcpu.id}", vcpu.id, 0)
        vcpu.subscribe((1 << 64) - 1)
        for when in range(1, 3 * FleetCore.BATCH + 1):
            lib.orc_vcpu_account(vcpu.handle, build("hlt"), when)
    taken = switchboard.deliver()  # of some vCPU this batch was taken before: what is left of it comes in order
    dying, *others = vcpus
    switchboard.retire([dying])
    assert taken == FleetCore.BATCH
    of_dying = 3 * FleetCore.BATCH
    assert everything.statistics().received in (of_dying, of_dying + taken)
    dying.close()
    seen: dict[str, list[int]] = {}
    while switchboard.deliver():
        pass
    while everything.statistics().waiting:
        exit = everything.receive_nowait()
        seen.setdefault(exit.vm, []).append(exit.time)
    assert seen == {f"vm{id}": list(range(1, of_dying + 1)) for id in range(1, 33)}
    for vcpu in others:
        vcpu.close()
    core.close()


async def test_a_subscriber_that_keeps_up_misses_nothing(autojump_clock):
    async with play([bus_lock(rip=number) for number in range(20_000)]) as fleet:
        async with fleet.exits(orc.BusLock, vm="guest", capacity=20_000) as exits:
            vm = await fleet.launch(blank())
            assert [exit.rip async for exit in exits] == list(range(20_000))
            assert exits.missed == vm.statistics().missed == fleet.statistics().missed == 0


@pytest.mark.kvm
async def test_a_storm_on_real_threads_is_told_in_order_or_counted_as_missed(nothing_left):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        async with fleet.exits(orc.Io, capacity=100_000) as exits:
            vms = [await fleet.launch(stage.spec("storm", f"storm-{n}")) for n in range(2)]
            with trio.fail_after(30):
                got = [await exits.receive() for _ in range(5000)]
            for vm in vms:
                await vm.stop()
            received = exits.statistics().received
        for vm in vms:
            times = [exit.time for exit in got if exit.vm == vm.name]
            assert times == sorted(times)
        assert received + sum(vm.statistics().missed for vm in vms) == sum(vm.statistics().exits["io"] for vm in vms)


# ---- ends


async def test_the_channel_ends_with_its_vm_after_everything_was_told(stage: Stage):
    async with stage.open() as fleet:
        async with fleet.exits(vm="guest") as exits:
            await fleet.launch(stage.spec("exit_port"))
            with trio.fail_after(10):
                assert [type(exit).__name__ async for exit in exits] == ["Io"]
            with pytest.raises(trio.EndOfChannel):
                await exits.receive()


async def test_the_channel_ends_with_the_fleet(stage: Stage):
    got: list[orc.Exit] = []
    ended = trio.Event()

    async def follow(fleet: orc.Fleet, task_status: trio.TaskStatus) -> None:
        async with fleet.exits() as exits:
            task_status.started()
            got.extend([exit async for exit in exits])
        ended.set()

    async with trio.open_nursery() as nursery:
        async with stage.open() as fleet:
            await nursery.start(follow, fleet)
            await (await fleet.launch(stage.spec("exit_port"))).wait()
        with trio.fail_after(10):
            await ended.wait()
    assert [type(exit).__name__ for exit in got] == ["Io"]


async def test_a_channel_opened_after_the_fleets_end_has_ended():
    async with play([]) as fleet:
        pass
    with trio.fail_after(5):
        async with fleet.exits() as exits:
            assert [exit async for exit in exits] == []


async def test_a_channel_of_one_vm_outlives_its_restarts(autojump_clock):
    fail = ScriptedExit("debug", args=(1, 0, 0, 0))
    async with play([bus_lock(), fail]) as fleet:
        async with fleet.exits(orc.BusLock, vm="guest") as exits:
            await fleet.launch(blank(restart=orc.Restart("on-failure", backoff=1, most=3)))
            assert len([exit async for exit in exits]) == 4


async def test_a_closed_channel_ends_for_whoever_waits_for_it(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
        async with trio.open_nursery() as nursery, fleet.exits() as exits:

            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await exits.receive()

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            await exits.aclose()


async def test_a_cancelled_receive_loses_nothing(autojump_clock):
    async with play([bus_lock(after=1, rip=number) for number in range(50)]) as fleet:
        got = []
        async with fleet.exits(orc.BusLock, vm="guest") as exits:
            await fleet.launch(blank())
            while len(got) < 50:
                with trio.move_on_after(0.5):
                    got.append((await exits.receive()).rip)
        assert got == list(range(50))


async def test_what_waits_can_be_taken_without_waiting(autojump_clock):
    async with play([io_write(0x80, b"x")] * 2 + [hlt()]) as fleet:
        vm = await fleet.launch(blank(), paused=True)
        async with fleet.exits(orc.Io, vm=vm) as exits, fleet.exits(orc.Io, vm=vm) as closed:
            with pytest.raises(trio.WouldBlock):
                exits.receive_nowait()
            await vm.resume()
            await vm.wait()
            assert [exits.receive_nowait().port for _ in range(2)] == [0x80, 0x80]
            with pytest.raises(trio.EndOfChannel):
                exits.receive_nowait()
            closed.close()
            assert [closed.receive_nowait().port for _ in range(2)] == [0x80, 0x80]
            with pytest.raises(trio.ClosedResourceError):
                closed.receive_nowait()


async def test_two_tasks_cant_receive_from_one_channel(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        async with trio.open_nursery() as nursery, fleet.exits() as exits:
            nursery.start_soon(exits.receive)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await exits.receive()
            nursery.cancel_scope.cancel()


async def test_iterating_over_what_is_waiting_lets_other_tasks_run(autojump_clock):
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with play([bus_lock()] * 1000) as fleet:
        async with fleet.exits(orc.BusLock, vm="guest") as exits:
            await (await fleet.launch(blank())).wait()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(count)
                before = turns
                assert len([exit async for exit in exits]) == 1000
                assert turns - before >= 10
                nursery.cancel_scope.cancel()


# ---- in batches


async def test_batches_are_what_comes_one_by_one(autojump_clock):
    script = [io_write(0x80 + n, bytes([n])) if n % 3 else bus_lock(after=0.01, rip=n) for n in range(200)]
    async with play(script) as fleet:
        async with fleet.exits(vm="guest") as exits, fleet.exits(vm="guest") as others:
            vm = await fleet.launch(blank())
            one_by_one = [exit async for exit in exits]
            batches = [batch async for batch in others.batches(most=7)]
            assert [exit for batch in batches for exit in batch] == one_by_one
            assert max(map(len, batches)) <= 7
            assert [time for batch in batches for time in batch.time] == [exit.time for exit in one_by_one]
            assert {vm for batch in batches for vm in batch.vm} == {vm.generation}
            assert others.statistics() == exits.statistics()
        assert sum(vm.statistics().exits.values()) == len(one_by_one)


async def test_a_batch_that_is_waited_for_comes_with_the_first_exit(autojump_clock):
    async with play([bus_lock(after=1, rip=1), bus_lock(after=1, rip=2), FOR_EVER]) as fleet:
        async with fleet.exits(orc.BusLock, vm="guest") as exits:
            await fleet.launch(blank())
            batches = exits.batches()
            assert [list((await anext(batches)).rip) for _ in range(2)] == [[1], [2]]
            with trio.move_on_after(1):
                await anext(batches)
            await batches.aclose()


@settings(max_examples=30, deadline=None)
@given(
    script=st.lists(st.sampled_from(["lock", "io", "mmio", "pause"]), max_size=150),
    takes=st.lists(st.tuples(st.sampled_from(["one", "now", "batch", "cancelled"]), st.integers(1, 100)), max_size=40),
    capacity=st.integers(1, 200),
    drop=st.sampled_from(["oldest", "newest"]),
)
def test_however_exits_are_taken_each_is_received_once_in_order_or_counted(script, takes, capacity, drop):
    """One by one, without waiting, in batches, and after a cancelled wait, in any order on one channel: beside one that
    is large enough for all of them, and the counters."""
    play_one = {"lock": bus_lock(), "io": io_write(0x80, b"x"), "mmio": mmio_write(0xD0000000, b"y")}

    async def main() -> None:
        steps = [play_one.get(step, bus_lock(after=0.5)) for step in script]
        async with play(steps) as fleet:
            async with fleet.exits(vm="guest") as every, fleet.exits(vm="guest", capacity=capacity, drop=drop) as some:
                vm = await fleet.launch(blank())
                got: list[orc.Exit] = []
                for how, most in takes:
                    try:
                        if how == "one":
                            got.append(await some.receive())
                        elif how == "now":
                            got.append(some.receive_nowait())
                        elif how == "batch":
                            got += await some.next_batch(most)
                        else:
                            with trio.CancelScope() as scope:
                                scope.cancel()
                                await some.next_batch(most)
                    except (trio.EndOfChannel, trio.WouldBlock):
                        pass
                    figures = some.statistics()
                    assert figures.received == figures.missed + figures.waiting + len(got)
                await vm.wait()
                got += [exit async for exit in some]
                told = [exit async for exit in every]
            assert len(told) == sum(vm.statistics().exits.values())
            figures = some.statistics()
            assert (figures.received, figures.missed, figures.waiting) == (len(told), len(told) - len(got), 0)
            places = iter(told)
            assert all(any(one == exit for one in places) for exit in got), "a part of them, in their order"
            assert fleet.statistics().missed == figures.missed

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("most", [0, -1, 10**9, True, 1.5, "7"])
async def test_a_batch_of_no_size_is_refused(most):
    async with play([]) as fleet, fleet.exits() as exits:
        with pytest.raises(orc.SpecError, match=r"most=.*: must be from 1 to 1,000,000 exits"):
            await anext(exits.batches(most))


async def test_who_waits_for_a_batch_hears_of_the_end_and_of_a_second_one(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
        async with trio.open_nursery() as nursery, fleet.exits() as exits:

            async def receive() -> None:
                assert [batch async for batch in exits.batches()] == []

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await anext(exits.batches())
            await exits.aclose()


# ---- names of VMs that have left


async def test_what_waits_of_a_vm_that_has_left_still_says_its_name(autojump_clock):
    async with play([bus_lock(rip=1), hlt()]) as fleet:
        async with fleet.exits(orc.BusLock) as exits, fleet.exits(orc.BusLock) as closed:
            for _ in range(3):
                await (await fleet.launch(blank("same"))).wait()
            closed.close()
            assert [exit.vm for exit in await exits.next_batch(10)] == ["same"] * 3
            await (await fleet.launch(blank("last"))).wait()
            assert [exits.receive_nowait().vm, *(closed.receive_nowait().vm for _ in range(3))] == ["last"] + [
                "same"
            ] * 3


async def test_exits_that_were_made_ahead_of_a_vm_that_has_left_still_come_in_a_batch(autojump_clock):
    async with play([*(bus_lock(rip=n) for n in range(5)), FOR_EVER]) as fleet:
        async with fleet.exits(orc.BusLock) as exits:
            vm = await fleet.launch(blank())
            await trio.sleep(1)
            first = await exits.receive()
            await vm.stop()
            batch = await exits.next_batch(3)
            assert [first.rip, *(exit.rip for exit in batch)] == [0, 1, 2, 3]
            assert dict(batch.vms) == {vm.generation: "guest"}
            assert exits.receive_nowait().rip == 4


async def test_exits_that_are_made_still_come_as_a_batch_once_their_vm_is_forgotten(autojump_clock):
    async with play({"noisy": [bus_lock(), bus_lock(), bus_lock(), hlt()], "quiet": [hlt()]}) as fleet:
        async with fleet.exits(orc.BusLock) as exits, fleet.exits(orc.BusLock) as closed:
            await (await fleet.launch(blank("noisy"))).wait()
            assert [exits.receive_nowait().vm, closed.receive_nowait().vm] == ["noisy"] * 2
            closed.close()
            await (await fleet.launch(blank("quiet"))).wait()  # it leaves, and no exit waits that needs a name
            for batch in (exits.next_batch_nowait(1), exits.next_batch_nowait(9), closed.next_batch_nowait(9)):
                assert {exit.vm for exit in batch} == {"noisy"}


async def test_who_never_receives_makes_no_fleet_remember_names_for_ever(autojump_clock, monkeypatch):
    monkeypatch.setattr("orchestra.fleet.channels.RETIRED", 5)
    async with play([bus_lock(), hlt()]) as fleet:
        async with fleet.exits(orc.BusLock) as exits, fleet.exits(orc.Debug) as idle:
            for n in range(8):
                await (await fleet.launch(blank(f"vm-{n}"))).wait()
            assert exits.statistics() == orc.ExitsStatistics(received=8, missed=6, waiting=2)
            assert idle.statistics() == orc.ExitsStatistics(received=0, missed=0, waiting=0)
            assert [exit.vm for exit in await exits.next_batch(10)] == ["vm-6", "vm-7"]
            assert fleet.statistics().missed == 6


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity=0"),
        ({"capacity": -1}, "capacity=-1"),
        ({"capacity": 10**9}, "capacity"),
        ({"vm": 3}, "vm=3: must be a Vm, a VM's name, or None"),
        ({"capacity": 1.5}, "capacity=1.5"),
        ({"capacity": True}, "capacity=True"),
        ({"drop": "all"}, "drop='all'"),
    ],
)
async def test_a_subscription_that_cant_be_is_refused(options, message):
    async with play([]) as fleet:
        with pytest.raises(orc.SpecError, match=message):
            async with fleet.exits(**options):
                pytest.fail("subscribed")


@pytest.mark.parametrize("kind", [int, "BusLock", orc.BusLock.__init__, None, orc.Limit])
async def test_a_kind_that_is_no_exit_is_refused(kind):
    async with play([]) as fleet:
        with pytest.raises(orc.SpecError, match="exit types"):
            async with fleet.exits(kind):
                pytest.fail("subscribed")


async def test_many_subscriptions_come_and_go_while_it_runs(autojump_clock):
    async with play(itertools.repeat(bus_lock(after=0.001))) as fleet:
        vm = await fleet.launch(blank())

        async def look(number: int) -> None:
            for _ in range(5):
                async with fleet.exits(orc.BusLock, vm=vm) as exits:
                    for _ in range(number):
                        await exits.receive()

        async with trio.open_nursery() as nursery:
            for number in range(1, 11):
                nursery.start_soon(look, number)
        assert fleet._context.event_mask("guest") == 0


# ---- a crowded loop


def test_the_pace_slows_down_while_the_loop_is_late_and_comes_back():
    pace, paces = PACE, []
    for late in [10 * LATE] * 8 + [0.0] * 40:
        pace = next_pace(pace, late)
        paces.append(pace)
    assert paces[:3] == [2 * PACE, 4 * PACE, 8 * PACE]
    assert max(paces) == SLOWEST
    assert paces[-1] == PACE


def test_a_loop_that_is_in_time_changes_nothing():
    assert next_pace(PACE, LATE) == PACE


async def test_while_the_loop_is_late_telling_makes_way(monkeypatch):
    core = FleetCore()
    board = Dispatcher(core, paced=True)
    delivered, fewest = 0, FleetCore.BATCH

    def deliver(*, most: int) -> int:
        nonlocal delivered, fewest
        delivered, fewest = delivered + 1, min(fewest, most)
        return 1  # there is always more

    monkeypatch.setattr(board, "deliver", deliver)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        for _ in range(40):  # somebody who keeps the loop for 10 ms in each of its rounds
            time.sleep(0.01)  # noqa: ASYNC251  # that is what it does
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    core.close()
    assert 1 < delivered < 30
    assert fewest == FEWEST
