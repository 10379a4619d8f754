"""Many VMs: limits at every level and live, tenants and names, actions and the journal, what a host can run out of."""

from __future__ import annotations

import errno
import itertools
import os
import re
import resource
from collections.abc import Iterable

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import orchestra as orc
from conftest import Stage, blank, emulated_problem, play
from orchestra.backend.emulated import library
from orchestra.backend.scripted import ScriptedExit, bus_lock, hlt, io_write
from orchestra.journal import Journal, read_journal
from orchestra.machine.control import VmControl
from orchestra.machine.restraint import Restraint
from orchestra.model.actions import Applied
from orchestra.native import lib
from orchestra.profile import Row

FOR_EVER = hlt(after=1e9)
FAIL = ScriptedExit("debug", args=(1, 0, 0, 0))
LEVELS = ["host", "tenant", "vm", "vcpu"]
TIGHT = {"rate": 0.01, "burst": 1, "max_delay": None}


METERS = [str(meter) for meter in orc.Meter]


class Sink:
    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None: ...


SINK = [(range(0x500, 0x501), None, Sink())]
"""Devices for a VM whose events are answered by Python."""


def events(meter: str, count: int) -> list[ScriptedExit]:
    """As many events of that meter, and an end that is not one. The VM has `SINK`."""
    one = {"bus_locks": bus_lock(), "exits": io_write(0x80, b"x"), "answers": io_write(0x500, b"x")}
    return [one[meter]] * count


def limited(level: str, meter: str, limit: orc.Limit | None) -> tuple[dict, dict]:
    """Options of the fleet and of the spec that set a limit at a level."""
    field = orc.Meter(meter).field
    match level:
        case "host":
            return {field: limit}, {}
        case "tenant":
            return {"tenants": [orc.Tenant("acme", **{field: limit})]}, {"tenant": "acme"}
        case "vm":
            return {}, {field: limit}
    return {}, {f"vcpu_{field}": limit}


def place(level: str, meter: str) -> dict:
    """Arguments of `Fleet.set_limit` for a level."""
    more = {"host": {}, "tenant": {"tenant": "acme"}, "vm": {"vm": "guest"}, "vcpu": {"vm": "guest", "vcpu": 0}}
    return {"meter": meter, **more[level]}


# ---- limits: exact counts and exact times


async def test_a_thousand_locks_at_a_hundred_a_second_take_ten_seconds(autojump_clock):
    async with play([bus_lock()] * 1000, limit=orc.Limit(rate=100, burst=1)) as fleet:
        begun = trio.current_time()
        vm = await fleet.launch(blank())
        await vm.wait()
        assert 9.99 <= trio.current_time() - begun <= 10.0001
        assert vm.statistics().bus_locks == 1000
        assert vm.statistics().throttled_seconds == pytest.approx(trio.current_time() - begun)
        assert vm.statistics().released == 0


@pytest.mark.parametrize("meter", METERS)
@pytest.mark.parametrize("level", LEVELS)
async def test_a_limit_holds_at_every_level_and_on_each_meter(autojump_clock, level, meter):
    options, fields = limited(level, meter, orc.Limit(rate=10, burst=5))
    async with play(events(meter, 105), **options) as fleet:
        begun = trio.current_time()
        vm = await fleet.launch(blank(**fields), devices=SINK)
        await vm.wait()
        # The HLT at the end is an exit too, but nothing has to wait behind it.
        assert trio.current_time() - begun == pytest.approx((105 - 4) / 10, abs=1e-3)


@pytest.mark.parametrize("meter", METERS)
async def test_in_no_window_are_there_more_than_burst_and_rate_allow(autojump_clock, meter):
    limit = orc.Limit(rate=10, burst=3)
    options, fields = limited("vm", meter, limit)
    script = [*events(meter, 20), *(ScriptedExit("intr", after=7) for _ in range(1)), *events(meter, 20)]
    async with play(script, **options) as fleet:
        async with fleet.exits(vm="guest") as exits:
            await fleet.launch(blank(**fields), devices=SINK)
            times = [exit.time / 1e9 async for exit in exits if not isinstance(exit, orc.Hlt | orc.Interrupted)]
    assert len(times) == 40
    for first, last in itertools.combinations(range(40), 2):
        assert last - first + 1 <= limit.burst + limit.rate * (times[last] - times[first]) + 1e-3


@pytest.mark.parametrize("level", LEVELS)
async def test_the_slowest_of_stacked_limits_counts(autojump_clock, level):
    fast, slow = orc.Limit(rate=1000, burst=1), orc.Limit(rate=10, burst=1)
    at = {name: slow if name == level else fast for name in LEVELS}
    async with play(
        [bus_lock()] * 50, limit=at["host"], tenants={"acme": at["tenant"]}, exit_limit=orc.Limit(rate=500, burst=1)
    ) as fleet:
        begun = trio.current_time()
        vm = await fleet.launch(blank(tenant="acme", limit=at["vm"], vcpu_limit=at["vcpu"]))
        await vm.wait()
        assert trio.current_time() - begun == pytest.approx(5, abs=1e-2)


async def test_vms_share_their_tenants_limit_and_another_tenant_has_its_own(autojump_clock):
    ended: dict[str, float] = {}
    tenants = {"acme": orc.Limit(rate=20, burst=1), "other": orc.Limit(rate=20, burst=1)}
    async with play([bus_lock()] * 100, tenants=tenants) as fleet:
        begun = trio.current_time()

        async def run(name: str, tenant: str) -> None:
            vm = await fleet.launch(blank(name, tenant=tenant))
            await vm.wait()
            ended[name] = trio.current_time() - begun

        async with trio.open_nursery() as nursery:
            for name, tenant in [("a", "acme"), ("b", "acme"), ("c", "other")]:
                nursery.start_soon(run, name, tenant)
        assert ended["c"] == pytest.approx(5, abs=0.01)
        assert max(ended["a"], ended["b"]) == pytest.approx(10, abs=0.01)
        assert min(ended["a"], ended["b"]) == pytest.approx(10, abs=0.2)  # in turns
        statistics = fleet.statistics().tenants
        assert {name: statistics[name].bus_locks for name in ("acme", "other", "default")} == {
            "acme": 200,
            "other": 100,
            "default": 0,
        }


async def test_each_vcpu_has_its_own_limit_and_all_share_the_vms(autojump_clock):
    async with play([bus_lock()] * 10) as fleet:
        begun = trio.current_time()
        vm = await fleet.launch(blank("each", vcpus=4, vcpu_limit=orc.Limit(rate=10, burst=1)))
        await vm.wait()
        assert trio.current_time() - begun == pytest.approx(1, abs=0.01)
        begun = trio.current_time()
        vm = await fleet.launch(blank("all", vcpus=4, limit=orc.Limit(rate=10, burst=1)))
        await vm.wait()
        assert trio.current_time() - begun == pytest.approx(4, abs=0.01)
        assert [vcpu.bus_locks for vcpu in vm.statistics().vcpus] == [10] * 4


