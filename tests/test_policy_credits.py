"""BurstCredits: earn, spend, fall back to the baseline; the buckets are the core's own."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from closed_loop import SECOND, Guest, World, during, steady, worst_window
from orchestra.model.actions import Throttle
from orchestra.model.errors import SpecError
from orchestra.model.spec import Limit, Meter
from orchestra.policy import BurstCredits, Facts, Policy, VmFacts


def facts(
    time: float, *vms: tuple[str, int], generation: int = 1, throttled: float = 0.0, interval: float = 0.1
) -> Facts:
    told = {name: VmFacts(name, "default", 1.0, 1, used, used, throttled, generation) for name, used in vms}
    return Facts(round(time * SECOND), interval, None, None, {}, told)


def test_it_is_a_policy():
    assert isinstance(BurstCredits(10, 100), Policy)
    assert (BurstCredits(10, 100).interval, BurstCredits(10, 100).meter) == (0.1, Meter.BUS_LOCKS)


def test_a_vm_bursts_until_its_credits_are_used_up_and_is_then_held_to_the_baseline():
    world = World(BurstCredits(50, 500), [Guest("a", steady(1000))]).run(3)
    # 500 credits and 50/s earned, spent at 1000/s: gone after 500 / 950 = 0.53 s
    assert sum(world.guests["a"].seen[:5]) == pytest.approx(500, abs=5)
    assert world.rate("a", 2) == pytest.approx(50, rel=0.03)


def test_one_that_stays_below_the_baseline_is_never_held():
    world = World(BurstCredits(50, 500), [Guest("a", steady(49))]).run(5)
    assert world.rate("a", 4) == pytest.approx(49, rel=0.02)
    assert world.guests["a"].longest == 0


def test_what_it_leaves_is_saved_for_later():
    policy = BurstCredits(100, 1000, launch=0)
    world = World(policy, [Guest("a", during(1000, (0, 1), (6, 8)))]).run(6)
    assert policy.balance("a", world.now) == pytest.approx(500, abs=15)  # 5 s at 100/s
    world.run(1)
    # 500 saved and 100 earned meanwhile
    assert world.rate("a", 1) == pytest.approx(600, abs=20)


def test_launch_credits_are_what_it_starts_with():
    few = World(BurstCredits(50, 1000, launch=100), [Guest("a", steady(1000))]).run(2)
    # in its first tick nothing is known of it: that comes off its credits
    assert sum(few.guests["a"].seen) == pytest.approx(100 + 2 * 50, abs=10)


def test_the_balance_never_leaves_its_bounds_and_is_in_the_evidence():
    policy = BurstCredits(10, 100)
    (opened,) = policy.decide(facts(0.1, ("a", 0)))
    assert opened.evidence["balance"] == policy.balance("a") == 100
    policy.decide(facts(0.2, ("a", 5000)))
    assert policy.balance("a") == 0
    assert policy.balance("a", 5 * SECOND) == pytest.approx(48)
    assert policy.balance("a", 1000 * SECOND) == 100
    assert policy.balances == {"a": 0}
    assert policy.balance("stranger") == 100


def test_running_out_and_recovering_are_told_once_each():
    world = World(BurstCredits(50, 100), [Guest("a", during(500, (0, 2), (4, 5)))]).run(6)
    said = [(time, action.reason) for time, action in world.actions[2:]]
    assert [reason for _, reason in said] == [
        "burst credits used up: held to the baseline of 50/s",
        "burst credits earned back",
        "burst credits used up: held to the baseline of 50/s",
    ]


def test_telling_changes_no_limit():
    world = World(BurstCredits(50, 100), [Guest("a", steady(500))]).run(2)
    assert {action.limit for action in world.taken(Throttle)[1:]} == {Limit(rate=50, burst=100)}


def test_launching_anew_under_the_same_name_earns_nothing():
    policy = BurstCredits(10, 1000)
    policy.decide(facts(0.1, ("a", 900)))
    first, then = policy.decide(facts(0.2, ("a", 50), generation=2))
    assert policy.balance("a") == pytest.approx(1000 - 900 + 1 - 50 + 1, abs=1.1)
    assert first.limit.burst == policy.balance("a")
    assert then.limit.burst == 1000


def test_where_nothing_is_counted_there_are_no_accounts():
    policy = BurstCredits(10, 100)
    unknown = VmFacts("a", "default", 1.0, 1, None, 7, 0.0)
    assert policy.decide(Facts(SECOND, 0.1, None, None, {}, {"a": unknown})) == []
    (action,) = BurstCredits(10, 100, meter="exits").decide(Facts(SECOND, 0.1, None, None, {}, {"a": unknown}))[-1:]
    assert action.meter is Meter.EXITS


def test_a_limit_that_was_refused_is_asked_for_again_with_the_balance_of_then():
    policy = BurstCredits(10, 100)
    (opened,) = policy.decide(facts(1, ("a", 0)))
    assert opened.limit.tokens == 100
    policy.refused(opened, "too many")
    assert policy.decide(facts(1.1, ("a", 60))) == []
    first, second = policy.decide(facts(2, ("a", 0)))
    assert (round(first.limit.tokens), second.limit.tokens) == (50, 100)
    policy.refused(first, "too many")
    policy.refused(second, "too many")  # in one tick: one wait
    assert policy.decide(facts(3.9, ("a", 0))) == []
    assert len(policy.decide(facts(4, ("a", 0)))) == 2
    assert policy.decide(facts(5, ("a", 0))) == []


def test_an_account_of_one_that_is_gone_is_closed_when_it_has_earned_back_what_it_spent():
    policy = BurstCredits(10, 1000)
    policy.decide(facts(0.1, ("a", 500), ("b", 0)))
    policy.decide(attrs.evolve(facts(0.2), gone=(("a", 1), ("b", 1), ("never-seen", 1))))
    assert list(policy.balances) == ["a"]
    first, *_ = policy.decide(facts(10, ("a", 10), generation=2))
    assert first.limit.burst == pytest.approx(1000 - 500 + 10 * 10 - 10, abs=1.1)  # launching anew earns nothing
    policy.decide(attrs.evolve(facts(11), gone=(("a", 1),)))  # of old; there is another now
    policy.decide(attrs.evolve(facts(12), gone=(("a", 2),)))
    policy.decide(facts(50))
    assert list(policy.balances) == ["a"]
    policy.decide(facts(52))
    assert (policy.balances, policy._closing, len(policy._opened)) == ({}, [], 0)


@pytest.mark.parametrize(
    ("baseline", "most", "more", "named"),
    [
        (0, 100, {}, "rate=0"),
        (10, 1, {}, "most=1"),
        (10, 100, {"launch": 101}, "launch=101"),
        (10, 100, {"interval": 0}, "interval=0"),
        (10, 100, {"meter": "cpu"}, "meter"),
    ],
)
def test_bad_parameters_are_named(baseline, most, more, named):
    with pytest.raises(SpecError, match=named):
        BurstCredits(baseline, most, **more)


PATTERN = st.lists(st.tuples(st.sampled_from([0.0, 20.0, 200.0, 1500.0]), st.integers(1, 8)), min_size=1, max_size=8)


@settings(max_examples=40)
@given(PATTERN, st.floats(5, 100), st.floats(10, 300), st.floats(0, 1), st.integers(1, 3))
def test_in_no_window_does_it_do_more_than_its_credits_and_the_baseline(pattern, baseline, most, launch, vcpus):
    """Whatever it tries, and however it times it: one burst and the baseline."""
    ticks = [rate for rate, length in pattern for _ in range(length)]

    def rate(now: float, seen: list[int]) -> float:
        return ticks[int(now * 10 + 1e-6) % len(ticks)]

    policy = BurstCredits(baseline, most, launch=most * launch)
    world = World(policy, [Guest("a", rate, vcpus=vcpus)]).run(6)
    guest = world.guests["a"]
    # From when it was found. With n vCPUs the last token may be taken by n at once: what waits is the vCPU.
    found = next((time for time, _ in world.actions), 0.0) * SECOND
    assert worst_window([time for time in guest.times if time >= found], baseline) <= most + vcpus + 1
    assert 0 <= policy.balance("a") <= most


@settings(max_examples=25)
@given(st.integers(1, 10), st.integers(1, 30))
def test_one_that_learns_when_it_is_held_gains_nothing(rest, patience):
    """It stops as soon as it gets less than it tried, waits for some ticks, and comes back with all it has."""

    def evade(now: float, seen: list[int]) -> float:
        if any(0 < n < 80 for n in seen[-rest:]):
            return 0.0
        return 1000.0 if len(seen) % (patience + 1) else 0.0

    world = World(BurstCredits(40, 200), [Guest("a", evade)]).run(12)
    found = world.actions[0][0] * SECOND
    assert worst_window([time for time in world.guests["a"].times if time >= found], 40) <= 202
