"""A guest that learns the window and evades gains nothing over its fair share beyond one burst.

Under WeightedShare and BusTime; what it gains under BurstCredits, Adaptive and Ladder is in their own tests.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings, strategies as st

from closed_loop import Guest, World, steady
from orchestra.model.spec import Limit
from orchestra.policy import BusTime, WeightedShare

# A long max_delay: each vCPU has an event that often whatever it had before, and eight of them are more
# than a small share.
HOST = Limit(rate=500, burst=50, max_delay=20.0)
BURST = HOST.tokens + HOST.rate * 0.1  # what the host's bucket gives in the tick in which nothing is known of it
SECONDS = 10


def had(rate: Callable[[float, list[int]], float], vcpus: int, weight: float, **more: object) -> float:
    """Events that the evader had beside a greedy neighbour of weight 9."""
    policy = WeightedShare(**more)  # type: ignore[arg-type]  # passed through
    guests = [Guest("evader", rate, vcpus=vcpus, weight=weight), Guest("other", steady(2000), weight=9.0)]
    world = World(policy, guests, limit=HOST).run(SECONDS)
    assert sum(world.guests["other"].seen) >= (HOST.rate * SECONDS - fair(weight)) * 0.95 - BURST
    return sum(world.guests["evader"].seen)


def fair(weight: float) -> float:
    return HOST.rate * weight / (weight + 9) * SECONDS


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(1, 30), st.sampled_from([1, 8]), st.sampled_from([0.1, 1.0, 9.0]))
@example(1, 4, 8, 0.1)
@example(1, 8, 8, 1.0)
def test_a_rhythm_gains_nothing(loud, quiet, vcpus, weight):
    def rate(now: float, seen: list[int]) -> float:
        return 2000.0 if len(seen) % (loud + quiet) < loud else 0.0

    assert had(rate, vcpus, weight) <= fair(weight) * 1.05 + BURST + vcpus


@settings(max_examples=15)
@given(st.integers(1, 12), st.floats(0.1, 0.9), st.sampled_from([1, 8]))
def test_one_that_hides_when_it_is_held_gains_nothing(rest, least, vcpus):
    """It has learnt what it gets while it is free. As soon as it gets less, it rests for some ticks."""

    def rate(now: float, seen: list[int]) -> float:
        best = max(seen, default=0)
        hidden = next((n for n, events in enumerate(reversed(seen)) if 0 < events < least * best), None)
        return 0.0 if hidden is not None and hidden < rest else 2000.0

    assert had(rate, vcpus, 0.5) <= fair(0.5) * 1.05 + BURST + vcpus


def test_one_that_keeps_a_foot_in_the_door_gains_nothing():
    """It never rests altogether: a little all the time, so that it counts as modest, and a storm now and then."""

    def rate(now: float, seen: list[int]) -> float:
        return 2000.0 if len(seen) % 8 == 0 else 11.0

    assert had(rate, 8, 0.1) <= fair(0.1) * 1.05 + BURST + 8


def test_an_honest_one_is_back_at_once_after_a_rest():
    """What it keeps is a limit at its share, for no longer than it rested less than it had taken."""
    guests = [
        Guest("a", lambda now, seen: 2000.0 if now < 2 or now >= 4 else 0.0),
        Guest("b", steady(2000)),
    ]
    world = World(WeightedShare(), guests, limit=HOST).run(4)
    assert world.guests["a"].budget.limit is None
    world.run(2)
    assert world.rate("a", 1) == pytest.approx(250, rel=0.05)


def test_a_bus_budget_is_shared_with_an_evader_in_the_same_way():
    def rate(now: float, seen: list[int]) -> float:
        return 2000.0 if len(seen) % 7 == 0 else 0.0

    policy = BusTime(HOST.rate * 7000 / 2e9, max_delay=20.0)
    guests = [Guest("evader", rate, vcpus=8, weight=0.1), Guest("other", steady(2000), weight=9.0)]
    world = World(policy, guests).run(SECONDS)
    first = 800 * 0.1 * 20  # before the host's limit is set, in the very first tick
    assert sum(world.guests["evader"].seen[1:]) <= fair(0.1) * 1.05 + BURST + 8 < first
