"""Replays: the same rules do the same again, other rules what they would have done, by a model that keeps its word."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree

import attrs
import pytest
import trio
from hypothesis import given, settings, strategies as st

import orchestra as orc
from conftest import blank, play
from journals import BEGIN, SECOND, Afternoon, lived, vm
from orchestra.backend.scripted import bus_lock, hlt
from orchestra.cli.app import main
from orchestra.config import PolicyRule, Rules, parse_rules
from orchestra.journal import Journal, read_journal
from orchestra.policy.enforcement import FREE, Enforcement
from orchestra.replay import Replay, replay
from orchestra.replay.demand import Demands, Tick, Want, ticks
from orchestra.replay.metrics import jain
from orchestra.replay.response import fit

LADDER = "[[policies]]\nkind = 'ladder'\ninterval = 1.0\nover = 1000\n"


@pytest.fixture
def afternoon(tmp_path: Path) -> Iterator[Afternoon]:
    made = Afternoon(tmp_path / "fleet.db")
    yield made
    made.close()


def noisy(second: int) -> float:
    return 5000 if 100 <= second < 250 else 2


def replayed(afternoon: Afternoon, rules: str | Callable[[], Rules], **span: int) -> Replay:
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        return replay(journal, (lambda: parse_rules(rules)) if isinstance(rules, str) else rules, **span)


# ---- worlds


def test_the_same_rules_do_the_same_again(afternoon):
    (ladder,) = parse_rules(LADDER).policies
    lived(afternoon, 400, {"noisy": noisy, "quiet": lambda _: 3}, [ladder])
    result = replayed(afternoon, LADDER)
    assert result.after.actions == result.before.actions == {"Warn": 1, "Throttle": 1, "Unthrottle": 1}
    assert result.after.bus_locks == pytest.approx(result.before.bus_locks, rel=0.01)
    assert result.after.throttled == pytest.approx(result.before.throttled, rel=0.01)
    assert result.after.victims_delay == pytest.approx(result.before.victims_delay, rel=0.02)
    assert result.after.jain == pytest.approx(result.before.jain, abs=0.01)
    with read_journal(afternoon.path) as journal:
        assert [(deed.time, type(deed.action).__name__) for deed in result.deeds] == [
            (row.time, row.kind) for row in journal.actions()
        ]
    assert (result.seconds, result.sessions, result.errors) == (400, 1, {})
    for world in (result.before, result.after):  # the one that was held is no victim
        assert world.victims_delay == next(one.delay for one in world.vms if one.vm == "quiet")


def test_without_rules_everybody_gets_what_it_asked_for(afternoon):
    (ladder,) = parse_rules(LADDER).policies
    lived(afternoon, 400, {"noisy": noisy, "quiet": lambda _: 3}, [ladder])
    result = replayed(afternoon, "")
    wanted = sum(noisy(second) + 3 for second in range(400))
    assert result.before.wanted == result.after.wanted == pytest.approx(wanted, rel=0.01)
    assert result.after.bus_locks == pytest.approx(wanted, rel=0.01)
    assert result.before.bus_locks < wanted / 5
    assert (result.after.throttled, result.after.actions) == (0, {})
    assert result.after.victims_delay > 2 * result.before.victims_delay  # that is what the ladder was good for


def test_tighter_rules_spare_the_victims_and_hold_the_noisy_one_only(afternoon):
    lived(afternoon, 400, {"noisy": noisy, "quiet": lambda _: 3})
    result = replayed(afternoon, "limit = 200\n[[policies]]\nkind = 'weighted-share'\ninterval = 1.0\n")
    assert result.before.actions == {}
    assert result.after.actions["Throttle"] >= 1
    assert "noisy" in result.after.touched
    vms = {one.vm: one for one in result.after.vms}
    assert vms["noisy"].throttled == pytest.approx(150 * 0.96, rel=0.02)
    assert vms["quiet"].throttled < 2
    assert vms["quiet"].delay < 0.2 * next(one for one in result.before.vms if one.vm == "quiet").delay
    assert result.after.jain == pytest.approx(1.0, abs=0.02)
    assert result.before.jain < 0.6
    assert result.budget


def test_the_budget_that_a_policy_shares_is_what_is_fair(afternoon):
    lived(afternoon, 100, {"noisy": lambda _: 2000, "other": lambda _: 2000, "quiet": lambda _: 3})
    result = replayed(afternoon, "[[policies]]\nkind = 'weighted-share'\nlimit = 200\ninterval = 1.0\n")
    assert result.budget
    assert result.after.jain > 0.95
    exits = "[[policies]]\nkind = 'weighted-share'\nlimit = 200\nmeter = 'exits'\ninterval = 1.0\n"
    assert not replayed(afternoon, exits).budget  # says nothing about bus locks


def test_an_adaptive_policy_hears_that_it_helped(afternoon):
    lived(afternoon, 200, {"noisy": lambda s: 5000 if s >= 100 else 2, "quiet": lambda _: 3})
    text = "[[policies]]\nkind = 'adaptive'\ninterval = 1.0\nsignals = { run_delay = 0.2 }\n"
    result = replayed(afternoon, text)
    assert "run_delay" in result.response.lines
    rates = [deed.action.limit.rate for deed in result.deeds if isinstance(deed.action, orc.Throttle)]
    # It stops where the victim fares well: with the delay as it was, it would go on down to its floor of 10.
    assert 100 < min(rates) < 2500


def test_each_session_starts_anew(tmp_path):
    made: list[orc.Policy] = []

    def rules() -> Rules:
        found = parse_rules(LADDER)
        made.extend(found.policies)
        return found

    first = Afternoon(tmp_path / "fleet.db")
    lived(first, 20, {"noisy": lambda _: 5000})
    first.close()
    second = Afternoon(tmp_path / "fleet.db")
    second.seconds = 100
    lived(second, 20, {"noisy": lambda _: 5000})
    result = replayed(second, rules)
    assert (result.sessions, result.seconds, len(made)) == (2, 40, 2)
    assert result.after.actions["Warn"] == 2


def test_only_the_time_that_is_asked_for_is_gone_through(afternoon):
    lived(afternoon, 400, {"noisy": noisy})
    result = replayed(afternoon, LADDER, since=BEGIN, until=BEGIN + 90 * SECOND)
    assert (result.seconds, result.after.actions) == (90, {})
    with pytest.raises(orc.FileError, match="nothing of that time"):
        replayed(afternoon, LADDER, since=BEGIN + 9999 * SECOND)


def test_a_journal_without_intervals_is_told(afternoon):
    afternoon.state("a", "running")
    with pytest.raises(orc.FileError, match="no intervals"):
        replayed(afternoon, LADDER)


def test_a_limit_of_the_host_that_was_in_force_still_is_unless_the_rules_say_another(afternoon):
    for _ in range(20):
        afternoon.second(vm("a", 100, throttled=0.9), limit=orc.Limit(rate=100))
    assert replayed(afternoon, "").after.bus_locks == pytest.approx(2000, rel=0.01)
    assert replayed(afternoon, "limit = 500").after.bus_locks == pytest.approx(10_000, rel=0.01)


def test_a_policy_that_raises_is_switched_off_and_the_others_go_on(afternoon, monkeypatch):
    lived(afternoon, 50, {"noisy": lambda _: 5000})

    def fail(self: object, facts: orc.Facts) -> list[orc.Action]:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(orc.WeightedShare, "decide", fail)
    result = replayed(afternoon, "[[policies]]\nkind = 'weighted-share'\n" + LADDER)
    assert result.errors == {"weighted-share": "ZeroDivisionError: no"}
    assert result.after.actions["Throttle"] == 1


def test_the_guard_has_its_say_and_a_dry_run_holds_nobody(afternoon):
    lived(afternoon, 100, {"noisy": lambda _: 5000})
    result = replayed(afternoon, "[guard]\ndry_run = true\n" + LADDER)
    assert result.after.actions == {}
    assert result.after.not_done["dry-run"] == sum(replayed(afternoon, LADDER).after.actions.values()) > 1
    assert result.after.bus_locks == result.before.bus_locks
    bound = replayed(afternoon, "[guard]\nactions_per_minute = 0\n" + LADDER)
    assert bound.after.not_done["refused"] > 1  # the ladder hears it, and asks again for its first step
    assert "Throttle" not in bound.after.actions


def test_a_policy_that_looks_seldom_is_told_all_that_happened_meanwhile(afternoon):
    told: list[orc.Facts] = []

    class Seldom:
        name, interval = "seldom", 5.0

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            told.append(facts)
            return []

    for second in range(20):
        some = [vm("b", 1)] if second == 3 else []
        afternoon.second(vm("a", 10, cpu=0.5, exits=30), *some)

    replayed(afternoon, only_with(Seldom()))
    assert [facts.interval for facts in told] == [5, 5, 5, 5]
    assert told[0].vms["a"] == vm("a", 50, cpu=2.5, exits=150)
    assert set(told[0].vms) == {"a", "b"}
    assert set(told[1].vms) == {"a"}
    assert told[0].tenants == {"acme": orc.Tenant("acme")}


def test_policies_are_told_who_has_ended_and_not_of_one_that_is_started_again(afternoon):
    told: list[orc.Facts] = []

    class Listens:
        name, interval = "listens", 2.0

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            told.append(facts)
            return []

    afternoon.state("a", "running")
    afternoon.second(vm("a", 1), vm("b", 1))
    afternoon.state("b", "failed", reason="oops")
    afternoon.state("a", "stopped")
    afternoon.state("b", "running", reason="restarted")
    afternoon.second(vm("a", 5), vm("b", 2))
    afternoon.second(vm("a", 7, generation=2))
    afternoon.second()
    afternoon.state("a", "failed", generation=2)
    for _ in range(2):
        afternoon.second()
    replayed(afternoon, only_with(Listens()))
    # The second "a" ended in the moment of a look, so after it.
    assert [facts.gone for facts in told] == [(("a", 1),), (), (("a", 2),)]
    assert [sorted(facts.vms) for facts in told] == [["b"], ["a"], []]


class Once:
    """Does one thing, at its first look."""

    def __init__(self, action: orc.Action, interval: float | None) -> None:
        self.name, self.interval, self.looks = "once", interval, 0
        self._actions = [action]

    def decide(self, facts: orc.Facts) -> list[orc.Action]:
        self.looks += 1
        return [self._actions.pop()] if self._actions else []


def only_with(
    policy: orc.Policy | Callable[[], orc.Policy], guard: orc.Guard | Callable[[], orc.Guard] | None = None
) -> Callable[[], Rules]:
    """The same objects each time, or what makes them."""

    def rules() -> Rules:
        made = policy() if callable(policy) else policy
        return Rules("x", (PolicyRule(made.name, "own", {}, made),), guard() if callable(guard) else guard)

    return rules


# ---- live and replayed alike


async def both(
    path: Path,
    make: Callable[[], orc.Policy],
    guard: Callable[[], orc.Guard],
    vms: dict[str, list[str]],
    seconds: float,
) -> tuple[list[tuple[str, str | None, float, str]], list[tuple[str, str | None, float, str]]]:
    """Rulings of the same policy, live and as a replay of that journal has them: what was asked for, where,
    the rate and what came of it. `vms` by tenant; one named "idle" does nothing."""
    names = [name for of in vms.values() for name in of]
    scripts = {name: [hlt(after=1e9)] if "idle" in name else itertools.repeat(bus_lock(after=0.1)) for name in names}
    tenants = dict.fromkeys(vms)
    kept = Journal(path)
    async with play(scripts, tenants=tenants, policies=[make()], guard=guard(), journal=kept) as fleet:
        for tenant, of in vms.items():
            for name in of:
                await fleet.launch(attrs.evolve(blank(name), tenant=tenant))
        await trio.sleep(seconds)
    with read_journal(path) as journal:
        live = [
            (row.kind, row.tenant, row.details["limit"]["rate"], row.outcome)
            for row in journal.actions()
            if row.policy is not None
        ]
        again = replay(journal, only_with(make, guard))
    return live, [
        (type(deed.action).__name__, deed.action.tenant, deed.action.limit.rate, deed.outcome) for deed in again.deeds
    ]


async def test_what_was_refused_is_asked_for_again_as_live(tmp_path, autojump_clock):
    limits = {"acme": orc.Limit(rate=50), "lab": orc.Limit(rate=60)}
    live, again = await both(
        tmp_path / "fleet.db",
        lambda: orc.StaticLimits(tenants=limits),
        lambda: orc.Guard(limits_per_minute=1),
        {"acme": ["a"], "lab": ["b"]},
        80,
    )
    assert again == live
    assert live == [
        ("Throttle", "acme", 50, "done"),
        *[("Throttle", "lab", 60, "refused")] * 6,  # after 1, 2, 4, ... seconds
        ("Throttle", "lab", 60, "done"),
    ]


async def test_a_tenants_floor_is_that_of_its_own_vms_as_live(tmp_path, autojump_clock):
    def holds(tenant: str) -> Callable[[], Once]:
        return lambda: Once(orc.Throttle(tenant=tenant, limit=orc.Limit(rate=5)), 2.0)

    vms = {"lab": ["b"], "acme": [f"vm-{i}" for i in range(50)], "rest": ["c", *(f"idle-{i}" for i in range(8))]}
    live, again = await both(tmp_path / "lab.db", holds("lab"), orc.Guard, vms, 10)
    assert again == live == [("Throttle", "lab", 5, "done")]
    live, again = await both(tmp_path / "rest.db", holds("rest"), orc.Guard, vms, 10)
    assert again == live == [("Throttle", "rest", 9, "done")]  # those that do nothing count as well


async def test_limits_of_specs_tenants_and_the_host_are_there_in_a_replay_as_they_were(tmp_path, autojump_clock):
    path = tmp_path / "fleet.db"
    scripts = {name: itertools.repeat(bus_lock(after=0.001)) for name in "ab"}
    async with play(
        scripts, journal=Journal(path), limit=orc.Limit(rate=900), tenants={"acme": orc.Limit(rate=30, burst=1)}
    ) as fleet:
        await fleet.launch(attrs.evolve(blank("a"), limit=orc.Limit(rate=10, burst=1)))
        await fleet.launch(attrs.evolve(blank("b"), tenant="acme"))
        await trio.sleep(50)
        await fleet.set_limit(orc.Limit(rate=20, burst=1), vm="a")
        await trio.sleep(50)
    with read_journal(path) as journal:
        result = replay(journal, lambda: parse_rules(""))
        assert result.before.actions == {"SetLimit": 1}  # what a fleet began with, nobody did
        for world in (result.before, result.after):
            locks = {one.vm: one.bus_locks for one in world.vms}
            assert locks["a"] == pytest.approx(50 * 10 + 50 * 20, rel=0.05)
            assert locks["b"] == pytest.approx(100 * 30, rel=0.05)
        other = replay(journal, lambda: parse_rules("[tenants.acme]\nlimit = 60\n"))
        assert {one.vm: one.bus_locks for one in other.after.vms}["b"] == pytest.approx(100 * 60, rel=0.05)


@pytest.mark.parametrize(
    "policy",
    [
        orc.WeightedShare(orc.Limit(rate=100), meter="answers"),
        orc.Ladder([orc.Step(rung="warn", when=[orc.Condition("answers", 1000)])]),
        orc.only(orc.Ladder([orc.Step(rung="warn", when=[orc.Condition("answers", 1000)])]), vms="a*"),
    ],
    ids=["meter", "signal", "of some VMs"],
)
def test_a_policy_that_looks_at_what_no_journal_keeps_is_refused(afternoon, policy):
    lived(afternoon, 3, {"a": noisy}, [])
    with pytest.raises(orc.SpecError, match="answers, which a replay does not show"):
        replayed(afternoon, only_with(policy))


def test_a_policy_that_looks_once_looks_once(afternoon):
    lived(afternoon, 20, {"a": lambda _: 100})
    policy = Once(orc.Throttle(vm="a", limit=orc.Limit(rate=10)), None)
    result = replayed(afternoon, only_with(policy))
    assert policy.looks == 1
    assert result.after.bus_locks == pytest.approx(100 + 19 * 10, abs=2)


def test_a_pause_that_nobody_ends_is_ended_by_the_guard(afternoon):
    lived(afternoon, 50, {"a": lambda _: 100})
    policy = Once(orc.Pause(vm="a"), 1.0)
    result = replayed(afternoon, only_with(policy, orc.Guard(max_pause=5)))
    assert result.after.paused == 6
    assert result.after.bus_locks == 44 * 100
    assert (result.before.paused, result.after.touched) == (None, {"a"})


def test_who_was_held_would_have_run_longer_and_waited_longer_for_a_cpu(afternoon):
    told: list[orc.Facts] = []

    class Listens:
        name, interval = "listens", 1.0

        def decide(self, facts: orc.Facts) -> list[orc.Action]:
            told.append(facts)
            return []

    for _ in range(10):
        afternoon.second(vm("a", 100, throttled=0.5, cpu=0.4, run_delay=0.05, work=8.0))
    result = replayed(afternoon, only_with(Listens()))
    fact = told[5].vms["a"]
    assert (fact.bus_locks, fact.exits, fact.throttled) == (200, 200, 0)
    assert (fact.cpu, fact.run_delay, fact.work) == (pytest.approx(0.8), pytest.approx(0.1), pytest.approx(16))
    assert (result.before.victims_delay, result.after.victims_delay) == (pytest.approx(0.5), pytest.approx(1.0))


def test_intervals_in_which_nobody_did_anything_are_gone_through_as_well(afternoon):
    afternoon.second(vm("a", 1))
    afternoon.second()
    afternoon.second(vm("a", 1), vm("b", 2))
    afternoon.second()
    afternoon.close()
    with read_journal(afternoon.path) as journal:
        found = list(ticks(journal))
    assert [sorted(tick.vms) for tick in found] == [["a"], [], ["a", "b"], []]
    assert all(tick.host is not None and tick.host.time == tick.time for tick in found)


def test_two_fleets_of_one_moment_are_two_ticks(afternoon):
    afternoon.second(vm("a", 1))
    afternoon.close()
    again = Afternoon(afternoon.path)
    again.second(vm("a", 2), vm("b", 3))
    again.second(vm("a", 4))
    again.close()
    with read_journal(afternoon.path) as journal:
        found = list(ticks(journal))
        assert [(tick.session, {vm.name: vm.bus_locks for vm in tick.vms.values()}) for tick in found if tick.vms] == [
            (1, {"a": 1}),
            (2, {"a": 2, "b": 3}),
            (2, {"a": 4}),
        ]
        assert [[vm.name for vm in tick.new] for tick in found if tick.vms] == [["a"], ["a", "b"], []]
        assert [tick.time for tick in ticks(journal, BEGIN + 2 * SECOND) if tick.vms] == [BEGIN + 2 * SECOND]
        assert [tick.time for tick in ticks(journal, None, BEGIN + SECOND) if tick.vms] == [BEGIN + SECOND] * 2


def test_lines_are_drawn_from_some_of_many_intervals(afternoon, monkeypatch):
    lived(afternoon, 400, {"noisy": noisy, "quiet": lambda _: 3})
    every = replayed(afternoon, "").response.lines["run_delay"]
    monkeypatch.setattr("orchestra.replay.run.ENOUGH", 100)
    some = replayed(afternoon, "").response.lines["run_delay"]
    assert (every.points, some.points) == (800, 200)
    assert some.slope == pytest.approx(every.slope, rel=0.01)


# ---- what was wanted


def row(locks: int | None = 0, name: str = "a", **more: object) -> orc.VmFacts:
    return vm(name, locks, **more)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([row(100, throttled=0.5)], 200),  # it would have gone on like this
        ([row(100, vcpus=2, throttled=1.0)], 200),
        ([row(100, capped=0.75)], 400),
        ([row(5000), row(100, throttled=0.9)], 100 + 0.9 * 5000),  # it would have done as when it was free
        ([row(5000), row(3), row(3, throttled=0.5)], 6),  # it had calmed down before it was held
        ([row(5000, generation=1), row(100, generation=2, throttled=0.5)], 200),  # that was another
        ([row(10, throttled=1.0)], 10 + 0.99 * 1000),  # no more than a hundred times as much
        ([row(0, throttled=1.0)], 0),
        ([row(5000, throttled=0.02), row(100, throttled=0.9)], 100 + 0.9 * 5000 / 0.98),  # as good as free
    ],
)
def test_demand_is_what_was_seen_and_what_waited(rows, wanted):
    assert demand(rows).bus_locks == pytest.approx(wanted)


def demand(rows: list[orc.VmFacts], interval: float = 1.0) -> Want:
    demands = Demands()
    for n, one in enumerate(rows):
        held = demands.held(Tick(1, n, interval, {one.name: one}, None))
    return held["a"]


def test_intervals_may_be_of_any_length():
    assert demand([row(10_000), row(200, throttled=1.0)], 2.0).bus_locks == pytest.approx(200 + 0.5 * 2 * 5000)


def test_what_nothing_held_wanted_what_it_did():
    assert Demands().held(Tick(1, 0, 1.0, {"a": row(7)}, None)) == {}


def test_demand_for_what_was_not_seen_is_not_known():
    found = demand([row(None), row(None, throttled=0.5)])
    assert (found.bus_locks, found.exits) == (None, 200)


# ---- what is let through


def wants(**locks: float) -> dict[str, Want]:
    return {name: Want(row(0, name), n, n, 1.0) for name, n in locks.items()}


def through(force: Enforcement, seconds: int = 1, **locks: float) -> dict[str, float]:
    total = dict.fromkeys(locks, 0.0)
    for _ in range(seconds):
        passed = force.let_through(wants(**locks), 1.0)
        for name, count in locks.items():
            total[name] += count * passed.get(name, FREE).part
    return total


def free() -> Enforcement:
    return Enforcement()


def test_a_limit_lets_rate_and_burst_through():
    force = free()
    force.apply(orc.Throttle(vm="a", limit=orc.Limit(rate=10, burst=50)), "p")
    assert through(force, 20, a=100.0, b=100.0) == {"a": pytest.approx(50 + 20 * 10), "b": 2000}
    force.apply(orc.Throttle(vm="a", limit=orc.Limit(rate=5, burst=50)), "q")
    assert through(force, 10, a=100.0) == {"a": pytest.approx(50)}
    force.apply(orc.Unthrottle(vm="a"), "q")
    assert through(force, 10, a=100.0) == {"a": pytest.approx(100)}
    force.apply(orc.Unthrottle(vm="a"), "p")
    assert through(force, 1, a=100.0) == {"a": 100}


def test_tenants_and_host_take_from_all_in_proportion():
    limit = orc.Limit(rate=60, burst=1)
    force = Enforcement(limit, None, {"acme": orc.Tenant("acme", limit=orc.Limit(rate=80, burst=1))})
    through(force, 1, a=300.0, b=100.0)
    assert through(force, 10, a=300.0, b=100.0) == {"a": pytest.approx(450), "b": pytest.approx(150)}
    force.apply(orc.SetLimit(limit=None), "p")
    assert through(force, 10, a=300.0, b=100.0) == {
        "a": pytest.approx(600, rel=0.01),
        "b": pytest.approx(200, rel=0.01),
    }


def test_nothing_waits_for_longer_than_max_delay():
    force = free()
    force.apply(orc.Throttle(vm="a", limit=orc.Limit(rate=0.001, burst=1, max_delay=0.5)), "p")
    assert through(force, 100, a=100.0)["a"] == pytest.approx(200, abs=1)


def test_caps_pauses_and_the_end_hold_all_of_a_vm():
    force = free()
    busy = row(100, cpu=0.8, exits=0)

    def part() -> float:
        return force.let_through({"a": busy}, 1.0).get("a", FREE).part

    force.apply(orc.CapCpu(vm="a", share=0.9), "p")
    assert part() == 1  # it does not use as much
    force.apply(orc.CapCpu(vm="a", share=0.4), "q")
    passed = force.let_through({"a": busy}, 1.0)["a"]
    assert (passed.part, passed.capped) == (0.5, pytest.approx(0.4))
    force.apply(orc.CapCpu(vm="a", share=None), "q")
    assert part() == 1
    force.apply(orc.Isolate(vm="a"), "p")
    assert part() == 1  # how it fares there is not known
    force.apply(orc.SetMemory(vm="a", memory=4096), "p")
    force.apply(orc.SetMemory(vm="a", memory=None), "p")
    assert part() == 1
    force.apply(orc.Pause(vm="a"), "p")
    assert force.let_through({"a": busy}, 1.0)["a"].paused == 1
    assert part() == 0
    force.apply(orc.Resume(vm="a"), "q")
    assert part() == 1
    force.apply(orc.Evict(vm="a"), "p")
    assert part() == 0
    force.seen("a", 1)
    assert part() == 0
    force.seen("a", 2)  # another of its name
    assert part() == 1


def test_another_vm_of_that_name_starts_without_limits():
    force = free()
    force.seen("a", 1)
    force.apply(orc.Throttle(vm="a", limit=orc.Limit(rate=1)), "p")
    force.seen("a", 1)
    assert force.limit_of("a") == orc.Limit(rate=1)
    force.seen("a", 2)
    assert force.limit_of("a") is None


LIMITS = st.builds(
    orc.Limit,
    rate=st.floats(0.1, 1e4),
    burst=st.floats(1, 1e4),
    max_delay=st.none(),
)


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.floats(0, 1e6), min_size=1),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), LIMITS),
    st.none() | LIMITS,
    st.none() | LIMITS,
    st.integers(1, 30),
)
def test_no_bucket_ever_lets_more_through_than_burst_and_rate(demands, limits, tenant, host, seconds):
    force = Enforcement(host, None, {"acme": orc.Tenant("acme", limit=tenant)})
    for name, limit in limits.items():
        force.apply(orc.Throttle(vm=name, limit=limit), "p")
    total = dict.fromkeys(demands, 0.0)
    for _ in range(seconds):
        through = force.let_through(wants(**demands), 1.0)
        for name in demands:
            passed = through.get(name, FREE)
            assert 0 <= passed.part <= 1 + 1e-9
            assert passed.throttled + passed.capped + passed.paused <= 1 + 1e-9
            total[name] += demands[name] * passed.part
    for name, limit in limits.items():
        if name in total:
            assert total[name] <= (limit.tokens + limit.rate * seconds) * (1 + 1e-6)
    for limit in (tenant, host):
        if limit is not None:
            assert sum(total.values()) <= (limit.tokens + limit.rate * seconds) * (1 + 1e-6)
    if not limits and tenant is None and host is None:
        assert total == {name: pytest.approx(rate * seconds) for name, rate in demands.items()}


# ---- how victims answer


def seen(pairs: list[tuple[float, float]], **more: object) -> list[Tick]:
    """The other's locks, and what the victim waited for a CPU."""
    found = []
    for i, (locks, delay) in enumerate(pairs):
        rows = row(round(locks), "noisy"), row(0, "a", run_delay=delay, **more)
        found.append(Tick(1, i, 1.0, {one.name: one for one in rows}, None, rows if i == 0 else ()))
    return found


