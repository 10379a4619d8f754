"""Policies live: what they are told, what becomes of their actions and errors, and a budget that is shared."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
import trio

import orchestra as orc
from conftest import Stage, blank, play
from orchestra.backend.scripted import ScriptedExit, bus_lock, hlt, io_write
from orchestra.fleet.observer import IN_TURN, Observer
from orchestra.machine.vcpu import Vcpu
from orchestra.testing import wait_until

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


async def test_facts_tell_each_policy_once_who_has_ended(autojump_clock):
    fast, slow = Told(), Told(interval=3.0)
    async with play([FOR_EVER], policies=[fast, slow]) as fleet:
        generations = []
        for _ in range(2):  # two of a name, within a second
            vm = await fleet.launch(blank())
            generations.append(("guest", vm.generation))
            await vm.stop()
        third = await fleet.launch(blank())
        await trio.sleep(4.1)
        await third.stop()
        await trio.sleep(2)
        assert [tick.gone for tick in fast.facts] == [
            tuple(generations),
            (),
            (),
            (),
            (("guest", third.generation),),
            (),
        ]
        assert [tick.gone for tick in slow.facts] == [tuple(generations), (("guest", third.generation),)]
        assert "guest" in fast.facts[0].vms or not fast.facts[0].vms


async def test_a_vm_that_is_restarted_is_not_gone(autojump_clock):
    told = Told()
    restart = orc.Restart("on-failure", backoff=0.2, backoff_max=0.2)
    async with play([bus_lock(after=0.5), FAIL], policies=[told]) as fleet:
        vm = await fleet.launch(blank(restart=restart))
        await trio.sleep(2.1)
        assert vm.restarts
        assert [tick.gone for tick in told.facts] == [(), ()]
        await vm.stop()
        await trio.sleep(1)
        assert [one for tick in told.facts for one in tick.gone] == [("guest", vm.generation)]


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
    throttle = orc.Throttle(vm="guest", limit=orc.Limit(rate=1, burst=2), reason="too loud", evidence={"rate": 10})
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
    guard = orc.Guard(vm_cool_down=0, host_cool_down=0)
    async with play([FOR_EVER], policies=[told], guard=guard) as fleet:
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


def odd(what: str, get: Callable[[], object]) -> Told:
    """A policy of which one attribute is a property."""
    members = {what: property(lambda self: get(), lambda self, value: None)}
    policy: Told = type("Odd", (Told,), members)(name="odd")
    return policy


def a_bug() -> object:
    raise ValueError("a bug of yours")


@pytest.mark.parametrize("what", ["name", "signals", "interval", "meter"])
async def test_a_policy_that_raises_when_it_is_asked_what_it_is_is_refused(autojump_clock, what):
    with pytest.raises(orc.SpecError, match=f"Odd: {what}: ValueError: a bug of yours"):
        async with play([], policies=[odd(what, a_bug)]):
            pytest.fail("opened")
    async with play([]) as fleet:
        with pytest.raises(orc.SpecError, match=f"Odd: {what}: ValueError: a bug of yours"):
            await fleet.set_policies([odd(what, a_bug)])
        assert fleet.statistics().policies == ()


@pytest.mark.parametrize(
    ("what", "value"),
    [("name", 5), ("name", ""), ("name", None), ("signals", None), ("signals", 5), ("signals", [5]), ("signals", "x")],
)
async def test_a_policy_whose_name_or_signals_can_t_be_is_refused(autojump_clock, what, value):
    with pytest.raises(orc.SpecError, match=re.escape(f"{what}={value!r}")):
        async with play([], policies=[odd(what, lambda: value)]):
            pytest.fail("opened")


@pytest.mark.parametrize(("what", "value"), [("name", "odd"), ("signals", ("cpu_pressure",))])
async def test_what_a_policy_is_is_asked_when_it_is_seated_and_not_again(autojump_clock, what, value):
    gets = iter(lambda: value, None)
    policy = odd(what, lambda: next(gets))
    policy._then = lambda facts: [orc.Warn(vm="guest"), orc.Warn(vm="nobody")]
    async with play([FOR_EVER], policies=[policy]) as fleet:
        await fleet.launch(blank())
        gets = (a_bug() for _ in itertools.count())
        await trio.sleep(1.5)
        fleet._context.runner.hurry("cpu_pressure")
        policy._then = raises
        await trio.sleep(1)
        (status,) = fleet.statistics().policies
        assert (status.name, status.on, status.error) == ("odd", False, "ValueError: a bug of yours")
        assert [applied.policy for applied in fleet.actions()] == ["odd"] * 3
        await fleet.set_policies([])
        assert fleet.statistics().policies == ()


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


async def share(demands: dict[str, tuple[str, float]], weights: dict[str, float]) -> dict[str, float]:
    """Bus locks a second of VMs, each of a tenant and with a pause before each lock, once their shares have settled."""
    scripts = {name: itertools.repeat(bus_lock(after=after)) for name, (_, after) in demands.items()}
    tenants = [orc.Tenant(name, weight=weight) for name, weight in weights.items()]
    limit = orc.Limit(rate=400, burst=20)
    async with play(scripts, limit=limit, tenants=tenants, policies=[orc.WeightedShare()]) as fleet:
        vms = {name: await fleet.launch(blank(name, tenant=tenant)) for name, (tenant, _) in demands.items()}
        await trio.sleep(5)
        before = {name: vm.statistics().bus_locks for name, vm in vms.items()}
        await trio.sleep(10)
        return {name: (vm.statistics().bus_locks - before[name]) / 10 for name, vm in vms.items()}


async def test_two_greedy_tenants_of_weight_one_and_three_run_one_to_three(autojump_clock):
    rates = await share({"a": ("one", 1e-4), "b": ("three", 1e-4)}, {"one": 1, "three": 3})
    assert rates["b"] / rates["a"] == pytest.approx(3, rel=0.03)
    assert rates["a"] + rates["b"] == pytest.approx(400, rel=0.03)


async def test_a_tenants_share_does_not_grow_with_its_vms(autojump_clock):
    demands = {"a": ("one", 1e-4), **{f"b{n}": ("three", 1e-4) for n in range(4)}}
    rates = await share(demands, {"one": 1, "three": 3})
    assert rates["a"] == pytest.approx(100, rel=0.03)
    assert [rates[f"b{n}"] for n in range(4)] == pytest.approx([75] * 4, rel=0.03)


async def test_an_idle_tenants_share_is_borrowed(autojump_clock):
    rates = await share({"a": ("one", 1e-4), "b": ("three", 1e9)}, {"one": 1, "three": 3})
    assert rates["a"] == pytest.approx(400, rel=0.03)
    assert rates["b"] == 0


async def test_what_a_modest_tenant_leaves_is_borrowed_and_it_is_not_held_back(autojump_clock):
    rates = await share({"a": ("one", 1e-4), "b": ("three", 0.05)}, {"one": 1, "three": 3})
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
        await trio.sleep(10)
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
        await trio.sleep(0.5)  # ten ticks
        before = [vm.statistics().exits["io"] for vm in vms]
        await trio.sleep(1)
        one, three = (vm.statistics().exits["io"] - count for vm, count in zip(vms, before, strict=True))
        assert three / one == pytest.approx(3, rel=0.1)


# ---- CPU time


class Clocks:
    """Stands for the clocks of threads: `ran` and `waited` in nanoseconds by thread."""

    absent: dict[str, str] = {}  # noqa: RUF012  # never changed

    def __init__(self) -> None:
        self.ran: dict[int, int] = {}
        self.waited: dict[int, int] = {}
        self.looked: list[int] = []

    def cpu(self, tid: int) -> int | None:
        self.looked.append(tid)
        return self.ran.get(tid, 0)

    def run_delay(self, tid: int) -> int | None:
        return self.waited.get(tid, 0)

    def forget(self, tid: int) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def clocks(monkeypatch) -> Clocks:
    """Scripted VMs get a thread each: vCPU i of VM "n" has the number 10 * n + i."""
    clocks = Clocks()
    monkeypatch.setattr(Vcpu, "tid", property(lambda vcpu: 10 * int(vcpu.host.name) + vcpu.index))
    real = Observer.__init__
    monkeypatch.setattr(Observer, "__init__", lambda self, fleet, host, threads: real(self, fleet, host, clocks))
    return clocks


async def test_a_vm_that_only_computes_is_found_by_its_threads_clock(autojump_clock, clocks):
    told = Told()
    async with play([FOR_EVER], policies=[told]) as fleet:
        await fleet.launch(blank("1", vcpus=2))
        await fleet.launch(blank("2"))
        await trio.sleep(0.5)
        clocks.ran |= {10: 300_000_000, 11: 100_000_000}
        clocks.waited |= {10: 50_000_000}
        await trio.sleep(1)
        clocks.ran[11] += 200_000_000
        await trio.sleep(2)
    first, second, third, *_ = told.facts
    assert set(first.vms) == set(second.vms) == {"1"}
    assert (first.vms["1"].cpu, first.vms["1"].run_delay) == (0.4, 0.05)
    assert (first.vms["1"].exits, first.vms["1"].throttled, first.vms["1"].capped) == (0, 0, None)
    assert (second.vms["1"].cpu, second.vms["1"].run_delay) == (0.2, 0)
    assert third.vms == {}


async def test_what_a_thread_used_before_its_vm_was_there_is_not_the_vms(autojump_clock, clocks):
    told = Told()
    clocks.ran[10] = 5_000_000
    async with play([FOR_EVER], policies=[told]) as fleet:
        await fleet.launch(blank("1"))
        await trio.sleep(1.5)
    assert told.facts[0].vms == {}


async def test_idle_vms_are_looked_at_a_few_in_turn_and_busy_ones_always(autojump_clock, clocks):
    told = Told()
    async with play([FOR_EVER], policies=[told]) as fleet:
        for number in range(200):
            await fleet.launch(blank(str(number)))
        clocks.ran[100 * 10] = 1
        clocks.looked.clear()
        await trio.sleep(1.5)
        assert len(clocks.looked) == IN_TURN
        for _ in range(10):
            clocks.ran[100 * 10] += 1_000_000
            await trio.sleep(1)
        assert len(clocks.looked) <= 11 * (IN_TURN + 1)
        assert len(set(clocks.looked)) == 200
        found = [number for number, facts in enumerate(told.facts) if "100" in facts.vms]
        assert found == list(range(found[0], 11))  # once it is found it is not lost again
        assert found[0] <= 3
        assert [facts.vms["100"].cpu for facts in told.facts[found[0] + 1 :]] == [0.001] * (10 - found[0])


async def test_cpu_time_of_ticks_that_nobody_looked_in_is_not_all_told_as_this_ticks(autojump_clock, clocks):
    told = Told()
    async with play([FOR_EVER], policies=[told]) as fleet:
        for number in range(200):
            await fleet.launch(blank(str(number)))
        await trio.sleep(2.5)  # those launched last were not looked at yet
        clocks.ran[199 * 10] = 3_000_000_000
        clocks.waited[199 * 10] = 4_000_000_000
        await trio.sleep(2)
    (vm,) = [facts.vms["199"] for facts in told.facts if "199" in facts.vms]
    assert (vm.cpu, vm.run_delay) == (1, 1)


async def test_without_threads_nobody_tells_cpu_time_and_the_facts_say_why(autojump_clock):
    told = Told()
    async with play([bus_lock(after=0.1), FOR_EVER], policies=[told]) as fleet:
        await fleet.launch(blank())
        await trio.sleep(1.5)
    vm, host = told.facts[0].vms["guest"], told.facts[0].host
    assert (vm.cpu, vm.run_delay, vm.capped, vm.work) == (None, None, None, None)
    assert "no threads" in host.absent["cpu"]
    assert {"run_delay", "cpu_pressure", "lock_ns", "llc_bytes"} <= set(host.absent)


@pytest.mark.kvm
async def test_a_real_guest_that_only_computes_is_told_of(nothing_left):
    told = Told(interval=0.05)
    stage = Stage("kvm")
    async with stage.open(policies=[told], probe=True) as fleet:
        vm = await fleet.launch(stage.spec("spin"))
        with trio.fail_after(30):
            while sum(facts.vms["guest"].cpu for facts in told.facts if "guest" in facts.vms) < 0.05:
                await trio.lowlevel.checkpoint()
        assert sum(vm.statistics().exits.values()) == 0
        facts = next(facts for facts in reversed(told.facts) if "guest" in facts.vms)
        assert (facts.vms["guest"].run_delay is None) == ("run_delay" in facts.host.absent)
        assert facts.host.cpus >= 1
        assert fleet.statistics().host.lock_ns > 0


# ---- a guest's own account


async def test_what_a_guest_got_done_is_told_to_each_policy_once(autojump_clock):
    fast, slow = Told(interval=1), Told(interval=3)
    async with play([FOR_EVER], policies=[fast, slow]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(0.5)
        for units in (10, 5.5, 0):
            vm.report_work(units)
            await trio.sleep(1)
        await trio.sleep(3)
    assert [facts.vms["guest"].work if facts.vms else None for facts in fast.facts] == [10, 5.5, 0, None, None, None]
    assert [facts.vms["guest"].work if facts.vms else None for facts in slow.facts] == [15.5, None]


@pytest.mark.parametrize("units", [-1, float("nan"), float("inf"), True, "7"])
async def test_work_that_cant_be_is_refused(autojump_clock, units):
    async with play([FOR_EVER]) as fleet:
        vm = await fleet.launch(blank())
        with pytest.raises(orc.SpecError, match="units="):
            vm.report_work(units)


# ---- the guard


def at_tick(actions: dict[int, orc.Action]) -> Callable[[orc.Facts], list[orc.Action]]:
    """Ask for an action at some of the ticks, counted from 1."""
    ticks = itertools.count(1)
    return lambda facts: [action] if (action := actions.get(next(ticks))) is not None else []


def outcomes(fleet: orc.Fleet) -> list[tuple[str, str | None, str]]:
    return [(type(applied.action).__name__, applied.policy, applied.outcome) for applied in fleet.actions()]


async def test_a_policy_can_t_hold_a_vm_below_the_guards_floor(autojump_clock):
    told = Told(at_tick({1: orc.Throttle(vm="guest", limit=orc.Limit(rate=0.001, max_delay=None), reason="loud")}))
    async with play([FOR_EVER], policies=[told], guard=orc.Guard(floor=5, max_delay=2)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        assert (vm.statistics().limit.rate, vm.statistics().limit.max_delay) == (5, 2)
        (applied,) = fleet.actions()
        assert applied.outcome == "done"
        assert "raised to the floor" in applied.action.reason
        assert applied.action.evidence["asked"]["rate"] == 0.001


async def test_the_floor_of_a_tenant_counts_its_vms(autojump_clock):
    limit = orc.Limit(rate=0.1)
    told = Told(lambda facts: [orc.Throttle(tenant="acme", limit=limit), orc.Throttle(limit=limit)])
    async with play([FOR_EVER], policies=[told], tenants={"acme": None}, guard=orc.Guard(floor=2)) as fleet:
        for number in range(3):
            await fleet.launch(blank(f"a{number}", tenant="acme"))
        await fleet.launch(blank("other"))
        await (await fleet.launch(blank("gone"))).stop()
        await trio.sleep(1.5)
        assert fleet.statistics().tenants["acme"].limit.rate == 6
        assert fleet.limit.rate == 8


class Refusable(Told):
    def refused(self, action: orc.Action, reason: str) -> None:
        self.no.append((action, reason))

    def __init__(self, *args: object, **more: object) -> None:
        super().__init__(*args, **more)
        self.no: list[tuple[orc.Action, str]] = []


async def test_a_refused_action_is_journaled_not_done_and_told_to_the_policy(autojump_clock):
    pause = orc.Pause(vm="guest", reason="loud")
    told = Refusable(at_tick({1: pause, 3: pause}), name="harsh")
    async with play([FOR_EVER], policies=[told], guard=orc.Guard(vm_cool_down=60)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        assert vm.state == "paused"
        await vm.resume()
        await trio.sleep(2)
        assert vm.state == "running"
        assert outcomes(fleet) == [("Pause", "harsh", "done"), ("Resume", None, "done"), ("Pause", "harsh", "refused")]
        assert "let it go" in fleet.actions()[-1].error
        assert told.no == [(pause, fleet.actions()[-1].error)]


async def test_an_action_that_fails_is_told_to_the_policy_as_well(autojump_clock):
    told = Refusable(at_tick({1: orc.Pause(vm="nobody")}))
    async with play([FOR_EVER], policies=[told]):
        await trio.sleep(1.5)
    assert len(told.no) == 1
    assert "no such VM" in told.no[0][1]


@pytest.mark.parametrize(
    "policy",
    [
        orc.StaticLimits({"*": orc.Limit(rate=20)}),
        orc.BurstCredits(20, 40),
        orc.only(orc.StaticLimits({"*": orc.Limit(rate=20)}), vms="*"),
    ],
)
async def test_who_was_not_limited_as_there_were_too_many_is_later(autojump_clock, policy):
    guard = orc.Guard(limits_per_minute=2)
    async with play(itertools.repeat(bus_lock(after=0.5)), policies=[policy], guard=guard) as fleet:
        vms = [await fleet.launch(blank(name)) for name in "abcd"]
        await trio.sleep(10)
        assert sum(vm.statistics().limit is not None for vm in vms) == 2
        await trio.sleep(120)
        assert {vm.statistics().limit.rate for vm in vms} == {20}
        assert len(fleet.actions()) < 30


async def test_a_policy_that_looks_once_has_another_look_if_it_was_refused(autojump_clock):
    policy = orc.StaticLimits(tenants={"*": orc.Limit(rate=20)}, host=orc.Limit(rate=30))
    async with play(
        [FOR_EVER], policies=[policy], tenants={"a": None, "b": None}, guard=orc.Guard(limits_per_minute=2)
    ) as fleet:
        await trio.sleep(300)
        assert {tenant.limit.rate for tenant in fleet.statistics().tenants.values()} == {20}
        (status,) = fleet.statistics().policies
        assert (status.on, status.error) == (False, None)


async def test_a_policy_that_raises_when_it_is_refused_is_switched_off(autojump_clock):
    told = Refusable(at_tick({1: orc.Pause(vm="nobody")}), name="touchy")
    told.refused = raises_at_refusal  # type: ignore[method-assign,assignment]
    async with play([FOR_EVER], policies=[told, Told()]) as fleet:
        await trio.sleep(2.5)
        assert [status.on for status in fleet.statistics().policies] == [False, True]
        assert "a bug of yours" in fleet.statistics().policies[0].error


def raises_at_refusal(action: orc.Action, reason: str) -> None:
    raise ValueError("a bug of yours")


async def test_a_dry_run_decides_and_journals_and_does_nothing(autojump_clock):
    told = Told(lambda facts: [orc.Pause(vm=name) for name in facts.vms], name="rehearsal")
    async with play(itertools.repeat(bus_lock(after=0.1)), policies=[told], guard=orc.Guard(dry_run=True)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        assert vm.state == "running"
        assert outcomes(fleet) == [("Pause", "rehearsal", "dry-run")]


async def test_a_pause_that_lasts_too_long_ends_by_itself_also_if_the_policy_is_off_by_then(autojump_clock):
    def decide(facts: orc.Facts) -> list[orc.Action]:
        if len(told.facts) > 1:
            raise ValueError("a bug of yours")
        return [orc.Pause(vm="guest")]

    told = Told(decide, name="broken")
    async with play([FOR_EVER], policies=[told], guard=orc.Guard(max_pause=30)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(30.5)
        assert vm.state == "paused"
        await trio.sleep(2)
        assert vm.state == "running"
        last = fleet.actions()[-1]
        assert (last.action.reason, last.policy) == ("paused by policy broken for more than 30 s", None)


async def test_what_was_said_about_a_vm_does_not_bind_the_next_of_its_name(autojump_clock):
    first = Told(at_tick({1: orc.Pause(vm="guest")}), name="first")
    second = Told(at_tick({2: orc.Resume(vm="guest"), 4: orc.Resume(vm="guest")}), name="second")
    async with play([FOR_EVER], policies=[first, second]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(2.5)
        assert outcomes(fleet)[-1] == ("Resume", "second", "refused")  # the first, which goes first, holds it
        await vm.stop()
        await fleet.launch(blank())
        await trio.sleep(2)
        assert outcomes(fleet)[-1] == ("Resume", "second", "done")


async def test_an_action_that_makes_no_sense_to_the_guard_switches_the_policy_off(autojump_clock):
    told = Told(lambda facts: [orc.Pause(vm=["guest"])])  # type: ignore[arg-type]
    async with play([FOR_EVER], policies=[told, Told()]) as fleet:
        await trio.sleep(2.5)
        assert [status.on for status in fleet.statistics().policies] == [False, True]


async def test_harm_is_acted_on_within_one_tick(autojump_clock):
    ladder = orc.Ladder(
        [orc.Step(rung=orc.Rung.WARN, when=[orc.Condition("bus_locks", over=100)], dwell=0.0)], interval=0.1
    )
    script = [bus_lock(after=10), *[bus_lock(after=0.002)] * 2000, FOR_EVER]
    async with play(script, policies=[ladder]) as fleet:
        await fleet.launch(blank())
        begins = fleet.now() + 10e9
        await trio.sleep(12)
        first = fleet.actions()[0]
        assert isinstance(first.action, orc.Warn)
        assert 0 < first.time - begins <= 0.1e9 + 0.1e9


# ---- VMs that take their time


class Stuck:
    """A device whose reads take until `release`. Waits for nothing once the test is over."""

    def __init__(self) -> None:
        self.entered, self.release = threading.Event(), threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.entered.set()
        self.release.wait(30)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Never called."""