@pytest.mark.parametrize("meter", METERS)
@pytest.mark.parametrize("level", LEVELS)
async def test_a_limit_lifted_in_the_middle_of_a_wait_ends_it_at_once(autojump_clock, level, meter):
    options, fields = limited(level, meter, orc.Limit(**TIGHT))
    async with play(events(meter, 100), **options) as fleet:
        vm = await fleet.launch(blank(**fields), devices=SINK)
        await trio.sleep(1)
        assert vm.throttled
        begun = trio.current_time()
        await fleet.set_limit(None, **place(level, meter))
        await vm.wait()
        assert trio.current_time() == begun
        assert vm.statistics().released == 0
        assert vm.statistics().throttled_seconds == pytest.approx(1)


@pytest.mark.parametrize("meter", METERS)
@pytest.mark.parametrize("level", LEVELS)
async def test_a_limit_set_and_changed_while_it_runs_takes_effect_at_once(autojump_clock, level, meter):
    options, fields = limited(level, meter, None)
    event = events(meter, 1)[0]
    script = itertools.repeat(ScriptedExit(event.reason, 0.001, event.flags, None, event.args, event.data))

    async with play(script, **options) as fleet:
        vm = await fleet.launch(blank(**fields), devices=SINK)

        async def rate(seconds: float) -> float:
            before = sum(vm.statistics().exits.values())
            await trio.sleep(seconds)
            return (sum(vm.statistics().exits.values()) - before) / seconds

        assert await rate(1) == pytest.approx(1000, rel=0.01)
        await fleet.set_limit(orc.Limit(rate=10, burst=2), **place(level, meter))
        assert await rate(10) == pytest.approx(10, rel=0.1)
        await fleet.set_limit(orc.Limit(rate=100, burst=2), **place(level, meter))
        assert await rate(10) == pytest.approx(100, rel=0.02)
        await fleet.set_limit(None, **place(level, meter))
        assert await rate(1) == pytest.approx(1000, rel=0.01)


@pytest.mark.kvm
@pytest.mark.parametrize("level", LEVELS)
async def test_a_limit_changed_ends_a_wait_on_a_thread(nothing_left, level):
    stage = Stage("kvm")
    options, fields = limited(level, "exits", orc.Limit(**TIGHT))
    async with stage.open(**options) as fleet:
        vm = await fleet.launch(stage.spec("ports", **fields))
        with trio.fail_after(10):
            while not vm.throttled:
                await trio.lowlevel.checkpoint()
            await fleet.set_limit(None, **place(level, "exits"))
            assert await vm.wait() == orc.Halted()


async def test_max_delay_bounds_a_wait_and_releases_are_counted(autojump_clock):
    async with play([bus_lock()] * 10, limit=orc.Limit(rate=0.1, burst=1, max_delay=2)) as fleet:
        begun = trio.current_time()
        vm = await fleet.launch(blank())
        await vm.wait()
        assert trio.current_time() - begun == pytest.approx(20)
        assert vm.statistics().released == fleet.statistics().released == 10
        assert fleet.statistics().tenants["default"].released == 10


async def test_a_vm_that_waits_is_not_held_up_by_others_limits(autojump_clock):
    async with play([bus_lock()] * 10) as fleet:
        slow = await fleet.launch(blank("slow", limit=orc.Limit(**TIGHT)))
        fast = await fleet.launch(blank("fast"))
        begun = trio.current_time()
        await fast.wait()
        assert trio.current_time() == begun
        assert slow.throttled


# ---- throttles: actions on top of limits


@pytest.mark.parametrize("where", [{}, {"tenant": "acme"}, {"vm": "guest"}])
async def test_a_throttle_never_loosens_and_unthrottle_gives_the_limit_back(autojump_clock, where):
    limit = orc.Limit(rate=50, burst=2)
    level = "tenant" if "tenant" in where else "vm" if where else "host"
    options, fields = limited(level, "bus_locks", limit)
    options.setdefault("tenants", [orc.Tenant("acme")])
    async with play(itertools.repeat(bus_lock(after=0.001)), **options) as fleet:
        vm = await fleet.launch(blank(**{"tenant": "acme", **fields}))

        async def rate() -> float:
            before = vm.statistics().bus_locks
            await trio.sleep(10)
            return (vm.statistics().bus_locks - before) / 10

        assert await rate() == pytest.approx(50, rel=0.02)
        await fleet.apply(orc.Throttle(limit=orc.Limit(rate=500, burst=100), **where))
        assert await rate() == pytest.approx(50, rel=0.02)
        await fleet.apply(orc.Throttle(limit=orc.Limit(rate=5, burst=2), **where))
        assert await rate() == pytest.approx(5, rel=0.1)
        await fleet.set_limit(orc.Limit(rate=100, burst=2), **where)
        assert await rate() == pytest.approx(5, rel=0.1)
        await fleet.apply(orc.Unthrottle(**where))
        assert await rate() == pytest.approx(100, rel=0.02)
        await fleet.apply(orc.Unthrottle(**where))  # there is none any more
        assert [applied.error for applied in fleet.actions()] == [None] * 5
        assert [type(applied.action).__name__ for applied in fleet.actions()][2] == "SetLimit"


async def test_a_throttle_with_a_shorter_max_delay_does_not_loosen(autojump_clock):
    limit = orc.Limit(rate=1, burst=1, max_delay=None)
    async with play(itertools.repeat(bus_lock()), limit=limit) as fleet:
        vm = await fleet.launch(blank())
        await fleet.apply(orc.Throttle(limit=orc.Limit(rate=0.5, burst=1, max_delay=0.001)))
        await trio.sleep(10)
        assert vm.statistics().bus_locks <= 11


async def test_actions_do_what_they_say_and_are_journaled_with_their_reason(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank())
        pause = orc.Pause(vm="guest", reason="too loud", evidence={"rate": 5})
        applied = await fleet.apply(pause)
        assert vm.state == "paused"
        assert applied == fleet.actions()[0]
        assert (applied.action, applied.policy, applied.error) == (pause, None, None)
        await fleet.apply(orc.Resume(vm="guest"))
        assert vm.state == "running"
        await fleet.apply(orc.Stop(vm="guest", reason="enough"))
        assert vm.outcome == orc.Stopped("enough")
        assert [type(applied.action).__name__ for applied in fleet.actions()] == ["Pause", "Resume", "Stop"]


async def test_kill_ends_a_vm_that_would_be_restarted(autojump_clock):
    async with play([FAIL]) as fleet:
        vm = await fleet.launch(blank(restart=orc.Restart("on-failure", backoff=10, backoff_max=10)))
        await trio.sleep(1)
        await fleet.apply(orc.Kill(vm="guest"))
        await trio.sleep(100)
        assert isinstance(vm.outcome, orc.Failed)
        assert "guest" not in fleet.vms


@pytest.mark.parametrize(
    "action",
    [
        orc.Pause(vm="nobody"),
        orc.Resume(vm="nobody"),
        orc.Stop(vm="nobody"),
        orc.Kill(vm="nobody"),
        orc.Throttle(vm="nobody", limit=orc.Limit(rate=1)),
        orc.Throttle(tenant="nobody", limit=orc.Limit(rate=1)),
        orc.Pause(vm="ended"),
        orc.Throttle(vm="ended", limit=orc.Limit(rate=1)),
    ],
)
async def test_an_action_that_cant_be_done_is_journaled_with_the_error(action):
    async with play([hlt()]) as fleet:
        await (await fleet.launch(blank("ended"))).wait()
        applied = await fleet.apply(action)
        assert applied.error
        assert fleet.actions() == (applied,)


