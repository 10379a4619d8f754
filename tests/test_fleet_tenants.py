"""Tenants come, change and go while a fleet runs."""

from __future__ import annotations

import attrs
import pytest
import trio

import orchestra as orc
from conftest import blank, play
from orchestra.backend.scripted import bus_lock, hlt
from orchestra.journal import Journal, read_journal
from orchestra.journal.explain import explain

FOR_EVER = hlt(after=1e9)


def locks(every: float):
    while True:
        yield bus_lock(after=every)


async def test_one_that_is_added_has_vms_limits_and_a_share_at_once(autojump_clock):
    async with play(
        {name: locks(0.001) for name in ("old", "new")}, policies=[orc.WeightedShare(orc.Limit(rate=120))]
    ) as fleet:
        await fleet.launch(blank("old"))
        with pytest.raises(orc.UnknownTenant, match=r"this fleet has: default\. `await fleet\.add_tenant"):
            await fleet.launch(attrs.evolve(blank("new"), tenant="acme"))
        await fleet.add_tenant(orc.Tenant("acme", weight=3, limit=orc.Limit(rate=1000)))
        vm = await fleet.launch(attrs.evolve(blank("new"), tenant="acme"))
        await trio.sleep(20)
        before = vm.statistics().bus_locks
        await trio.sleep(50)
        assert vm.statistics().bus_locks - before == pytest.approx(50 * 90, rel=0.05)
        await fleet.change_tenant(orc.Tenant("acme", weight=1, limit=orc.Limit(rate=1000)))
        await trio.sleep(20)
        before = vm.statistics().bus_locks
        await trio.sleep(50)
        assert vm.statistics().bus_locks - before == pytest.approx(50 * 60, rel=0.05)
        told = fleet.statistics().tenants["acme"]
        assert (told.weight, told.vms, told.limit.rate) == (1, 1, 1000)


async def test_a_changed_limit_ends_a_wait_in_progress(autojump_clock):
    async with play(locks(0.001), tenants={"acme": orc.Limit(rate=0.001, burst=1)}) as fleet:
        vm = await fleet.launch(attrs.evolve(blank("a"), tenant="acme"))
        await trio.sleep(5)
        assert vm.throttled
        await fleet.change_tenant(orc.Tenant("acme"))
        await trio.sleep(1)
        assert vm.statistics().bus_locks > 500


async def test_one_that_is_removed_leaves_its_figures_in_the_sums(autojump_clock, nothing_left):
    async with play([bus_lock(after=0.1)] * 5 + [FOR_EVER], tenants={"acme": None}) as fleet:
        for name in ("stopped", "ended"):
            await fleet.launch(attrs.evolve(blank(name), tenant="acme"))
        await trio.sleep(1)
        with pytest.raises(orc.StateError, match=r"VMs that have not ended \(ended, stopped\): stop them first"):
            await fleet.remove_tenant("acme")
        for name in ("stopped", "ended"):
            await fleet.vm(name).stop()
        await fleet.remove_tenant("acme")
        assert fleet.statistics().bus_locks == 10
        assert set(fleet.statistics().tenants) == {"default"}
        assert set(fleet.tenants) == {"default"}
        with pytest.raises(orc.UnknownTenant):
            await fleet.set_limit(None, tenant="acme")
        await fleet.add_tenant(orc.Tenant("acme"))  # another one of that name
        assert fleet.statistics().tenants["acme"].bus_locks == 0


async def test_one_whose_vms_ended_by_themselves_takes_them_along(autojump_clock):
    async with play([bus_lock(), hlt()], tenants={"acme": None}) as fleet:
        vm = await fleet.launch(attrs.evolve(blank("a"), tenant="acme"))
        await vm.wait()
        await fleet.remove_tenant("acme")
        assert "a" not in fleet.vms
        assert vm.statistics().bus_locks == 1


async def test_what_a_policy_held_a_removed_tenant_to_is_forgotten(autojump_clock):
    limits = orc.StaticLimits(tenants={"acme": orc.Limit(rate=5)})
    async with play([FOR_EVER], tenants={"acme": None}, policies=[limits]) as fleet:
        await trio.sleep(2)
        assert fleet.statistics().tenants["acme"].limit.rate == 5
        await fleet.remove_tenant("acme")
        await fleet.set_policies([])
        assert [one for one in fleet.actions() if one.outcome == "failed"] == []


async def test_of_one_that_was_removed_nothing_is_in_force_for_the_next_of_its_name(tmp_path, autojump_clock):
    path = tmp_path / "fleet.db"
    held = orc.StaticLimits(tenants={"acme": orc.Limit(rate=500)}, name="held")
    tenant = orc.Tenant("acme", limit=orc.Limit(rate=300), exit_limit=orc.Limit(rate=400))
    async with play(locks(0.1), journal=Journal(path), tenants=[tenant], policies=[held]) as fleet:
        await trio.sleep(2.5)
        await fleet.remove_tenant("acme")
        await fleet.set_policies([])
        await fleet.add_tenant(orc.Tenant("acme"))
        await fleet.launch(attrs.evolve(blank("a"), tenant="acme"))
        await trio.sleep(70)
    with read_journal(path) as journal:
        told = explain(journal, "a", max(row.time for row in journal.aggregates(vm="a")) - 10_000_000_000)
        assert not told.gone
        assert [hold for hold in told.holds if hold.where == "tenant"] == []


async def test_changes_are_journaled_as_limits_that_a_caller_set(tmp_path, autojump_clock):
    path = tmp_path / "fleet.db"
    async with play(locks(0.01), journal=Journal(path)) as fleet:
        await fleet.add_tenant(orc.Tenant("acme", limit=orc.Limit(rate=10, burst=1)))
        await fleet.launch(attrs.evolve(blank("a"), tenant="acme"))
        await trio.sleep(90)
        reasons = [one.action.reason for one in fleet.actions()]
        assert reasons == ["add_tenant('acme')"]
        await fleet.change_tenant(orc.Tenant("acme", weight=5, limit=orc.Limit(rate=10, burst=1)))
        assert len(fleet.actions()) == 1  # a weight is no limit
    with read_journal(path) as journal:
        told = explain(journal, "a", max(row.time for row in journal.aggregates(vm="a")))
        assert (told.causes[0].kind, told.causes[0].where, told.causes[0].meter) == ("limit", "tenant", "bus_locks")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda fleet: fleet.add_tenant("acme"), orc.SpecError, "tenant='acme': must be a Tenant"),
        (lambda fleet: fleet.add_tenant(orc.Tenant("default")), orc.StateError, "`change_tenant` changes it"),
        (lambda fleet: fleet.change_tenant(orc.Tenant("nobody")), orc.UnknownTenant, "no such tenant"),
        (lambda fleet: fleet.remove_tenant("nobody"), orc.UnknownTenant, "no such tenant"),
        (lambda fleet: fleet.remove_tenant("default"), orc.StateError, "VMs whose spec names none belong to it"),
        (
            lambda fleet: fleet.add_tenant(orc.Tenant("acme", limit=orc.Limit(rate=1))),
            orc.BusLockUnsupported,
            "tenant 'acme': limit",
        ),
    ],
)
async def test_what_can_not_be_meant_is_refused_and_nothing_has_changed(autojump_clock, call, error, message):
    async with play([FOR_EVER], bus_locks="off") as fleet:
        with pytest.raises(error, match=message):
            await call(fleet)
        assert set(fleet.tenants) == {"default"}
