"""Policies live: what they are told, what becomes of their actions and errors, and a budget that is shared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import trio

import orchestra as orc
from conftest import Stage, blank, play
from orchestra.backend.scripted import ScriptedExit, bus_lock, hlt, io_write

FOR_EVER = hlt(after=1e9)
FAIL = ScriptedExit("debug", args=(1, 0, 0, 0))


class Told:
    """Remembers its facts; `then` decides."""

    def __init__(
        self,
        then: Callable[[orc.Facts], Iterable[orc.Action]] = lambda facts: (),
        *,
        name: str | None = None,
        interval: float | None = 1.0,
    ) -> None:
        self.name = name or f"told-{id(self)}"
        self.interval = interval
        self.facts: list[orc.Facts] = []
        self._then = then

    def decide(self, facts: orc.Facts) -> Iterable[orc.Action]:
        self.facts.append(facts)
        return self._then(facts)


# ---- facts


async def test_facts_tell_what_each_active_vm_did_since_the_last_tick(autojump_clock):
    told = Told()
    scripts = {
        "busy": [*[bus_lock(after=0.25)] * 10, FOR_EVER],
        "io": [*[io_write(0x80, b"x", after=0.5)] * 4, FOR_EVER],
        "idle": [FOR_EVER],
    }
    tenants = [orc.Tenant("acme", weight=3, limit=orc.Limit(rate=500))]
    limit = orc.Limit(rate=1000)
    async with play(scripts, policies=[told], tenants=tenants, limit=limit) as fleet:
        await fleet.launch(blank("busy", tenant="acme", weight=2, vcpus=2))
        await fleet.launch(blank("io"))
        await fleet.launch(blank("idle"))
        await trio.sleep(5.1)
        facts = told.facts
        assert len(facts) == 5  # facts are about an interval, so the first come when one has passed
        assert facts[0].interval == facts[1].interval == pytest.approx(1)
        assert facts[1].time - facts[0].time == pytest.approx(1e9)
        assert facts[1].limit == limit
        assert facts[1].exit_limit is None
        assert set(facts[1].tenants) == {"acme", "default"}
        assert facts[1].tenants["acme"] == tenants[0]
        # Two vCPUs, each with a lock every quarter second; who is first on the edge is open.
        busy = [tick.vms["busy"].bus_locks for tick in facts if "busy" in tick.vms]
        assert sum(busy) == 20
        assert 6 <= busy[0] <= 8
        assert facts[0].vms["busy"].exits == facts[0].vms["busy"].bus_locks
        assert sum(tick.vms["io"].exits for tick in facts if "io" in tick.vms) == 4
        assert facts[0].vms["io"].bus_locks == 0
        assert not any("idle" in tick.vms for tick in facts)
        assert facts[4].vms == {}  # all are idle by then
        vm = facts[0].vms["busy"]
        assert (vm.name, vm.tenant, vm.weight, vm.vcpus, vm.throttled) == ("busy", "acme", 2, 2, 0)


async def test_a_vm_that_waits_for_its_turn_is_no_idle_one(autojump_clock):
    told = Told()
    async with play([bus_lock(), FOR_EVER], policies=[told]) as fleet:
        await fleet.launch(blank(limit=orc.Limit(rate=0.2, burst=1)))
        await trio.sleep(8.1)
        waited = [tick.vms["guest"].throttled if "guest" in tick.vms else 0 for tick in told.facts]
        assert waited == pytest.approx([1, 1, 1, 1, 1, 0, 0, 0], abs=1e-3)


async def test_a_vm_that_has_ended_is_in_no_facts(autojump_clock):
    told = Told()
    async with play([bus_lock()] * 5, policies=[told]) as fleet:
        await trio.sleep(0.5)
        await (await fleet.launch(blank())).wait()
        await trio.sleep(3)
        assert [tick.vms for tick in told.facts] == [{}] * 3


async def test_a_vm_that_fails_within_each_tick_is_told_of_all_the_same(autojump_clock):
    told = Told()
    restart = orc.Restart("on-failure", backoff=0.2, backoff_max=0.2)
    async with play([bus_lock(after=0.01), bus_lock(after=0.01), FAIL], policies=[told]) as fleet:
        vm = await fleet.launch(blank(restart=restart))
        await trio.sleep(10.1)
        counted = sum(tick.vms["guest"].bus_locks for tick in told.facts if "guest" in tick.vms)
        assert vm.restarts > 40
        assert vm.statistics().bus_locks - counted <= 2


async def test_where_no_bus_locks_are_seen_facts_have_none(autojump_clock):
    told = Told()
    backend = orc.ScriptedBackend({"guest": [io_write(0x80, b"x", after=0.5), FOR_EVER]}, detection=None)
    async with orc.open_fleet(backend=backend, policies=[told]) as fleet:
        await fleet.launch(blank())
        await trio.sleep(1.1)
        assert told.facts[0].vms["guest"].bus_locks is None
        assert told.facts[0].vms["guest"].exits == 1


@pytest.mark.kvm
async def test_facts_of_real_vcpus_add_up(nothing_left):
    told = Told(interval=0.02)
    stage = Stage("kvm")
    async with stage.open(policies=[told]) as fleet:
        vm = await fleet.launch(stage.spec("storm", vcpus=2))
        with trio.fail_after(10):
            while sum("guest" in tick.vms for tick in told.facts) < 5:
                await trio.lowlevel.checkpoint()
        await vm.pause()
        seen = len(told.facts)
        with trio.fail_after(10):
            while len(told.facts) < seen + 3:
                await trio.lowlevel.checkpoint()
        total = sum(tick.vms["guest"].exits for tick in told.facts if "guest" in tick.vms)
        assert total == sum(vm.statistics().exits.values())
        assert told.facts[-1].vms == {}


# ---- when


async def test_each_policy_ticks_at_its_own_interval(autojump_clock):
    fast, slow, once = Told(interval=0.5), Told(interval=2), Told(interval=None)
    async with play([], policies=[fast, slow, once]) as fleet:
        await trio.sleep(10.1)
        assert (len(fast.facts), len(slow.facts), len(once.facts)) == (20, 5, 1)
        assert [status.on for status in fleet.statistics().policies] == [True, True, False]
        assert [status.error for status in fleet.statistics().policies] == [None] * 3


async def test_policies_of_different_intervals_each_hear_of_every_event_once(autojump_clock):
    fast, slow = Told(interval=0.5), Told(interval=3)
    async with play([*[bus_lock(after=0.1)] * 50, FOR_EVER], policies=[fast, slow]) as fleet:
        await fleet.launch(blank())
        await trio.sleep(9.1)
        for told in (fast, slow):
            assert sum(tick.vms["guest"].bus_locks for tick in told.facts if "guest" in tick.vms) == 50


# ---- actions


async def test_a_policys_actions_are_applied_and_journaled_under_its_name(autojump_clock):
    throttle = orc.Throttle(vm="guest", limit=orc.Limit(rate=1, burst=1), reason="too loud", evidence={"rate": 10})
    told = Told(lambda facts: [throttle] if facts.vms and len(told.facts) == 1 else [], name="strict-one")
    async with play(itertools.repeat(bus_lock(after=0.1)), policies=[told]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        assert vm.statistics().limit == throttle.limit
        (applied,) = fleet.actions()
        assert (applied.action, applied.policy, applied.error) == (throttle, "strict-one", None)
        assert applied.time == pytest.approx(told.facts[0].time, abs=1000)
        (status,) = fleet.statistics().policies
        assert (status.name, status.on, status.actions) == ("strict-one", True, 1)


async def test_an_action_to_an_unknown_vm_is_journaled_with_the_error_and_the_policy_goes_on(autojump_clock):
    told = Told(lambda facts: [orc.Pause(vm="nobody"), orc.Pause(vm="guest")])
    async with play([FOR_EVER], policies=[told]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(2.5)
        assert vm.state == "paused"
        assert len(told.facts) == 2
        nobody = [applied for applied in fleet.actions() if applied.action == orc.Pause(vm="nobody")]
        assert len(nobody) == 2
        assert all("nobody" in applied.error for applied in nobody)


async def test_a_policy_may_stop_a_vm(autojump_clock):
    told = Told(lambda facts: [orc.Stop(vm=name, reason="out") for name in facts.vms])
    async with play(itertools.repeat(bus_lock(after=0.1)), policies=[told]) as fleet:
        vm = await fleet.launch(blank())
        assert await vm.wait() == orc.Stopped("out")


async def test_two_policies_have_a_throttle_each_and_the_tightest_counts(autojump_clock):
    def at(rate: float) -> Callable[[orc.Facts], list[orc.Action]]:
        return lambda facts: [orc.Throttle(vm="guest", limit=orc.Limit(rate=rate))]

    loose, tight = Told(at(20), name="loose", interval=None), Told(at(10), name="tight", interval=None)
    async with play([FOR_EVER], policies=[tight, loose]) as fleet:
        vm = await fleet.launch(blank())
        for policy in (tight, loose):
            for action in policy.decide(policy.facts[0] if policy.facts else None):
                await fleet.apply(action, policy=policy.name)
        assert vm.statistics().limit.rate == 10
        await fleet.apply(orc.Unthrottle(vm="guest"), policy="tight")
        assert vm.statistics().limit.rate == 20


# ---- errors


def raises(facts: orc.Facts) -> list[orc.Action]:
    raise ValueError("a bug of yours")


def raises_after_one(facts: orc.Facts) -> Iterable[orc.Action]:
    yield orc.Pause(vm="guest")
    raise ValueError("a bug of yours")


@pytest.mark.parametrize(
    ("decide", "message"),
    [
        (raises, "a bug of yours"),
        (raises_after_one, "a bug of yours"),
        (lambda facts: None, "TypeError"),
        (lambda facts: ["pause"], "must be one of orchestra's actions"),
        (lambda facts: [None], "must be one of orchestra's actions"),
    ],
)
async def test_a_policy_that_fails_is_switched_off_and_journaled_and_the_others_go_on(autojump_clock, decide, message):
    broken, other = Told(decide, name="broken"), Told(name="other")
    async with play([FOR_EVER], policies=[broken, other]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(3.1)
        assert (len(broken.facts), len(other.facts)) == (1, 3)
        assert vm.state == "running"
        (applied,) = fleet.actions()
        assert (applied.action, applied.policy) == (None, "broken")
        assert message in applied.error
        first, second = fleet.statistics().policies
        assert (first.on, second.on) == (False, True)
        assert message in first.error


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf"), "soon", True])
async def test_an_interval_that_cant_be_is_refused_and_one_that_becomes_so_switches_the_policy_off(
    autojump_clock, interval
):
    with pytest.raises(orc.SpecError, match="interval="):
        async with play([], policies=[Told(interval=interval)]):
            pytest.fail("opened")
    changes = Told()
    async with play([FOR_EVER], policies=[changes, Told(name="other")]) as fleet:
        await fleet.launch(blank())
        changes.interval = interval
        await trio.sleep(2.1)
        first, second = fleet.statistics().policies
        assert (first.on, second.on) == (False, True)
        assert "interval=" in first.error


async def test_the_limits_that_a_broken_policy_set_last_stay_in_force(autojump_clock):
    def decide(facts: orc.Facts) -> list[orc.Action]:
        if len(told.facts) > 2:
            raise ValueError("a bug of yours")
        return [orc.Throttle(limit=orc.Limit(rate=5, burst=1))]

    told = Told(decide)
    async with play(itertools.repeat(bus_lock()), policies=[told]) as fleet:
        vm = await fleet.launch(blank("guest", limit=orc.Limit(rate=100, burst=1)))
        await trio.sleep(5)
        assert not fleet.statistics().policies[0].on
        before = vm.statistics().bus_locks
        await trio.sleep(10)
        assert vm.statistics().bus_locks - before == pytest.approx(50, abs=1)


async def test_strict_raises_instead(autojump_clock):
    async def block() -> None:
        async with play([FOR_EVER], policies=[Told(raises)], strict=True) as fleet:
            await fleet.launch(blank())
            await trio.sleep_forever()

    with pytest.raises(ValueError, match="a bug of yours"):
        await block()


# ---- sharing


async def share(demands: dict[str, tuple[str, float]], weights: dict[str, float], seconds: float) -> dict[str, float]:
    """Bus locks a second of VMs, each of a tenant and with a pause before each lock, once their shares have settled."""
    scripts = {name: itertools.repeat(bus_lock(after=after)) for name, (_, after) in demands.items()}
    tenants = [orc.Tenant(name, weight=weight) for name, weight in weights.items()]
    limit = orc.Limit(rate=400, burst=20)
    async with play(scripts, limit=limit, tenants=tenants, policies=[orc.WeightedShare()]) as fleet:
        vms = {name: await fleet.launch(blank(name, tenant=tenant)) for name, (tenant, _) in demands.items()}
        await trio.sleep(5)
        before = {name: vm.statistics().bus_locks for name, vm in vms.items()}
        await trio.sleep(seconds)
        return {name: (vm.statistics().bus_locks - before[name]) / seconds for name, vm in vms.items()}


async def test_two_greedy_tenants_of_weight_one_and_three_run_one_to_three(autojump_clock):
    rates = await share({"a": ("one", 1e-4), "b": ("three", 1e-4)}, {"one": 1, "three": 3}, 30)
    assert rates["b"] / rates["a"] == pytest.approx(3, rel=0.03)
    assert rates["a"] + rates["b"] == pytest.approx(400, rel=0.03)


async def test_a_tenants_share_does_not_grow_with_its_vms(autojump_clock):
    demands = {"a": ("one", 1e-4), **{f"b{n}": ("three", 1e-4) for n in range(4)}}
    rates = await share(demands, {"one": 1, "three": 3}, 30)
    assert rates["a"] == pytest.approx(100, rel=0.03)
    assert [rates[f"b{n}"] for n in range(4)] == pytest.approx([75] * 4, rel=0.03)


async def test_an_idle_tenants_share_is_borrowed(autojump_clock):
    rates = await share({"a": ("one", 1e-4), "b": ("three", 1e9)}, {"one": 1, "three": 3}, 30)
    assert rates["a"] == pytest.approx(400, rel=0.03)
    assert rates["b"] == 0


async def test_what_a_modest_tenant_leaves_is_borrowed_and_it_is_not_held_back(autojump_clock):
    rates = await share({"a": ("one", 1e-4), "b": ("three", 0.05)}, {"one": 1, "three": 3}, 30)
    assert rates["b"] == pytest.approx(20, rel=0.03)
    assert rates["a"] >= 0.97 * (400 - 20 * 1.1)  # all that is left but for the modest one's headroom


async def test_a_borrower_gives_back_when_the_owner_comes_for_its_share(autojump_clock):
    scripts = {
        "a": itertools.repeat(bus_lock(after=1e-4)),
        "b": itertools.chain([bus_lock(after=10)], itertools.repeat(bus_lock(after=1e-4))),
    }
    tenants = [orc.Tenant("one", weight=1), orc.Tenant("three", weight=3)]
    async with play(
        scripts, limit=orc.Limit(rate=400, burst=20), tenants=tenants, policies=[orc.WeightedShare()]
    ) as fleet:
        a = await fleet.launch(blank("a", tenant="one"))
        b = await fleet.launch(blank("b", tenant="three"))
        await trio.sleep(9.9)
        assert a.statistics().bus_locks == pytest.approx(4000, rel=0.03)
        await trio.sleep(5.1)
        before = a.statistics().bus_locks, b.statistics().bus_locks
        await trio.sleep(20)
        after = a.statistics().bus_locks, b.statistics().bus_locks
        assert (after[1] - before[1]) / (after[0] - before[0]) == pytest.approx(3, rel=0.03)
        assert all(applied.policy == "weighted-share" and applied.error is None for applied in fleet.actions())
        assert all(applied.action.reason for applied in fleet.actions())


@pytest.mark.kvm
async def test_real_exit_storms_are_shared_by_weight(nothing_left):
    stage = Stage("kvm")
    tenants = [orc.Tenant("one", weight=1), orc.Tenant("three", weight=3)]
    policy = orc.WeightedShare(meter="exits", interval=0.05)
    async with stage.open(exit_limit=orc.Limit(rate=2000, burst=100), tenants=tenants, policies=[policy]) as fleet:
        vms = [await fleet.launch(stage.spec("storm", name, tenant=name)) for name in ("one", "three")]
        await trio.sleep(1)
        before = [vm.statistics().exits["io"] for vm in vms]
        await trio.sleep(2)
        one, three = (vm.statistics().exits["io"] - count for vm, count in zip(vms, before, strict=True))
        assert three / one == pytest.approx(3, rel=0.1)