async def test_what_is_no_action_is_refused():
    async with play([]) as fleet:
        for wrong in (None, "stop", orc.Limit(rate=1)):
            with pytest.raises(orc.SpecError, match="must be one of orchestra's actions"):
                await fleet.apply(wrong)
        assert fleet.actions() == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vm": "nobody"}, orc.UnknownVm, "nobody"),
        ({"tenant": "nobody"}, orc.UnknownTenant, "nobody"),
        ({"vm": "guest", "tenant": "default"}, orc.SpecError, "name one of them"),
        ({"vcpu": 0}, orc.SpecError, "name its vm"),
        ({"vm": "guest", "vcpu": 5}, orc.SpecError, "vCPUs 0 to 0"),
        ({"meter": "joules"}, orc.SpecError, "joules"),
        ({"limit": 5}, orc.SpecError, "must be a Limit"),
    ],
)
async def test_a_limit_that_cant_be_meant_is_refused(arguments, error, message):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
        with pytest.raises(error, match=message):
            await fleet.set_limit(**{"limit": orc.Limit(rate=1), **arguments})


async def test_an_old_handle_does_not_change_the_limit_of_a_new_vm_of_its_name():
    async with play({"guest": [hlt()]}) as fleet:
        old = await fleet.launch(blank())
        await old.wait()
        new = await fleet.launch(blank(limit=orc.Limit(rate=7)), paused=True)
        with pytest.raises(orc.StateError, match="ended"):
            await old.set_limit(None)
        assert new.statistics().limit == orc.Limit(rate=7)


# ---- bus locks seen or not


async def test_require_refuses_before_anything_runs_where_they_cant_be_seen():
    backend = orc.ScriptedBackend({}, detection=None)
    with pytest.raises(orc.BusLockUnsupported, match="orchestra doctor"):
        async with orc.open_fleet(backend=backend, bus_locks="require"):
            pytest.fail("opened")


@pytest.mark.parametrize(
    "options",
    [{"limit": orc.Limit(rate=1)}, {"tenants": {"acme": orc.Limit(rate=1)}}],
)
@pytest.mark.parametrize(("bus_locks", "error"), [("auto", orc.BusLockUnsupported), ("off", orc.SpecError)])
async def test_a_limit_on_what_is_not_seen_is_refused(options, bus_locks, error):
    with pytest.raises(error, match=r"limit|tenants"):
        async with orc.open_fleet(backend=orc.ScriptedBackend({}, detection=None), bus_locks=bus_locks, **options):
            pytest.fail("opened")


@pytest.mark.parametrize(("detection", "bus_locks"), [(None, "auto"), ("trap-like", "off")])
async def test_where_they_are_not_seen_everything_else_works_and_limits_are_refused(detection, bus_locks):
    limit = orc.Limit(rate=1)
    backend = orc.ScriptedBackend({"guest": [bus_lock(), io_write(0x80, b"x"), FOR_EVER]}, detection=detection)
    async with orc.open_fleet(backend=backend, bus_locks=bus_locks) as fleet:
        for wrong in ({"limit": limit}, {"vcpu_limit": limit}):
            with pytest.raises(orc.BusLockUnsupported, match="exit_limit"):
                await fleet.launch(blank(**wrong))
        vm = await fleet.launch(blank(exit_limit=orc.Limit(rate=1000)))
        await wait_all_tasks_blocked()
        for where in ({}, {"tenant": "default"}, {"vm": "guest"}):
            with pytest.raises(orc.BusLockUnsupported):
                await fleet.set_limit(limit, **where)
            assert "does not see" in (await fleet.apply(orc.Throttle(limit=limit, **where))).error
        await fleet.set_limit(None)
        statistics = fleet.statistics()
        assert (statistics.bus_lock_detection, statistics.bus_locks) == (None, None)
        assert statistics.tenants["default"].bus_locks is None
        assert vm.statistics().bus_locks is None
        assert vm.statistics().exits == {"io": 1}


async def test_the_way_they_are_reported_is_part_of_the_statistics():
    for detection in ("fault-like", "trap-like"):
        async with orc.open_fleet(
            backend=orc.ScriptedBackend({}, detection=detection), bus_locks="require", limit=orc.Limit(rate=1)
        ) as fleet:
            assert fleet.statistics().bus_lock_detection == detection
            assert fleet.statistics().bus_locks == 0


# ---- names and tenants


async def test_a_name_in_use_is_refused_and_free_again_after_the_end(stage: Stage):
    async with stage.open() as fleet:
        first = await fleet.launch(stage.spec("spin"))
        with pytest.raises(orc.VmExists, match=r"name='guest'.*running"):
            await fleet.launch(stage.spec("spin"))
        assert fleet.vms["guest"] is first
        await first.stop()
        second = await fleet.launch(stage.spec("halt"))
        await second.wait()
        third = await fleet.launch(stage.spec("halt"))  # it ended by itself and was not stopped
        await third.wait()
        assert fleet.vms["guest"] is third
        with pytest.raises(orc.GuestMemoryError, match="released"):
            second.read_memory(0, 1)
        await second.stop()
        assert fleet.vms["guest"] is third
        assert fleet.statistics().launched == 3
        assert fleet.statistics().exits == {"hlt": 2}


async def test_of_two_launches_under_one_name_at_once_one_is_refused(stage: Stage):
    results: list[object] = []
    async with stage.open() as fleet:

        async def launch() -> None:
            try:
                results.append(await fleet.launch(stage.spec("spin")))
            except orc.VmExists as error:
                results.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(launch)
            nursery.start_soon(launch)
        assert sorted(type(result).__name__ for result in results) == ["Vm", "VmExists"]


async def test_an_unknown_tenant_is_named_with_those_that_there_are():
    async with play([], tenants={"acme": None, "zeta": orc.Limit(rate=1)}) as fleet:
        with pytest.raises(orc.UnknownTenant, match=r"'nobody'.*acme, default, zeta"):
            await fleet.launch(blank(tenant="nobody"))
        assert dict(fleet.vms) == {}


@pytest.mark.parametrize(
    ("tenants", "message"),
    [({"a": 5}, "must be a Tenant"), ({"a": orc.Tenant("b")}, "must be the same"), ([5], "must be a Tenant")],
)
async def test_tenants_that_cant_be_are_refused(tenants, message):
    with pytest.raises(orc.SpecError, match=message):
        async with play([], tenants=tenants):
            pytest.fail("opened")


async def test_an_unknown_vm_is_named_with_those_that_there_are():
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank("here"))
        with pytest.raises(orc.UnknownVm, match=r"'there'.*here"):
            fleet.vm("there")


async def test_the_default_tenant_may_have_a_limit(autojump_clock):
    async with play([bus_lock()] * 10, tenants={"default": orc.Limit(rate=10, burst=1)}) as fleet:
        begun = trio.current_time()
        await (await fleet.launch(blank())).wait()
        assert trio.current_time() - begun == pytest.approx(1, abs=1e-3)