class Slow:
    """A fleet with a guest whose vCPU is in a device for as long as the test wants, and two policies."""

    def __init__(self, backend: str) -> None:
        self.stage, self.device = Stage(backend), Stuck()
        self.wants: list[orc.Action] = []
        self.asks = Told(lambda facts: [self.wants.pop(0)] if self.wants else [], name="asks", interval=0.01)
        self.other = Told(name="other", interval=0.01)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[orc.Fleet, orc.Vm]]:
        guard = orc.Guard(vm_cool_down=0, host_cool_down=0)
        async with self.stage.open(policies=[self.asks, self.other], guard=guard) as fleet:
            try:
                vm = await fleet.launch(
                    self.stage.spec("ask_twice"), devices=[(range(0x500, 0x504), None, self.device)]
                )
                await wait_until(self.device.entered.is_set, within=10)
                yield fleet, vm
            finally:
                self.device.release.set()

    async def ticks(self) -> None:
        """Until the other policy has decided three times more."""
        seen = len(self.other.facts)
        await wait_until(lambda: len(self.other.facts) >= seen + 3, within=5)


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("emulated", "kvm")])
def slow(request: pytest.FixtureRequest, nothing_left: Callable[[], None]) -> Slow:
    return Slow(request.param)


async def test_a_vm_that_takes_long_to_pause_keeps_no_policy_waiting(slow):
    async with slow.open() as (fleet, vm):
        slow.wants = [orc.Pause(vm="guest")]
        await slow.ticks()
        assert outcomes(fleet) == [("Pause", "asks", "done")]
        assert vm.state == "paused"  # no guest code runs, but it is in the middle of an access
        assert [access.waits_for for access in vm.statistics().pending] == [type(slow.device).__name__]
        assert not vm.quiesced
        slow.device.release.set()
        await vm.pause()
        assert (vm.quiesced, vm.statistics().pending) == (True, ())