def test_a_line_is_found_where_there_is_one():
    response = fit(seen([(x, 0.1 + 1e-4 * x) for x in range(0, 5000, 100)]))
    line = response.lines["run_delay"]
    assert (line.slope, line.certainty, line.points) == (pytest.approx(1e-4), pytest.approx(1), 50)
    assert response.change("run_delay", -1000) == pytest.approx(-0.1)
    assert response.change("lock_ns", 1e6) == 0


@pytest.mark.parametrize(
    "ticks",
    [
        seen([(100, 0.1)] * 50),  # nothing changes
        seen([(x % 7, (x * x) % 11 / 11) for x in range(100)]),  # one has nothing to do with the other
        seen([(x, 1 - 1e-4 * x) for x in range(0, 5000, 100)]),  # locks of others do no good
        seen([(x, 1e-4 * x) for x in range(0, 1000, 100)]),  # too few
        seen([(x, 1e-4 * x) for x in range(0, 5000, 100)], throttled=0.5),  # a VM that is held is no victim
        seen([(x, None) for x in range(0, 5000, 100)]),  # type: ignore[list-item]  # not known
    ],
)
def test_no_line_is_made_up(ticks):
    assert fit(ticks).lines == {}


def test_jains_index():
    assert jain([1, 1, 1]) == 1
    assert jain([1, 0, 0, 0]) == 0.25
    assert jain([0, 0]) == 1