# ---- figures


async def test_statistics_sum_up_over_vms_that_are_there_and_gone(autojump_clock):
    scripts = {"a": [bus_lock()] * 3, "b": [bus_lock(), FOR_EVER], "c": [io_write(0x80, b"x"), FAIL]}
    async with play(scripts, tenants={"acme": None}) as fleet:
        a = await fleet.launch(blank("a", tenant="acme", vcpus=2))
        await fleet.launch(blank("b"))
        c = await fleet.launch(blank("c"))
        await trio.sleep(1)
        statistics = fleet.statistics()
        assert (statistics.vms, statistics.vcpus, statistics.launched) == (1, 1, 3)
        assert statistics.states == {"stopped": 1, "running": 1, "failed": 1}
        assert statistics.bus_locks == 7
        assert statistics.exits == {"x86_bus_lock": 7, "io": 1, "debug": 1, "hlt": 2}
        assert (statistics.tenants["acme"].bus_locks, statistics.tenants["acme"].exits) == (6, 8)
        await a.stop()
        await c.stop()
        after = fleet.statistics()
        assert (after.bus_locks, after.exits, after.states) == (7, statistics.exits, {"running": 1})


# ---- the end


async def test_a_fleet_of_no_vms_opens_and_closes(stage: Stage):
    async with stage.open() as fleet:
        assert dict(fleet.vms) == {}
        assert fleet.statistics().vms == 0
        assert await fleet.stop() == {}


async def test_leaving_the_block_stops_what_runs(stage: Stage):
    async with stage.open() as fleet:
        vms = [
            await fleet.launch(stage.spec("spin", f"vm-{n}", vcpus=stage.vcpus), paused=n % 2 == 0) for n in range(4)
        ]
    assert [vm.outcome for vm in vms] == [orc.Stopped("the fleet was closed")] * 4


async def test_an_error_in_the_block_comes_out_as_itself_and_stops_what_runs(stage: Stage):
    launched: list[orc.Vm] = []

    async def block() -> None:
        async with stage.open() as fleet:
            launched.append(await fleet.launch(stage.spec("spin")))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await block()
    assert launched[0].outcome == orc.Stopped("the fleet was closed")


async def test_stop_tells_all_and_gives_the_outcomes(stage: Stage):
    async with stage.open() as fleet:
        await fleet.launch(stage.spec("spin", "one", vcpus=stage.vcpus))
        await fleet.launch(stage.spec("spin", "two"), paused=True)
        await (await fleet.launch(stage.spec("exit_port", "three"))).wait()
        outcomes = await fleet.stop("evening")
        assert outcomes == {
            "one": orc.Stopped("evening"),
            "two": orc.Stopped("evening"),
            "three": orc.Shutdown("exit port", 42),
        }
        assert dict(fleet.vms) == {}
        await (await fleet.launch(stage.spec("halt"))).wait()  # it is still open


async def test_nothing_is_launched_when_the_fleet_is_closing(stage: Stage):
    async with stage.open() as fleet:
        pass
    with pytest.raises(orc.StateError, match="closing"):
        await fleet.launch(stage.spec("halt"))


@pytest.mark.parametrize("paused", [False, True])
async def test_a_launch_cancelled_at_any_checkpoint_leaves_nothing(stage: Stage, paused):
    async with stage.open() as fleet:
        for steps in range(12):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def cancel(scope: trio.CancelScope = scope, steps: int = steps) -> None:
                        for _ in range(steps):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    nursery.start_soon(cancel)
                    vm = None
                    vm = await fleet.launch(stage.spec("spin"), paused=paused)
            if vm is None:
                assert dict(fleet.vms) == {}
            else:
                await vm.stop()
        await (await fleet.launch(stage.spec("halt"))).wait()


async def test_a_vm_that_is_no_spec_is_refused():
    async with play([]) as fleet:
        with pytest.raises(orc.SpecError, match="must be a VmSpec"):
            await fleet.launch("guest")


async def test_a_device_that_is_none_is_refused_before_anything_is_built():
    async with play([]) as fleet:
        for wrong in [(range(0x500, 0x501), None, object()), (None, None, orc.ExitPort())]:
            with pytest.raises(orc.SpecError, match="device="):
                await fleet.launch(blank(), devices=[wrong])
        assert dict(fleet.vms) == {}


# ---- what a host can lack


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "kwm"}, orc.NoSuchBackend, "'kwm'"),
        ({"bus_locks": "yes"}, orc.SpecError, "bus_locks='yes'"),
        ({"limit": 5}, orc.SpecError, "limit=5"),
        ({"policies": [object()]}, orc.SpecError, "decide"),
    ],
)
async def test_a_fleet_that_cant_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        async with orc.open_fleet(**options):
            pytest.fail("opened")


@pytest.mark.parametrize("emulated", [True, False])
@pytest.mark.parametrize("backend", ["auto", "kvm"])
@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOENT, "does not exist.*modprobe"), (errno.EACCES, "no permission.*usermod")]
)
async def test_a_host_without_kvm_is_told_what_to_do(monkeypatch, nothing_left, backend, number, message, emulated):
    real = os.open

    def refuse(path: object, *args: object, **more: object) -> int:
        if path == "/dev/kvm":
            raise OSError(number, os.strerror(number), path)
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    if not emulated:
        monkeypatch.setattr(library, "version", lambda: None)
    if backend == "auto" and emulated and emulated_problem() is None:
        async with orc.open_fleet(backend=backend) as fleet:
            assert re.search(f"^emulated: .*{message.partition('.*')[0]}", fleet.backend.why)
        return
    with pytest.raises(orc.BackendUnavailable, match=message) as caught:
        async with orc.open_fleet(backend=backend):
            pytest.fail("opened")
    assert (r"pip install 'orchestra-kvm[emulated]'" in str(caught.value)) == (backend == "auto")


@pytest.mark.kvm
@pytest.mark.parametrize("vcpus", [1, 3])
async def test_no_descriptor_left_in_the_middle_of_a_launch_rolls_it_back_and_the_fleet_lives_on(nothing_left, vcpus):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        # Too large to be made by the core, which would make another VM ahead after it.
        other = await fleet.launch(attrs.evolve(stage.spec("spin", "other"), memory=65 * orc.MiB))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        open_now = _open_descriptors()
        spec = stage.spec("halt", vcpus=vcpus)
        refused = 0
        try:
            for spare in range(vcpus + 1):
                resource.setrlimit(resource.RLIMIT_NOFILE, (_limit_for(open_now, spare), hard))
                with pytest.raises(orc.ResourceLimit, match=r"ulimit -n|open files"):
                    await fleet.launch(spec)
                refused += 1
                assert set(fleet.vms) == {"other"}
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert refused == vcpus + 1
        assert other.state == "running"
        assert await (await fleet.launch(stage.spec("halt", vcpus=vcpus))).wait() == orc.Halted()


