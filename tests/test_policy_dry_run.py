"""A dry run decides what would be decided if it were none."""

from __future__ import annotations

import itertools

import attrs
import pytest
import trio
from hypothesis import given, settings, strategies as st

import orchestra as orc
from closed_loop import Guest, World, during, steady
from conftest import blank, play
from orchestra.backend.scripted import bus_lock
from orchestra.model.actions import Action, CapCpu, Evict, Isolate, Pause, Resume, Stop, Throttle, Unthrottle, Warn
from orchestra.model.spec import Limit
from orchestra.policy import BusTime, Condition, Facts, Guard, Ladder, Policy, Step, VmFacts, WeightedShare
from orchestra.policy.dry_run import DryRun

SECOND = 1_000_000_000
BAD = Condition("bus_locks", 100)
ENDLESS = (  # nothing on it keeps a guest below the threshold, but for the pauses
    Step(rung="warn", when=BAD, clear=2),
    Step(rung="cap_cpu", when=BAD, dwell=0.5, clear=2, cpu=0.9),
    Step(rung="isolate", when=BAD, dwell=1, clear=2),
    Step(rung="pause", when=BAD, dwell=1, clear=3),
    Step(rung="evict", dwell=1, clear=5, returns=3),
)
HELD = (
    Step(rung="warn", when=BAD, clear=2),
    Step(rung="throttle", when=BAD, dwell=0.5, clear=2, limit=Limit(rate=50, max_delay=1.0)),
    Step(rung="cap_cpu", when=BAD, dwell=1, clear=2, cpu=0.5),
    Step(rung="pause", when=BAD, dwell=1, clear=3),
)
GUARD = Guard(vm_cool_down=0.5, host_cool_down=0, most_paused=0.999)


def both(policies, guests, seconds: float, guard: Guard = GUARD, **more: object):  # type: ignore[no-untyped-def]  # policies and guests are made twice
    """What is done, and what a dry run says would be done."""
    real = World(policies(), guests(), guard=attrs.evolve(guard), **more).run(seconds)  # type: ignore[arg-type]  # passed through
    dry = World(policies(), guests(), guard=attrs.evolve(guard, dry_run=True), **more).run(seconds)  # type: ignore[arg-type]  # passed through
    assert dry.actions == []
    return real.actions, dry.dry_actions


def plan(actions: list[tuple[float, Action]]) -> list[tuple[float, type, str | None]]:
    return [(round(time, 6), type(action), action.vm) for time, action in actions]


def test_a_ladder_that_runs_dry_gets_to_its_last_step():
    real, dry = both(lambda: Ladder(ENDLESS), lambda: [Guest("a", steady(500))], 40)
    assert plan(dry) == plan(real)
    assert [kind for _, kind, _ in plan(dry)] == [
        *(Warn, CapCpu, Isolate, Pause, Resume, Pause, Resume, Pause, Evict)
    ]  # and then it is gone


def test_a_ladder_that_runs_dry_stays_where_a_throttle_would_have_ended_the_matter():
    guests = lambda: [Guest("a", during(1000, (0, 20))), Guest("b", steady(20))]  # noqa: E731  # a line
    real, dry = both(lambda: Ladder(HELD), guests, 30)
    assert [kind for _, kind, _ in plan(dry)] == [kind for _, kind, _ in plan(real)] == [Warn, Throttle, Unthrottle]
    assert plan(dry)[-1][0] == pytest.approx(plan(real)[-1][0], abs=0.3)


@settings(max_examples=10)
@given(
    st.lists(st.sampled_from([30.0, 150.0, 400.0]), min_size=1, max_size=3),
    st.lists(st.sampled_from(ENDLESS), unique=True, min_size=2),
)
def test_a_dry_run_decides_as_a_real_one_whatever_the_ladder(rates, steps):
    steps = sorted((attrs.evolve(step, when=BAD) for step in steps), key=ENDLESS_ORDER)
    steps = [attrs.evolve(step, returns=0) if step.rung != "evict" else step for step in steps]
    if [step.rung for step in steps[-2:]] == ["pause", "evict"]:
        steps[-1] = ENDLESS[-1]
    real, dry = both(lambda: Ladder(steps), lambda: [Guest(f"v{n}", steady(rate)) for n, rate in enumerate(rates)], 15)
    assert plan(dry) == plan(real)


