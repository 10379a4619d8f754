"""Whoever watches a fleet hears what each vCPU, VM and tenant did, by exit reason, and misses nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
import trio.testing

import orchestra as orc
from conftest import blank, play
from orchestra.backend.scripted import bus_lock, hlt, io_write


def noisy(vcpu: int):
    """Each vCPU another rate: its locks and its writes, a second apart."""
    for _ in range(4):
        for number in range(vcpu + 1):
            yield bus_lock(after=0 if number else 0.5)
        yield io_write(0x80, b"\x01", after=0.5)
    yield hlt()


async def test_vcpus_reasons_and_tenants_are_told_apart(autojump_clock):
    scripts = {"a": lambda vcpu: noisy(vcpu), "b": lambda vcpu: [bus_lock(after=0.25), hlt(after=1e9)]}

    async with orc.open_fleet(
        backend=orc.ScriptedBackend(lambda spec, vcpu: scripts[spec.name](vcpu)), tenants=[orc.Tenant("acme")]
    ) as fleet:
        await fleet.launch(blank("a", tenant="acme", vcpus=2))
        await fleet.launch(blank("b"))
        async with fleet.watch(1.1) as watch:
            facts = await anext(watch)
    assert facts.interval == pytest.approx(1.1)
    a, b = facts.vms["a"], facts.vms["b"]
    assert [(vcpu.index, vcpu.bus_locks, vcpu.exits) for vcpu in a.by_vcpu] == [(0, 1, 2), (1, 2, 3)]
    assert a.by_reason == {"x86_bus_lock": 3, "io": 2}
    assert (a.bus_locks, a.exits, a.cpu) == (3, 5, None)
    assert b.by_reason == {"x86_bus_lock": 1}
    acme, default = facts.by_tenant["acme"], facts.by_tenant["default"]
    assert (acme.vms, acme.bus_locks, acme.exits) == (1, 3, 5)
    assert (default.vms, default.bus_locks, default.exits) == (1, 1, 1)
    assert acme.cpu is None  # scripted VMs have no threads: unknown, and not 0
    assert facts.by_tenant is facts.by_tenant


async def test_watchers_of_different_intervals_each_hear_everything_once(autojump_clock):
    heard: dict[float, Counter[str]] = {}

    async def listen(fleet: orc.Fleet, interval: float, *, task_status: trio.TaskStatus[None]) -> None:
        async with fleet.watch(interval) as watch:
            task_status.started()
            async for facts in watch:
                for vm in facts.vms.values():
                    heard.setdefault(interval, Counter()).update(vm.by_reason)

    async with play(noisy(1)) as fleet, trio.open_nursery() as nursery:
        for interval in (0.3, 0.7, 2.0):
            await nursery.start(listen, fleet, interval)
        vm = await fleet.launch(blank())
        await vm.wait()
        await trio.sleep(2.1)
        nursery.cancel_scope.cancel()
        told = Counter(vm.statistics().exits)
    assert told == {"x86_bus_lock": 8, "io": 4, "hlt": 1}
    assert heard == dict.fromkeys((0.3, 0.7, 2.0), told)


async def test_who_comes_late_gets_the_next_over_a_longer_time_and_the_rhythm_stays(autojump_clock):
    # Never at the same time as the watch: which of the two comes first is trio's to choose.
    async with play([bus_lock(after=0.48) for _ in range(20)]) as fleet:
        await fleet.launch(blank())
        async with fleet.watch(1.0) as watch:
            assert (await anext(watch)).vms["guest"].bus_locks == 2
            await trio.sleep(3.2)
            late = await anext(watch)
            assert (late.interval, late.vms["guest"].bus_locks) == (pytest.approx(3.2), 6)
            after = await anext(watch)
            assert after.interval == pytest.approx(0.8)


async def test_cancelled_it_loses_nothing(autojump_clock):
    async with play([bus_lock(after=0.45) for _ in range(4)]) as fleet:
        await fleet.launch(blank())
        async with fleet.watch(1.0) as watch:
            for _ in range(3):
                with trio.move_on_after(0.3) as scope:
                    await anext(watch)
                assert scope.cancelled_caught
            assert (await anext(watch)).vms["guest"].bus_locks == 2


async def test_one_task_at_a_time_and_none_after_the_block(autojump_clock):
    async with play([hlt(after=1e9)]) as fleet:
        async with fleet.watch() as watch, trio.open_nursery() as nursery:
            nursery.start_soon(anext, watch)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await anext(watch)
        assert [facts async for facts in watch] == []


@pytest.mark.parametrize("interval", [0, -1, 1e-4, float("inf"), float("nan"), True, "1"])
async def test_an_interval_that_can_not_be_is_refused_by_name(interval):
    async with play([hlt()]) as fleet:
        with pytest.raises(orc.SpecError, match="interval="):
            async with fleet.watch(interval):
                pass


async def test_guests_cpu_time_is_told_by_vcpu(stage):
    async with stage.open() as fleet, fleet.watch(0.05) as watch:
        await fleet.launch(stage.spec("spin", vcpus=stage.vcpus))
        if not stage.executes:
            assert (await anext(watch)).vms == {}
            return
        seen: Counter[int] = Counter()
        with trio.fail_after(30):
            async for facts in watch:
                for vcpu in facts.vms["guest"].by_vcpu if "guest" in facts.vms else ():
                    assert vcpu.cpu is not None
                    seen[vcpu.index] += vcpu.cpu > 0
                if len(+seen) == stage.vcpus:
                    break


async def test_a_watch_ends_with_its_fleet_and_a_closed_fleet_has_none(autojump_clock):
    heard: list[orc.Facts] = []

    async def listen(fleet: orc.Fleet, *, task_status: trio.TaskStatus[None]) -> None:
        async with fleet.watch(1.0) as watch:
            task_status.started()
            heard.extend([facts async for facts in watch])

    async with trio.open_nursery() as outer:
        async with play([hlt(after=1e9)]) as fleet:
            await outer.start(listen, fleet)
            await trio.sleep(2.5)
    assert len(heard) == 2
    with pytest.raises(orc.StateError, match="closed"):
        async with fleet.watch():
            pass


async def test_what_was_told_before_a_watch_was_opened_is_not_told_to_it(autojump_clock):
    async with play([hlt(after=1e9)]) as fleet:
        vm = await fleet.launch(blank())
        async with fleet.watch(1.0) as first:
            await anext(first)
            vm.report_work(5)
            async with fleet.watch(1.0) as second:  # at the very moment of the first one's look
                vm.report_work(2)
                assert (await anext(first)).vms["guest"].work == 7
                assert (await anext(second)).vms["guest"].work == 2