async def test_a_vm_that_takes_long_to_stop_keeps_no_policy_waiting(slow):
    async with slow.open() as (fleet, vm):
        slow.wants = [orc.Pause(vm="guest"), orc.Stop(vm="guest", reason="out")]
        await slow.ticks()
        assert outcomes(fleet) == [("Pause", "asks", "done"), ("Stop", "asks", "done")]
        assert vm.outcome is None
        slow.device.release.set()
        assert await vm.wait() == orc.Stopped("out")
        assert fleet.vms == {}


async def test_a_pause_that_is_taken_back_before_it_took_effect_was_none(slow):
    async with slow.open() as (fleet, vm):
        slow.wants = [orc.Pause(vm="guest"), orc.Resume(vm="guest")]
        await slow.ticks()
        assert outcomes(fleet) == [("Pause", "asks", "done"), ("Resume", "asks", "done")]
        slow.device.release.set()
        await slow.ticks()
        assert vm.state != "paused"


async def test_a_policy_is_taken_away_without_waiting_for_its_pause(slow):
    async with slow.open() as (fleet, vm):
        slow.wants = [orc.Pause(vm="guest")]
        await slow.ticks()
        with trio.fail_after(5):
            await fleet.set_policies([slow.other])
        assert outcomes(fleet) == [("Pause", "asks", "done"), ("Resume", "asks", "done")]
        slow.device.release.set()
        await slow.ticks()
        assert vm.state != "paused"