def ENDLESS_ORDER(step: Step) -> int:  # it goes with it
    return [one.rung for one in ENDLESS].index(step.rung)


def test_a_share_that_runs_dry_sets_the_limits_that_it_would_set():
    def policies() -> list[Policy]:
        return [WeightedShare(Limit(rate=300, max_delay=None))]

    real, dry = both(policies, lambda: [Guest("a", steady(900)), Guest("b", steady(600)), Guest("c", steady(50))], 10)
    ends = []
    for actions in (real, dry):
        last = {action.vm: action.limit.rate for _, action in actions if isinstance(action, Throttle)}
        ends.append(last)
    assert ends[0].keys() == ends[1].keys() == {"a", "b"}
    assert ends[1] == pytest.approx(ends[0], rel=0.1)


def test_what_one_rehearses_another_that_does_so_as_well_finds_in_force():
    real, dry = both(lambda: [Ladder([attrs.evolve(ENDLESS[3], dwell=0)]), Ladder(ENDLESS[:1], name="w")], noisy, 20)
    assert plan(dry) == plan(real)
    assert [kind for _, kind, _ in plan(dry)].count(Warn) > 1  # it saw it fall silent while it was paused


def noisy() -> list[Guest]:
    return [Guest("a", steady(500))]


# ---- what is shown


def facts(*vms: VmFacts, limit: Limit | None = None) -> Facts:
    return Facts(SECOND, 1.0, limit, None, {}, {vm.name: vm for vm in vms})


def vm(name: str, locks: int | None = 100, **more: object) -> VmFacts:
    told = VmFacts(name, "acme", 1.0, 1, locks, 200, 0.0, 1)
    return attrs.evolve(told, **more)  # type: ignore[arg-type]  # passed through


def test_nothing_decided_nothing_changed():
    seen = facts(vm("a"))
    dry_run = DryRun()
    assert dry_run.see(seen) is seen
    dry_run.apply(Warn(vm="a"), "p", 0)
    assert dry_run.see(seen) is seen


@pytest.mark.parametrize("out", [Pause(vm="a"), Evict(vm="a"), Stop(vm="a")], ids=lambda action: type(action).__name__)
def test_who_would_be_out_is_not_there_until_it_is_another(out):
    dry_run = DryRun()
    dry_run.apply(out, "p", 0)
    assert set(dry_run.see(facts(vm("a"), vm("b"))).vms) == {"b"}
    dry_run.forget("a")
    assert set(dry_run.see(facts(vm("a"), vm("b"))).vms) == {"a", "b"}


def test_a_throttle_shows_what_it_would_let_through_and_the_wait():
    dry_run = DryRun()
    dry_run.apply(Throttle(vm="a", limit=Limit(rate=20, burst=2)), "p", 0)
    shown = [dry_run.see(facts(vm("a", cpu=0.5, work=10.0, run_delay=0.1), vm("b"))).vms["a"] for _ in range(2)]
    assert [one.bus_locks for one in shown] == [22, 20]
    assert shown[1] == vm("a", 20, exits=40, throttled=0.8, cpu=0.1, work=2.0, run_delay=pytest.approx(0.02))
    dry_run.let_go("p")
    assert dry_run.see(facts(vm("a"))).vms["a"] == vm("a")


def test_what_is_decided_shows_from_then_on():
    dry_run = DryRun()
    dry_run.apply(Pause(vm="a"), "p", SECOND)
    assert set(dry_run.see(facts(vm("a"))).vms) == {"a"}  # of the second before
    assert set(dry_run.see(attrs.evolve(facts(vm("a")), time=2 * SECOND)).vms) == set()