# ---- the command


@pytest.fixture
def rules(tmp_path: Path) -> str:
    path = tmp_path / "new.toml"
    path.write_text(LADDER)
    return str(path)


def test_the_table_has_both_worlds_side_by_side(afternoon, rules, capsys):
    lived(afternoon, 400, {"noisy": noisy, "quiet": lambda _: 3})
    afternoon.close()
    assert main(["replay", str(afternoon.path), "--policy", rules]) == 0
    out = capsys.readouterr().out
    for line in (
        r"400 s of journal|7 min of journal",
        r"as it was +replayed",
        r"actions +0 +3",
        r"  Throttle +0 +1",
        r"  of those asked for +100\.0% +1",
        r"Jain's index, of what was asked for +1\.000 +0\.6",
        r"noisy +7\d\dK +7\d\dK +",
        r"run_delay follows the others' bus locks: r² ",
    ):
        assert re.search(line, out), (line, out)


def test_a_journal_that_does_not_tell_how_victims_answer_says_so(afternoon, rules, capsys):
    for _ in range(30):
        afternoon.second(vm("a", 1, cpu=0.1, run_delay=0.1))
    afternoon.close()
    assert main(["replay", str(afternoon.path), "--policy", rules]) == 0
    assert "depends on bus locks: replayed, it is as it was." in capsys.readouterr().out


