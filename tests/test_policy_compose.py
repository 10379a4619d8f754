"""only(): a policy for some VMs."""

from __future__ import annotations

import pytest

from closed_loop import SECOND, Guest, World, steady
from orchestra.model.actions import Isolate, SetLimit, Throttle, Unthrottle, Warn
from orchestra.model.errors import SpecError
from orchestra.model.spec import Limit, Meter, Tenant
from orchestra.policy import (
    Adaptive,
    Condition,
    Facts,
    HostFacts,
    Ladder,
    Policy,
    StaticLimits,
    Step,
    VmFacts,
    WeightedShare,
    only,
)

TEN = Limit(rate=10)


class Spy:
    """Remembers what it saw, and says what it was told to say."""

    name, interval = "spy", 0.5

    def __init__(self, *says):
        self.says, self.saw, self.heard = list(says), [], []

    def decide(self, facts):
        self.saw.append(facts)
        return self.says

    def refused(self, action, reason):
        self.heard.append((action, reason))


def facts() -> Facts:
    vms = [("web-1", "acme"), ("web-2", "other"), ("db-1", "acme")]
    return Facts(
        time=SECOND,
        interval=0.1,
        limit=TEN,
        exit_limit=None,
        tenants={name: Tenant(name=name) for name in ("acme", "other")},
        vms={name: VmFacts(name, tenant, 1.0, 1, 5, 5, 0.0) for name, tenant in vms},
        host=HostFacts(cpus=4),
    )


@pytest.mark.parametrize(
    ("vms", "tenants", "expected"),
    [
        ("web-*", None, {"web-1", "web-2"}),
        (None, "acme", {"web-1", "db-1"}),
        ("web-*", "acme", {"web-1"}),
        (["web-2", "db-*"], None, {"web-2", "db-1"}),
        (None, ["a*", "o*"], {"web-1", "web-2", "db-1"}),
        ("nobody", None, set()),
    ],
)
def test_it_sees_those_that_fit(vms, tenants, expected):
    spy = Spy()
    only(spy, vms=vms, tenants=tenants).decide(facts())
    assert set(spy.saw[0].vms) == expected


def test_it_hears_of_the_others_apart_from_those_it_may_hold():
    spy, told = Spy(), facts()
    only(spy, vms="web-*", tenants="acme").decide(told)
    assert spy.saw[0].others == {name: told.vms[name] for name in ("web-2", "db-1")}
    only(only(spy, vms="web-*"), tenants="acme").decide(told)
    assert spy.saw[1].vms == spy.saw[0].vms
    assert spy.saw[1].others == spy.saw[0].others


def suffers(tick: int, victim: str, delay: float, rate: int = 0) -> Facts:
    """A noisy VM, and one that has to wait for a CPU."""
    vms = [
        VmFacts("noisy", "a", 1.0, 1, 100, 100, 0.0, generation=1, cpu=0.05, run_delay=0.0),
        VmFacts(victim, "a", 1.0, 1, rate, rate, 0.0, generation=2, cpu=0.05, run_delay=delay),
    ]
    return Facts(tick * SECOND // 10, 0.1, None, None, {}, {vm.name: vm for vm in vms})


@pytest.mark.parametrize(("delay", "rate", "held"), [(0.04, 0, True), (0.001, 0, False), (0.04, 100, False)])
def test_an_adaptive_for_some_vms_holds_them_for_what_others_suffer(delay, rate, held):
    policy = only(Adaptive({"run_delay": 0.2}), vms="noisy*")
    actions = [action for tick in range(1, 20) for action in policy.decide(suffers(tick, "web", delay, rate))]
    assert {action.vm for action in actions} == ({"noisy"} if held else set())  # who is loud is no victim
    if held:
        assert (actions[0].evidence["hurts"], actions[0].evidence["victim"]) == ("run_delay", "web")


@pytest.mark.parametrize(("delay", "held"), [(0.04, True), (0.001, False)])
def test_a_ladder_for_some_vms_climbs_for_what_others_suffer(delay, held):
    steps = [Step(rung="warn", when=[Condition("bus_locks", over=100), Condition("run_delay", over=0.2)])]
    policy = only(Ladder(steps), vms="noisy*")
    actions = [action for tick in range(1, 20) for action in policy.decide(suffers(tick, "web", delay))]
    assert [action.vm for action in actions] == (["noisy"] if held else [])


def test_tenants_are_those_that_fit_and_the_host_is_the_host():
    spy = Spy()
    only(spy, tenants="acme").decide(facts())
    assert set(spy.saw[0].tenants) == {"acme"}
    assert (spy.saw[0].host, spy.saw[0].limit, spy.saw[0].time) == (HostFacts(cpus=4), TEN, SECOND)


def test_it_is_the_policy_but_for_its_name():
    made = only(WeightedShare(meter="exits", interval=0.3), vms="web-*", tenants="acme")
    assert isinstance(made, Policy)
    assert (made.name, made.interval, made.meter) == ("weighted-share-exits[web-*,acme/]", 0.3, Meter.EXITS)
    assert only(Spy(), vms="a", name="mine").name == "mine"
    assert only(Spy(), vms="a").meter is None


def test_its_actions_go_through():
    says = [Warn(vm="web-1"), Throttle(vm="web-2", limit=TEN), Unthrottle(vm="web-9")]
    assert only(Spy(*says), vms="web-*").decide(facts()) == says
    tenants = [Throttle(tenant="acme", limit=TEN), SetLimit(tenant="acme", limit=None)]
    assert only(Spy(*tenants), tenants="acme").decide(facts()) == tenants


@pytest.mark.parametrize(
    ("action", "where"),
    [
        (Isolate(vm="db-1"), {"vms": "web-*"}),
        (Throttle(limit=TEN), {"vms": "web-*"}),
        (Throttle(limit=TEN), {"tenants": "acme"}),
        (Throttle(tenant="other", limit=TEN), {"tenants": "acme"}),
        (Throttle(tenant="acme", limit=TEN), {"vms": "web-*", "tenants": "acme"}),
    ],
)
def test_what_would_hold_others_as_well_is_an_error(action, where):
    with pytest.raises(SpecError, match="action="):
        only(Spy(action), **where).decide(facts())


def test_what_was_refused_is_passed_on():
    spy = Spy()
    only(spy, vms="a").refused(Warn(vm="a"), "no")
    assert spy.heard == [(Warn(vm="a"), "no")]
    only(StaticLimits(), vms="a").refused(Warn(vm="a"), "no")


@pytest.mark.parametrize("where", [{}, {"vms": ""}, {"vms": []}, {"tenants": [1]}])
def test_it_has_to_be_said_for_whom(where):
    with pytest.raises(SpecError):
        only(Spy(), **where)


def test_two_classes_of_vms_side_by_side():
    share = only(WeightedShare(Limit(rate=300)), vms="batch-*")
    world = World(
        [share, only(StaticLimits({"*": Limit(rate=50)}), vms="web-*"), only(Ladder(), vms="nobody")],
        [Guest("batch-1", steady(900)), Guest("batch-2", steady(900)), Guest("web-1", steady(900))],
    ).run(4)
    assert world.rate("batch-1", 2) == pytest.approx(150, rel=0.05)
    assert world.rate("batch-2", 2) == pytest.approx(150, rel=0.05)
    assert world.rate("web-1", 2) == pytest.approx(50, rel=0.05)