def test_a_cap_holds_back_who_uses_more():
    dry_run = DryRun()
    dry_run.apply(CapCpu(vm="a", share=0.25), "p", 0)
    assert dry_run.see(facts(vm("a", cpu=0.2))).vms["a"] == vm("a", cpu=0.2)
    assert dry_run.see(facts(vm("a", None, cpu=1.0))).vms["a"] == vm("a", None, cpu=0.25, exits=50, capped=0.75)
    dry_run.apply(CapCpu(vm="a", share=None), "p", 0)
    assert dry_run.see(facts(vm("a", cpu=1.0))).vms["a"] == vm("a", cpu=1.0)


def test_a_limit_of_the_host_is_told_as_one():
    dry_run = DryRun()
    dry_run.apply(Throttle(limit=Limit(rate=10)), "p", 0)
    assert dry_run.see(facts()).limit == Limit(rate=10)
    assert dry_run.see(facts(limit=Limit(rate=5))).limit == Limit(rate=5)
    assert [one.bus_locks for one in dry_run.see(facts(vm("a", 30), vm("b", 10))).vms.values()] == [8, 3]


# ---- in a fleet


async def test_a_dry_ladder_of_a_fleet_gets_to_its_last_step_and_nothing_happens(autojump_clock):
    ladder = Ladder(ENDLESS)
    guard = attrs.evolve(GUARD, dry_run=("ladder",))
    async with play(itertools.repeat(bus_lock(after=0.005)), policies=[ladder], guard=guard) as fleet:
        vm = await fleet.launch(blank())
        await trio.sleep(30)
        assert [type(applied.action) for applied in fleet.actions()] == [
            *(Warn, CapCpu, Isolate, Pause, Resume, Pause, Resume, Pause, Evict)
        ]
        assert {applied.outcome for applied in fleet.actions()} == {"dry-run"}
        assert vm.state == "running"
        assert vm.statistics().bus_locks == pytest.approx(30 / 0.005, rel=0.01)
        await vm.stop()
        await fleet.launch(blank())
        await trio.sleep(1)
        assert isinstance(fleet.actions()[-1].action, CapCpu)  # another of its name is there


async def test_a_rehearsed_pause_ends_after_the_most_that_one_may_last(autojump_clock):
    class Pauses:
        name, interval = "pauses", 1.0

        def __init__(self) -> None:
            self.seen: list[bool] = []

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            self.seen.append("guest" in facts.vms)
            return [Pause(vm="guest")] if len(self.seen) == 2 else []

    policy = Pauses()
    guard = Guard(dry_run=True, max_pause=5)
    async with play(itertools.repeat(bus_lock(after=0.1)), policies=[policy], guard=guard) as fleet:
        await fleet.launch(blank())
        await trio.sleep(12.5)
        assert policy.seen == [True] * 2 + [False] * 6 + [True] * 4
        assert [(type(a.action), a.policy, a.outcome) for a in fleet.actions()] == [
            (Pause, "pauses", "dry-run"),
            (Resume, None, "dry-run"),
        ]


async def test_a_policy_that_comes_later_finds_what_others_rehearse_until_they_are_gone(autojump_clock):
    class Sees:
        interval = 1.0

        def __init__(self, name: str, *actions: orc.Action) -> None:
            self.name, self.actions, self.seen = name, actions, set()

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            self.seen = set(facts.vms)
            return [*self.actions]

    first, second, real = Sees("first", Pause(vm="guest")), Sees("second"), Sees("real")
    guard = Guard(dry_run=("first", "second"))
    async with play(itertools.repeat(bus_lock(after=0.1)), policies=[first], guard=guard) as fleet:
        await fleet.launch(blank())
        await trio.sleep(1.1)
        await fleet.set_policies([first, second, real])
        await trio.sleep(1.2)
        assert (first.seen, second.seen, real.seen) == (set(), set(), {"guest"})
        await fleet.set_policies([second])
        await trio.sleep(1)
        assert second.seen == {"guest"}


def test_a_ladder_that_runs_dry_sees_what_others_that_do_so_would_let_through():
    def policies() -> list[Policy]:
        return [BusTime(0.0001), Ladder(HELD)]

    for actions in both(policies, noisy, 10):
        kinds = [type(action) for _, action in actions]
        assert (kinds.count(Warn), kinds.count(CapCpu), kinds.count(Pause)) == (1, 0, 0)