# ---- pressure that can't wait


class Listens(Told):
    signals = ("cpu_pressure", "lock_slowdown")


async def test_pressure_brings_the_tick_of_who_listens_forward_and_nobody_elses(autojump_clock):
    slow, deaf = Listens(interval=10), Told(interval=10)
    async with play([FOR_EVER], policies=[slow, deaf]) as fleet:
        await trio.sleep(3)
        fleet._context.runner.hurry("io_pressure")
        await trio.sleep(1)
        assert (slow.facts, deaf.facts) == ([], [])
        fleet._context.runner.hurry("cpu_pressure")
        await trio.sleep(0.001)
        assert [facts.interval for facts in slow.facts] == [4]
        fleet._context.runner.hurry("cpu_pressure")  # it has just looked
        await trio.sleep(9.9)
        assert len(slow.facts) == 1
        await trio.sleep(0.2)
        assert [facts.interval for facts in slow.facts] == [4, 10]
        assert [facts.interval for facts in deaf.facts] == [10]


@pytest.mark.kvm
async def test_a_fleet_waits_for_the_pressure_that_a_slow_policy_listens_to(monkeypatch, nothing_left):
    class Fires:
        """A trigger that fires when it is told to."""

        signal = "cpu_pressure"
        fire = trio.Event()
        closed = False

        async def wait(self) -> None:
            await self.fire.wait()
            type(self).fire = trio.Event()

        def close(self) -> None:
            type(self).closed = True

    asked: list[set[str]] = []

    def triggers(self: object, signals: set[str]) -> list[Fires]:
        asked.append(set(signals))
        return [Fires()]

    monkeypatch.setattr("orchestra.host.observe.HostSignals.triggers", triggers)
    slow, quick = Listens(interval=1000), Listens(interval=0.1)
    quick.signals = ("memory_pressure",)  # it ticks before any trigger could fire
    async with Stage("kvm").open(policies=[slow, quick]):
        with trio.fail_after(10):
            while len(quick.facts) < 3:
                await trio.lowlevel.checkpoint()
            assert slow.facts == []
            Fires.fire.set()
            while not slow.facts:
                await trio.lowlevel.checkpoint()
        assert "lock_ns" not in slow.facts[0].host.absent  # it listens to what the probe says, so that runs
    assert asked == [{"cpu_pressure"}]
    assert Fires.closed