def _open_descriptors() -> set[int]:
    return {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


def _limit_for(used: set[int], spare: int) -> int:
    """The limit that leaves so many descriptors to open."""
    free = itertools.filterfalse(used.__contains__, itertools.count())
    return next(itertools.islice(free, spare, None))


@pytest.mark.kvm
async def test_no_thread_for_a_launch_is_an_error_that_names_the_limit(nothing_left, monkeypatch):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        other = await fleet.launch(stage.spec("spin", "other"))
        await other.inspect()  # it has its thread
        with monkeypatch.context() as patch:
            patch.setattr(trio.lowlevel, "start_thread_soon", no_thread)
            patch.setattr("orchestra.native.core.lib", NoThreadForAVcpu())
            with pytest.raises(orc.ResourceLimit, match=r"pids\.max"):
                await fleet.launch(stage.spec("halt"))
        assert set(fleet.vms) == {"other"}
        assert other.state == "running"
        assert await (await fleet.launch(stage.spec("halt"))).wait() == orc.Halted()


@pytest.mark.kvm
async def test_no_thread_for_the_end_of_a_vm_is_no_error(nothing_left, monkeypatch):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        vm = await fleet.launch(stage.spec("spin"))
        await vm.inspect()
        monkeypatch.setattr(trio.lowlevel, "start_thread_soon", no_thread)
        assert await vm.stop() == orc.Stopped("stop()")


def no_thread(*args: object, **more: object) -> None:
    raise RuntimeError("can't start new thread")


class NoThreadForAVcpu:
    """The core, on a host that has no thread left."""

    def orc_runner_start(self, *args: object) -> int:
        return -errno.EAGAIN

    def __getattr__(self, name: str) -> object:
        return getattr(lib, name)


@pytest.mark.kvm
@pytest.mark.parametrize("step", ["making.GuestMemory", "making.boot", "instance.Assembly", "instance.Vcpu"])
@pytest.mark.parametrize("backing", ["anonymous", "shared"])  # the core makes it; a worker thread does
async def test_whatever_fails_in_a_launch_rolls_it_back(nothing_left, monkeypatch, step, backing):
    stage = Stage("kvm")
    memory = orc.Memory(1 << 20, backing=backing)
    spec = stage.spec("halt", vcpus=2, memory=memory, devices=[orc.Serial()])
    async with stage.open() as fleet:
        with monkeypatch.context() as patch:
            patch.setattr(f"orchestra.machine.{step}", None)
            with pytest.raises((TypeError, AttributeError)):
                await fleet.launch(spec)
        assert dict(fleet.vms) == {}
        assert await (await fleet.launch(spec)).wait() == orc.Halted()


@pytest.mark.kvm
async def test_more_vcpus_than_the_host_allows_is_an_error_that_says_how_many(nothing_left, monkeypatch):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        monkeypatch.setattr(fleet.backend, "_max_vcpus", 3)
        with pytest.raises(orc.SpecError, match=r"vcpus=4.*at most 3"):
            await fleet.launch(stage.spec("halt", vcpus=4))


@pytest.mark.kvm
async def test_a_failed_launch_is_told_to_whoever_waits_for_that_vm(nothing_left, monkeypatch):
    stage = Stage("kvm")
    async with stage.open() as fleet:
        monkeypatch.setattr(fleet.backend, "plan", lambda *args, **more: 1 / 0)
        outcomes = []

        async def follow() -> None:
            while "guest" not in fleet.vms:
                await trio.lowlevel.checkpoint()
            outcomes.append(await fleet.vms["guest"].wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            with pytest.raises(ZeroDivisionError):
                await fleet.launch(stage.spec("halt"))
        assert isinstance(outcomes[0], orc.Failed)
        assert "launch" in outcomes[0].reason


# ---- one for itself


async def test_one_vm_failing_ends_that_vm_alone(stage: Stage):
    async with stage.open() as fleet:
        others = [await fleet.launch(stage.spec("spin", f"vm-{n}")) for n in range(3)]
        vm = await fleet.launch(stage.spec("ports", "broken"), devices=[(range(0x500, 0x504), None, Broken())])
        with trio.fail_after(10):
            assert isinstance(await vm.wait(), orc.Failed)
        assert [other.state for other in others] == ["running"] * 3
        assert fleet.statistics().states == {"running": 3, "failed": 1}


class Broken:
    def read(self, offset: int, size: int) -> int:
        raise ValueError("broken")

    def write(self, offset: int, size: int, value: int) -> None:
        raise ValueError("broken")


async def test_vms_launched_at_once_all_run(stage: Stage):
    async with stage.open() as fleet:

        async def run(number: int) -> None:
            vm = await fleet.launch(stage.spec("exit_port", f"vm-{number}"))
            assert await vm.wait() == orc.Shutdown("exit port", 42)

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(run, number)
        assert fleet.statistics().launched == 50
        assert fleet.statistics().exits == {"io": 50}


async def test_a_closed_fleet_refuses_new_limits_and_does_not_crash(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
    with pytest.raises(orc.StateError, match="closed"):
        await fleet.set_limit(orc.Limit(rate=1))
    applied = await fleet.apply(orc.Throttle(limit=orc.Limit(rate=1)))
    assert "closed" in applied.error


async def test_two_policies_of_one_name_are_refused(autojump_clock):
    policies = [orc.StaticLimits(host=orc.Limit(rate=1)), orc.StaticLimits(host=orc.Limit(rate=2))]
    with pytest.raises(orc.SpecError, match=r"two are named 'static-limits'"):
        async with orc.open_fleet(backend=orc.ScriptedBackend(), policies=policies):
            pass


async def test_a_policy_on_what_is_not_seen_is_refused(autojump_clock):
    policy = orc.StaticLimits(host=orc.Limit(rate=1))
    with pytest.raises(orc.BusLockUnsupported, match="static-limits"):
        async with orc.open_fleet(backend=orc.ScriptedBackend(detection=None), policies=[policy]):
            pass


async def test_a_cancelled_stop_still_gives_everything_back(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank())
        with trio.move_on_after(0):
            await vm.stop()
        await vm.wait()
        await wait_all_tasks_blocked()
        assert dict(fleet.vms) == {}
        with pytest.raises(orc.GuestMemoryError):
            vm.read_memory(0, 1)


async def test_static_limits_hold_the_next_vm_of_a_name_as_well(autojump_clock):
    policy = orc.StaticLimits({"guest": orc.Limit(rate=10, burst=1)})
    async with play(itertools.repeat(bus_lock(after=0.001)), policies=[policy]) as fleet:
        for _ in range(2):
            vm = await fleet.launch(blank())
            await trio.sleep(10)
            assert vm.statistics().bus_locks < 250
            await vm.stop()


async def test_a_launch_that_failed_leaves_its_subscribers_for_the_next_try(autojump_clock):
    async with play([bus_lock(after=1), hlt()]) as fleet, fleet.exits(orc.BusLock, vm="guest") as exits:
        with pytest.raises(orc.SpecError):
            await fleet.launch(blank(irqchip=True))
        await fleet.launch(blank())
        assert isinstance(await exits.receive(), orc.BusLock)


# ---- what is written down


class Kept:
    """A recorder that remembers."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.actions: list[Applied] = []
        self.given: list[Applied] = []  # limits that were there from the beginning
        self.states: list[tuple[str, str, str]] = []
        self.times: list[int] = []
        self.aggregates: list[orc.Facts] = []
        self.profiles: list[tuple[str, int, list[Row]]] = []

    def begin(self, now: int, backend: str, detection: str | None) -> None:
        self.calls.append(f"begin {backend} {detection}")

    def action(self, applied: Applied) -> None:
        given = applied.action is not None and "given" in applied.action.evidence
        (self.given if given else self.actions).append(applied)

    def state(self, now: int, vm: str, generation: int, tenant: str, state: str, reason: str) -> None:
        self.states.append((vm, state, reason))
        self.times.append(now)

    def aggregate(self, facts: orc.Facts) -> None:
        self.aggregates.append(facts)

    def profile(self, now: int, vm: str, generation: int, rows: Iterable[Row]) -> None:
        self.profiles.append((vm, generation, list(rows)))

    def end(self, now: int) -> None:
        self.calls.append("end")


async def test_a_callers_own_calls_are_journaled_as_actions_without_a_policy(autojump_clock):
    kept = Kept()
    async with play([FOR_EVER], journal=kept) as fleet:
        vm = await fleet.launch(blank())
        await vm.pause()
        await vm.resume()
        await vm.set_limit(orc.Limit(rate=5))
        await vm.stop("enough")
        await vm.stop("once more")  # nothing is done any more
        assert fleet.actions() == tuple(kept.actions)
    told = [(type(applied.action).__name__, applied.action.vm, applied.action.reason) for applied in kept.actions]
    assert told == [
        ("Pause", "guest", "pause()"),
        ("Resume", "guest", "resume()"),
        ("SetLimit", "guest", "set_limit()"),
        ("Stop", "guest", "enough"),
    ]
    assert {(applied.policy, applied.outcome) for applied in kept.actions} == {(None, "done")}
    assert kept.calls == ["begin scripted fault-like", "end"]


async def test_the_same_by_apply_is_journaled_once(autojump_clock):
    kept = Kept()
    async with play([FOR_EVER], journal=kept) as fleet:
        await fleet.launch(blank())
        for action in (orc.Pause(vm="guest"), orc.Resume(vm="guest"), orc.Stop(vm="guest")):
            await fleet.apply(action)
    assert [type(applied.action) for applied in kept.actions] == [orc.Pause, orc.Resume, orc.Stop]


@pytest.mark.parametrize("how", ["pause", "apply"])
async def test_a_pause_whose_wait_is_cancelled_is_a_callers_all_the_same(autojump_clock, how):
    told = Resumes()
    async with play([FOR_EVER], policies=[told]) as fleet:
        vm = await fleet.launch(blank())
        with trio.CancelScope() as scope:
            scope.cancel()
            await (vm.pause() if how == "pause" else fleet.apply(orc.Pause(vm="guest")))
        assert scope.cancelled_caught
        await trio.sleep(1.5)
        assert vm.state == "paused"
        kinds = [(type(applied.action), applied.policy, applied.outcome) for applied in fleet.actions()]
        assert kinds == [(orc.Pause, None, "done"), (orc.Resume, "resumes", "refused")]


async def test_a_launch_that_is_paused_is_a_callers_pause(autojump_clock):
    async with play([FOR_EVER], policies=[Resumes()]) as fleet:
        vm = await fleet.launch(blank(), paused=True)
        await trio.sleep(1.5)
        assert vm.state == "paused"
        pause, resume = fleet.actions()
        assert (pause.action, pause.policy) == (orc.Pause(vm="guest", reason="launch(paused=True)"), None)
        assert (type(resume.action), resume.outcome, resume.error) == (orc.Resume, "refused", "a caller holds it")
        await vm.resume()
        assert vm.state == "running"


async def test_a_stop_whose_wait_is_cancelled_is_journaled_and_the_vm_leaves_the_fleet(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank())
        with trio.CancelScope() as scope:
            scope.cancel()
            await fleet.apply(orc.Stop(vm="guest", reason="enough"))
        assert [applied.outcome for applied in fleet.actions()] == ["done"]
        assert await vm.wait() == orc.Stopped("enough")
        assert "guest" not in fleet.vms


async def test_a_cancelled_eviction_is_journaled_as_what_it_is(autojump_clock):
    async def moves(vm: orc.Vm, action: orc.Evict) -> None:
        await trio.sleep_forever()

    async with play([FOR_EVER], on_evict=moves) as fleet:
        await fleet.launch(blank())
        with trio.move_on_after(1):
            await fleet.apply(orc.Evict(vm="guest"))
        (applied,) = fleet.actions()
        assert (applied.outcome, applied.error) == ("failed", "cancelled while on_evict was at it")


class Resumes:
    """A policy that would have every VM go on."""

    name, interval = "resumes", 1.0

    def decide(self, facts: orc.Facts) -> list[orc.Action]:
        return [orc.Resume(vm="guest")]


async def test_states_are_told_in_order_with_how_a_vm_ended(stage: Stage):
    kept = Kept()
    async with stage.open(journal=kept) as fleet:
        vm = await fleet.launch(stage.spec("spin", "a"))
        await vm.pause()
        await vm.pause()
        await vm.resume()
        await vm.resume()
        await vm.stop("enough")
        await (await fleet.launch(stage.spec("exit_port", "b"))).wait()
        await fleet.launch(stage.spec("spin", "c"), paused=True)
    assert [state for state in kept.states if state[0] == "a"] == [
        ("a", "created", "launched"),
        ("a", "running", ""),
        ("a", "paused", ""),
        ("a", "running", "resumed"),
        ("a", "stopped", "enough"),
    ]
    assert [state for state in kept.states if state[0] == "b"][-1] == ("b", "stopped", "shutdown: exit port, code 42")
    assert [state for state in kept.states if state[0] == "c"] == [
        ("c", "created", "launched paused"),
        ("c", "paused", ""),
        ("c", "stopped", "the fleet was closed"),
    ]
    assert kept.times == sorted(kept.times)


async def test_a_restart_and_a_failure_are_told(autojump_clock):
    kept = Kept()
    async with play([FAIL], journal=kept) as fleet:
        restart = orc.Restart("on-failure", backoff=1, backoff_max=1, most=1)
        await (await fleet.launch(blank(restart=restart))).wait()
    assert [state for _, state, _ in kept.states] == ["created", "running", "waiting", "running", "failed"]
    assert kept.states[2][2].startswith("waits 1 s to be restarted: ")
    assert "debug" in kept.states[2][2].lower()
    assert kept.states[3][2] == "restart 1"
    assert "debug" in kept.states[4][2].lower()


async def test_a_launch_that_fails_is_told(autojump_clock, monkeypatch):
    kept = Kept()
    async with play([], journal=kept) as fleet:
        monkeypatch.setattr(fleet.backend, "create", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await fleet.launch(blank())
    assert [state for _, state, _ in kept.states] == ["created", "failed"]
    assert "ZeroDivisionError" in kept.states[1][2]


async def test_aggregates_come_each_interval_without_any_policy_and_nothing_is_lost_at_the_end(autojump_clock):
    kept = Kept()
    script = [*[bus_lock(after=0.3)] * 10, FOR_EVER]
    async with play({"a": script, "b": [*[bus_lock()] * 7, hlt()]}, journal=kept, journal_interval=2) as fleet:
        await fleet.launch(blank("a"))
        await trio.sleep(4.5)
        await (await fleet.launch(blank("b"))).wait()
        await trio.sleep(0.1)
    counts = [{name: vm.bus_locks for name, vm in facts.vms.items()} for facts in kept.aggregates]
    assert counts == [{"a": 6}, {"a": 4}, {"b": 7}]
    assert [facts.interval for facts in kept.aggregates] == pytest.approx([2, 2, 0.6], abs=0.01)


@pytest.mark.parametrize(
    ("seconds", "intervals"),
    [(0.01, [0.01]), (2.0000002, [1, 1.0000002]), (2.05, [1, 1.05]), (2.2, [1, 1, 0.2]), (2.95, [1, 1, 0.95])],
)
async def test_an_interval_that_ends_with_the_fleet_is_not_absurdly_short(autojump_clock, seconds, intervals):
    kept = Kept()
    async with play(itertools.repeat(bus_lock(after=0.01)), journal=kept, journal_interval=1) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(seconds)
    assert [facts.interval for facts in kept.aggregates] == pytest.approx(intervals, abs=1e-6)
    assert sum(f.vms["guest"].bus_locks for f in kept.aggregates if f.vms) == vm.statistics().bus_locks
    rates = [facts.vms["guest"].bus_locks / facts.interval for facts in kept.aggregates if facts.vms]
    assert max(rates, default=0) <= 110  # one more or less falls on the edge


async def test_an_interval_is_told_soon_after_it_has_passed(autojump_clock):
    kept = Kept()
    async with play([FOR_EVER], journal=kept, journal_interval=1):
        await trio.sleep(1.05)
        assert kept.aggregates == []
        await trio.sleep(0.1)
        assert [facts.interval for facts in kept.aggregates] == [1]


async def test_of_several_vms_of_one_name_each_has_its_aggregate(autojump_clock):
    kept = Kept()
    async with play([*[bus_lock()] * 3, hlt()], journal=kept, journal_interval=10) as fleet:
        generations = []
        for _ in range(3):
            vm = await fleet.launch(blank())
            generations.append(vm.generation)
            await vm.wait()
    (facts,) = kept.aggregates
    assert [(vm.name, vm.generation, vm.bus_locks) for vm in facts.vms.values()] == [
        ("guest", n, 3) for n in generations
    ]


async def test_policies_and_the_journal_each_hear_of_everything_once(autojump_clock):
    kept, heard = Kept(), []

    class Hears:
        name, interval = "hears", 0.7

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            heard.append(sum(vm.bus_locks for vm in facts.vms.values()))
            return []

    async with play([*[bus_lock(after=0.01)] * 500, FOR_EVER], journal=kept, policies=[Hears()]) as fleet:
        await fleet.launch(blank())
        await trio.sleep(10)
    assert sum(heard) == 500
    assert sum(vm.bus_locks for facts in kept.aggregates for vm in facts.vms.values()) == 500


async def test_a_real_journal_has_it_all(tmp_path, nothing_left):
    path = tmp_path / "fleet.db"
    stage = Stage("scripted")
    async with stage.open(journal=Journal(path)) as fleet:
        vm = await fleet.launch(stage.spec("ports", "web-1"))
        await vm.wait()
        await fleet.apply(orc.Warn(vm="web-1", reason="much too loud", evidence={"rate": 7}))
    with read_journal(path) as journal:
        assert [row.state for row in journal.states(vm="web-1")] == ["created", "running", "stopped"]
        assert [(row.kind, row.evidence) for row in journal.actions(vm="web-1")] == [
            ("SetLimit", {"given": "default"}),  # of answers
            ("Warn", {"rate": 7}),
        ]
        assert sum(row.exits for row in journal.aggregates(vm="web-1")) == sum(vm.statistics().exits.values())
        assert len(list(journal.hosts())) >= 1
        assert journal.query("SELECT ended IS NOT NULL FROM sessions")[0][0] == 1


async def test_a_journal_that_cant_be_opened_is_an_error_before_anything_runs(tmp_path, nothing_left):
    with pytest.raises(OSError, match="can't be opened"):
        async with play([], journal=Journal(tmp_path / "nowhere" / "fleet.db")):
            pytest.fail("opened")
    journal = Journal(tmp_path / "fleet.db")
    async with play([], journal=journal):
        with pytest.raises(OSError, match="in use"):
            async with play([], journal=journal):
                pytest.fail("opened")
    async with play([], journal=journal):  # it can be used again
        pass


async def test_without_a_thread_the_journal_is_opened_and_closed_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(trio.to_thread, "run_sync", no_thread)
    kept = Kept()
    async with play([], journal=kept):
        pass
    assert kept.calls == ["begin scripted fault-like", "end"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard": "strict"}, "guard='strict'"),
        ({"journal": 5}, "journal=5"),
        ({"journal_interval": 0}, "journal_interval=0"),
        ({"journal_interval": float("nan")}, "journal_interval=nan"),
    ],
)
async def test_what_cant_be_an_engine_is_refused(options, message):
    with pytest.raises(orc.SpecError, match=message):
        async with play([], **options):
            pytest.fail("opened")


# ---- the other actions


async def test_a_warning_is_journaled_and_logged(autojump_clock, caplog):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
        applied = await fleet.apply(orc.Warn(vm="guest", reason="much too loud"), policy="ears")
        assert applied.outcome == "done"
        assert "vm guest: ears: much too loud" in caplog.text
        assert (await fleet.apply(orc.Warn(vm="nobody"))).outcome == "failed"


async def test_an_eviction_asks_whoever_moves_vms(autojump_clock):
    moved = []

    async def move(vm: orc.Vm, action: orc.Evict) -> None:
        await trio.sleep(5)
        moved.append((vm.name, action.reason))
        await vm.stop("it runs elsewhere now")

    async with play([FOR_EVER], on_evict=move) as fleet:
        await fleet.launch(blank())
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet.apply, orc.Evict(vm="guest", reason="too loud"))
            await trio.sleep(1)
            again = await fleet.apply(orc.Evict(vm="guest"))
        assert trio.current_time() - begun == pytest.approx(5)
        assert "already" in again.error
        assert moved == [("guest", "too loud")]
        kinds = [(type(applied.action).__name__, applied.outcome) for applied in fleet.actions()]
        assert kinds == [("Evict", "failed"), ("Stop", "done"), ("Evict", "done")]
        assert "no such VM" in (await fleet.apply(orc.Evict(vm="guest"))).error


async def test_what_goes_wrong_with_an_eviction_is_the_actions_error(autojump_clock):
    async def move(vm: orc.Vm, action: orc.Evict) -> None:
        raise ConnectionError("no host has room")

    async with play({"ended": [hlt()], "guest": [FOR_EVER]}, on_evict=move) as fleet:
        vm = await fleet.launch(blank())
        await (await fleet.launch(blank("ended"))).wait()
        assert "ConnectionError: no host has room" in (await fleet.apply(orc.Evict(vm="guest"))).error
        assert vm.state == "running"
        assert "stopped" in (await fleet.apply(orc.Evict(vm="ended"))).error
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
        assert "on_evict" in (await fleet.apply(orc.Evict(vm="guest"))).error


async def test_a_policys_eviction_does_not_hold_up_the_ticks_and_its_failure_is_told(autojump_clock):
    refused, ticks = [], []

    class Moves:
        name, interval = "moves", 1.0

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            ticks.append(facts.time)
            return [orc.Evict(vm="guest")] if len(ticks) == 1 else []

        def refused(self, action: orc.Action, reason: str) -> None:
            refused.append((len(ticks), reason))

    async def move(vm: orc.Vm, action: orc.Evict) -> None:
        await trio.sleep(5.5)
        raise ConnectionError("no host has room")

    async with play([FOR_EVER], on_evict=move, policies=[Moves()]) as fleet:
        await fleet.launch(blank())
        await trio.sleep(10)
        (applied,) = fleet.actions()
        assert (applied.policy, applied.outcome) == ("moves", "failed")
    assert len(ticks) == 9 or len(ticks) == 10
    assert refused[0][0] == 6
    assert "no host has room" in refused[0][1]


@pytest.fixture
def acts(monkeypatch) -> list[tuple[str, object]]:
    """A backend that can cap and isolate: what it was told."""
    told: list[tuple[str, object]] = []
    monkeypatch.setattr(Restraint, "cap_cpu", lambda self, share: told.append(("cap", share)))
    monkeypatch.setattr(Restraint, "isolate", lambda self, on: told.append(("isolate", on)))
    return told


async def test_the_tightest_cap_counts_and_each_takes_away_its_own(autojump_clock, acts):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())

        async def cap(share: float | None, policy: str | None) -> None:
            assert (await fleet.apply(orc.CapCpu(vm="guest", share=share), policy=policy)).outcome == "done"

        await cap(0.5, "a")
        await cap(0.5, "a")  # it has it already
        await cap(0.8, "b")
        await cap(0.2, None)
        await cap(None, "c")  # it has none
        await cap(None, None)
        await cap(None, "a")
        await cap(None, "b")
        await fleet.apply(orc.Stop(vm="guest"))
        await cap(None, "a")  # with the VM went its caps
    assert [share for what, share in acts if what == "cap"] == [0.5, 0.5, 0.2, 0.5, 0.8, None]


async def test_isolation_is_done_once_and_taken_back(autojump_clock, acts):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
        for action in (orc.Isolate, orc.Isolate, orc.Rejoin, orc.Rejoin):
            assert (await fleet.apply(action(vm="guest"))).outcome == "done"
    assert acts == [("isolate", True), ("isolate", False)]


async def test_a_restart_changes_nothing_of_what_a_vm_is_held_to(autojump_clock, acts):
    async with play([FAIL]) as fleet:
        vm = await fleet.launch(blank(restart=orc.Restart("on-failure", backoff=10, backoff_max=10)))
        await trio.sleep(1)
        await fleet.apply(orc.CapCpu(vm="guest", share=0.5), policy="a")
        await fleet.apply(orc.Isolate(vm="guest"))
        acts.clear()
        await trio.sleep(10)
        assert vm.restarts == 1
        assert acts == [("cap", 0.5), ("isolate", True)]


async def test_a_cap_that_failed_is_tried_again_and_not_remembered(autojump_clock, monkeypatch, acts):
    with monkeypatch.context() as patch:
        patch.setattr(Restraint, "cap_cpu", cant)
        async with play([FOR_EVER]) as fleet:
            await fleet.launch(blank())
            applied = await fleet.apply(orc.CapCpu(vm="guest", share=0.5))
            assert (applied.outcome, applied.error) == ("failed", "can't")
            patch.undo()
            monkeypatch.setattr(Restraint, "cap_cpu", lambda self, share: acts.append(("cap", share)))
            assert (await fleet.apply(orc.CapCpu(vm="guest", share=0.5))).outcome == "done"
    assert acts == [("cap", 0.5)]


def cant(self: object, share: object) -> None:
    raise orc.StateError("can't")


async def test_a_mistake_of_ours_in_an_action_does_not_end_the_fleet(autojump_clock, monkeypatch):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
        with monkeypatch.context() as patch:
            patch.setattr(VmControl, "pause_nowait", lambda self: 1 / 0)
            applied = await fleet.apply(orc.Pause(vm="guest"))
        assert applied.error == "ZeroDivisionError: division by zero"


async def test_where_guests_lock_is_in_the_journal_too(autojump_clock):
    kept = Kept()
    script = [*[bus_lock(after=0.3, rip=0x1000)] * 5, FOR_EVER]
    async with play({"a": script, "b": script}, journal=kept) as fleet:
        a = await fleet.launch(blank("a", sample_every=1))
        await fleet.launch(blank("b", sample_every=0))
        await trio.sleep(1.15)
        assert len(kept.profiles) == 1
        await a.stop()
        assert len(kept.profiles) == 1  # nothing is new
    async with play([*[bus_lock(rip=0x1000)] * 5, hlt()], journal=kept) as fleet:
        await (await fleet.launch(blank("c", sample_every=1))).wait()
    assert [(vm, sum(row[4] for row in rows)) for vm, _, rows in kept.profiles] == [("a", 3), ("c", 5)]


async def test_scripted_vms_have_no_threads_to_hold_and_the_outcome_says_so(autojump_clock):
    async with play([FOR_EVER]) as fleet:
        await fleet.launch(blank())
        for action in (orc.CapCpu(vm="guest", share=0.5), orc.Isolate(vm="guest")):
            applied = await fleet.apply(action)
            assert applied.outcome == "failed"
            assert "not supported by this backend" in applied.error


@pytest.mark.kvm
async def test_a_real_guest_is_capped_and_told_of(nothing_left):
    told: list[orc.VmFacts] = []

    class Hears:
        name, interval = "hears", 0.1

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            told.extend(facts.vms.values())
            return []

    stage = Stage("kvm")
    async with stage.open(policies=[Hears()]) as fleet:
        await fleet.launch(stage.spec("spin"))
        assert (await fleet.apply(orc.CapCpu(vm="guest", share=0.1))).error is None
        with trio.fail_after(30):
            while sum(vm.capped or 0 for vm in told) < 0.2:
                await trio.lowlevel.checkpoint()
        assert (await fleet.apply(orc.CapCpu(vm="guest", share=None))).error is None


@pytest.mark.kvm
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a CPU to spare")
async def test_a_real_guest_is_isolated_and_let_in_again(nothing_left):
    stage = Stage("kvm")
    async with stage.open(quarantine=[max(os.sched_getaffinity(0))]) as fleet:
        vm = await fleet.launch(stage.spec("spin"))
        tid = vm._control.guest.vcpus[0].tid
        assert (await fleet.apply(orc.Isolate(vm="guest"))).error is None
        assert os.sched_getaffinity(tid) == {max(os.sched_getaffinity(0))}
        assert (await fleet.apply(orc.Rejoin(vm="guest"))).error is None
        assert os.sched_getaffinity(tid) == os.sched_getaffinity(0)