def test_json_and_plot(afternoon, rules, tmp_path, capsys):
    lived(afternoon, 400, {"noisy": noisy, "quiet": lambda _: 3})
    afternoon.close()
    plot = tmp_path / "replay.svg"
    assert main(["replay", str(afternoon.path), "--policy", rules, "--json", "--plot", str(plot)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["as_it_was"]["actions"] == {}
    assert [deed["kind"] for deed in told["actions"]] == ["Warn", "Throttle", "Unthrottle"]
    assert told["actions"][1]["limit"]["rate"] == 500
    assert told["replayed"]["touched"] == ["noisy"]
    assert 100 < len(told["replayed"]["series"]) <= 240
    assert {"axes_1", "axes_2", "axes_3"} <= {one.get("id") for one in ElementTree.parse(plot).iter()}


def test_since_and_until_are_times_as_people_write_them(afternoon, rules, capsys):
    lived(afternoon, 400, {"noisy": noisy})
    afternoon.close()
    until = datetime.fromtimestamp(BEGIN / SECOND + 90).isoformat()
    assert main(["replay", str(afternoon.path), "--policy", rules, "--until", until, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == 90


def test_what_cant_be_is_told_before_the_journal_is_read(afternoon, tmp_path, capsys):
    bad = tmp_path / "bad.toml"
    bad.write_text("limt = 3\n[[policies]]\nkind = 'laddr'")
    afternoon.close()
    assert main(["replay", str(afternoon.path), "--policy", str(bad)]) == 1
    err = capsys.readouterr().err
    assert f"{bad}:1: limt: no such key" in err
    assert f"{bad}:3: policies[0].kind" in err
    assert main(["replay", str(afternoon.path), "--policy", str(tmp_path / "none")]) == 1


def test_a_policy_that_raised_is_told_and_the_exit_status_says_so(afternoon, rules, capsys, monkeypatch):
    lived(afternoon, 10, {"noisy": lambda _: 5000})
    afternoon.close()
    monkeypatch.setattr(orc.Ladder, "decide", lambda self, facts: 1 / 0)
    assert main(["replay", str(afternoon.path), "--policy", rules]) == 1
    assert "Policy ladder raised and was switched off: ZeroDivisionError" in capsys.readouterr().out