# ---- other policies while it runs


def throttles(rate: float) -> Callable[[orc.Facts], list[orc.Action]]:
    return lambda facts: [orc.Throttle(vm="guest", limit=orc.Limit(rate=rate, burst=2))]


async def test_policies_are_exchanged_and_what_the_old_ones_held_is_let_go(autojump_clock):
    stays, goes, comes = Told(name="stays"), Told(throttles(5), name="goes"), Told(throttles(7), name="comes")
    async with play([FOR_EVER], policies=[stays, goes]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(2.5)
        assert vm.statistics().limit.rate == 5
        await fleet.set_policies([comes, stays])
        assert vm.statistics().limit is None
        last = fleet.actions()[-1]
        assert (last.action, last.policy) == (
            orc.Unthrottle(vm="guest", reason="policy goes was taken away"),
            "goes",
        )
        await trio.sleep(3.1)
        assert vm.statistics().limit.rate == 7
        assert (len(stays.facts), len(goes.facts), len(comes.facts)) == (5, 2, 3)
        assert [facts.interval for facts in stays.facts] == pytest.approx([1] * 5)
        assert [status.name for status in fleet.statistics().policies] == ["comes", "stays"]


@pytest.mark.parametrize("after", range(6))
async def test_policies_that_are_taken_away_leave_nothing_in_force_whenever_that_is_cancelled(autojump_clock, after):
    asks = {
        1: orc.Throttle(vm="guest", limit=orc.Limit(rate=5)),
        2: orc.Pause(vm="guest"),
        3: orc.Throttle(vm="guest", meter="exits", limit=orc.Limit(rate=500)),
    }
    goes = Told(at_tick(asks), name="goes")
    async with play([FOR_EVER], policies=[goes]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(3.5)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet.set_policies, [])
            for _ in range(after):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        found = vm.statistics()
        if fleet.statistics().policies:  # not begun
            assert (found.limit.rate, found.exit_limit.rate, vm.state) == (5, 500, "paused")
        else:
            assert (found.limit, found.exit_limit, vm.state) == (None, None, "running")


async def test_another_policy_of_the_same_name_starts_anew(autojump_clock):
    one, other = Told(throttles(5), name="p"), Told(name="p")
    async with play([FOR_EVER], policies=[one]) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        await fleet.set_policies([other])
        assert vm.statistics().limit is None


async def test_a_fleet_without_policies_can_be_given_some(autojump_clock):
    told = Told()
    async with play([*[bus_lock(after=0.5)] * 4, FOR_EVER]) as fleet:
        await fleet.launch(blank())
        await trio.sleep(1.1)
        await fleet.set_policies([told])
        await trio.sleep(5)
    assert len(told.facts) == 4 or len(told.facts) == 5
    assert sum(facts.vms["guest"].bus_locks for facts in told.facts if facts.vms) == 2


async def test_another_guard_judges_from_then_on(autojump_clock):
    told = Told(throttles(0.001), name="harsh")
    async with play([FOR_EVER], policies=[told], guard=orc.Guard(floor=5)) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(1.5)
        assert vm.statistics().limit.rate == 5
        await fleet.set_policies([told], orc.Guard(floor=9))
        await trio.sleep(1)
        assert vm.statistics().limit.rate == 9


@pytest.mark.parametrize(
    ("policies", "error", "message"),
    [
        ([object()], orc.SpecError, "decide"),
        ([Told(name="p"), Told(name="p")], orc.SpecError, "two are named"),
        ([Told(interval=-1)], orc.SpecError, "interval="),
        ([orc.StaticLimits(host=orc.Limit(rate=1))], orc.BusLockUnsupported, "static-limits"),
    ],
)
async def test_policies_that_cant_be_leave_the_others_as_they_are(autojump_clock, policies, error, message):
    told = Told()
    async with orc.open_fleet(backend=orc.ScriptedBackend(detection=None), policies=[told]) as fleet:
        with pytest.raises(error, match=message):
            await fleet.set_policies(policies)
        with pytest.raises(orc.SpecError, match="guard="):
            await fleet.set_policies([], guard="none")  # type: ignore[arg-type]
        await trio.sleep(1.5)
    assert len(told.facts) == 1


async def test_policies_that_listen_to_the_probe_say_so():
    assert set(orc.Adaptive().signals) == {"lock_slowdown", "memory_slowdown"}
    assert orc.only(orc.Adaptive({"cpu_pressure": 0.5}), vms="a").signals == ("cpu_pressure",)
    step = orc.Step(
        rung=orc.Rung.WARN, when=[orc.Condition("bus_locks", over=100), orc.Condition("io_pressure", over=0.1)]
    )
    assert orc.Ladder([step]).signals == ("io_pressure",)
