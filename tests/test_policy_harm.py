"""What is usual is what is good: harm never becomes usual, and what changed for good does, in a stated time."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Callable

import attrs
import pytest
from hypothesis import example, given, settings, strategies as st

from closed_loop import Guest, World, steady
from flows import TICK, Fluid, cliff, facts, slowness
from orchestra.model.spec import Limit
from orchestra.policy import Adaptive, Condition, HostFacts, Ladder, Step, VmFacts
from orchestra.policy.harm import GOOD, QUIET, Signals
from orchestra.policy.ladder import Rung

OVER = 1.5
HELD = QUIET / 2 + 2
"""Seconds at the floor after which a change for good is known: half of those that count, and what rounding takes."""

VICTIM = VmFacts("victim", "default", 1.0, 1, 0, 50, 0.0, 1, cpu=0.5, run_delay=0.0)


def slowed(interval: float = TICK, **more: object) -> Adaptive:
    return Adaptive({"lock_slowdown": OVER}, interval=interval, **more)  # type: ignore[arg-type]  # passed through


def hosts(policy: Adaptive, wants: list[float], slow: Callable[[float, float], float]) -> Fluid:
    return Fluid(policy, wants, slow, slowness, OVER)


def back(start: float, floor: float = 10.0) -> float:
    """Seconds until all are free after a change for good: down to the floor, there, and up again, with the defaults."""
    halvings = math.log2(max(start, floor) / floor) + 1
    return 2 * TICK * halvings + HELD + 5 + halvings


# ---- harm that lasts, or grows --------------------------------------------------------------------------------------


@settings(max_examples=3)
@given(st.floats(1.3, 10), st.booleans(), st.lists(st.floats(1e3, 1e6), min_size=1, max_size=2))
@example(1.3, True, [1e5])
@example(10.0, False, [1e5])
def test_a_steady_offender_is_still_held_after_an_hour(times, linear, wants):
    """`times`: by how much the harm that they do when they are free is over the threshold."""
    policy = slowed(interval=1.0)
    worst, total = OVER * times, sum(wants)
    capacity = total * (OVER - 1) / (worst - 1)
    cliffed = cliff(capacity, 0, math.inf, 1.0, worst)
    world = hosts(policy, [0.0] * len(wants), (lambda _, did: 1 + (worst - 1) * did / total) if linear else cliffed)
    world.run(10)
    assert world.limits == {}
    world.wants = dict(enumerate(wants))
    world.run(3600)
    # Looking once a second, it doubles what they may in a look: so they may be free for one, and are found at once.
    held = world.held[10:]
    assert all(before or now for before, now in itertools.pairwise(held))
    assert sum(held) > 0.9 * 3600
    assert sum(world.totals[-600:]) / 600 <= 1.1 * capacity
    assert sum(world.hurt[-600:]) < (60 if linear else 200)


@pytest.mark.parametrize("percent", [0.3, 1, 5])
def test_slow_growth_is_found_when_it_passes_the_threshold(percent):
    """A minute. It is there from the start, and the host is never seen without it."""
    policy = slowed(interval=5.0)
    world = hosts(policy, [1000.0], lambda _, did: 1 + did / 10_000)
    while not world.held or not world.held[-1]:
        world.wants[0] *= (1 + percent / 100) ** (5 / 60)
        world.tick()
        assert world.now < 24 * 3600
    found = world.harm(0, world.totals[-1])
    assert OVER < found / 1.1 <= OVER * (1 + percent / 100)


@settings(max_examples=10)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(1.6, 20), st.booleans())
@example(3, 1, 3.0, True)
def test_no_rhythm_makes_harm_usual(loud, still, times, late):
    """`late`: what the host tells is of the tick before."""
    signals = Signals(["lock_slowdown"])
    for n in range(50):
        signals.look(facts(n * TICK, host=slowness(1.0)))
    before = 1.0
    for n in range(50, 2000):
        on = n % (loud + still) < loud
        harm = times if on else 1.0
        vm = attrs.evolve(VICTIM, bus_locks=1000 if on else 0)
        signals.look(facts(n * TICK, vm, host=slowness(before if late else harm)))
        before = harm
    signals.look(facts(200, attrs.evolve(VICTIM, bus_locks=1000), host=slowness(times)))
    assert signals.host("lock_slowdown") == pytest.approx(times)


def test_a_second_of_work_with_a_noisy_moment_excuses_nobody():
    signals = Signals(["work_drop"])
    for n in range(2000):
        noisy = attrs.evolve(VICTIM, name="noisy", bus_locks=1000 if n > 100 and n % 10 < 3 else 0)
        signals.look(facts(n * TICK, noisy, attrs.evolve(VICTIM, work=100.0 if n < 100 else 50.0)))
    assert signals.victims("work_drop") == {"victim": 0.5}


def test_a_ladder_gets_to_a_step_that_asks_for_an_hour_of_harm():
    steps = [
        Step(rung="throttle", when=Condition("lock_slowdown", OVER), limit=Limit(rate=400)),
        Step(rung="isolate", when=Condition("lock_slowdown", OVER), dwell=3600),
    ]
    ladder = Ladder(steps, interval=1.0)
    for n in range(3700):
        noisy = attrs.evolve(VICTIM, name="noisy", bus_locks=0 if n < 10 else 400)
        ladder.decide(facts(n, noisy, host=slowness(1.0 if n < 10 else 2.0), interval=1.0))
    assert ladder.rung("noisy") is Rung.ISOLATE


# ---- no harm --------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(st.lists(st.floats(0.9, 1.1), min_size=1, max_size=30), st.integers(0, 1 << 30))
def test_ten_percent_of_noise_on_a_host_in_health_leads_to_nothing(pattern, seed):
    """First in any pattern, then at random."""
    policy = Adaptive({"lock_slowdown": 1.25, "memory_slowdown": 1.25, "work_drop": 0.2})
    draw = random.Random(seed)
    for n in range(2000):
        a, b, c = (pattern[(n + i) % len(pattern)] if n < 1000 else draw.uniform(0.9, 1.1) for i in range(3))
        noisy = attrs.evolve(VICTIM, name="noisy", bus_locks=1000)
        host = HostFacts(lock_ns=20 * a, memory_ns=90 * b)
        assert policy.decide(facts(n * TICK, noisy, attrs.evolve(VICTIM, work=100 * c), host=host)) == []


def working(policy: Adaptive, load: Callable[[float], float], told: bool, seconds: float) -> tuple[list[bool], float]:
    """A guest with a load (from 0 to 1) beside one that locks and harms nobody: when that is held, and for how long."""
    interval = policy.interval or TICK
    world = Fluid(policy, [1000.0], lambda now, total: 0.0)
    for n in range(round(seconds / interval)):
        busy = load(n * interval)
        cpu = 0.8 * busy * interval if told else None
        delay = 0.0 if told else None
        world.tick(attrs.evolve(VICTIM, cpu=cpu, run_delay=delay, work=500 * busy * interval))
    return world.held, sum(world.held) * interval


def day(now: float) -> float:
    """Of twelve hours."""
    return 0.55 + 0.45 * math.cos(2 * math.pi * now / 43200)


def at_rest_at_times(now: float) -> float:
    return 0.0 if now % 700 < 300 else 1.0


@pytest.mark.parametrize("load", [day, at_rest_at_times])
def test_less_to_do_is_no_harm_where_cpu_times_are_told(load):
    held, _ = working(Adaptive({"work_drop": 0.3}, interval=10.0), load, True, 43200)
    assert not any(held)


def test_where_they_are_not_each_fall_by_the_threshold_counts_as_a_change_for_good():
    held, seconds = working(Adaptive({"work_drop": 0.3}, interval=1.0), day, False, 21600)
    falls = math.ceil(math.log(0.1) / math.log(1 - 0.3))
    affairs = sum(now and not before for before, now in zip([False, *held], held, strict=False))
    assert affairs <= falls
    assert seconds <= affairs * (back(1000) + 20)  # its ticks are ten times longer


# ---- what changed for good ------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.floats(1.6, 20), st.lists(st.floats(0, 1e6), min_size=1, max_size=3), st.booleans())
@example(2.0, [1e6], False)
def test_a_host_that_is_slow_for_good_costs_the_noisy_half_a_minute(times, wants, started):
    policy = slowed()
    world = hosts(policy, wants if started else [0.0] * len(wants), lambda now, _: 1.0 if now < 20.05 else times)
    world.run(20)
    world.wants = dict(enumerate(wants))
    world.run(back(sum(wants)))
    assert world.limits == {}
    world.run(60)
    assert not any(world.held[-600:])


def test_a_host_that_is_somewhat_slower_for_good_lets_them_go_too():
    """By less than the threshold, in the midst of an affair: they are not at the floor, so nothing is learned."""
    world = hosts(slowed(), [1e5], lambda now, did: 1.4 if now > 20 else 2.0 if now > 5 and did > 6e4 else 1.0)
    world.run(20)
    start, hurt = 1e5, world.policy._hurt  # type: ignore[attr-defined]  # an Adaptive
    assert world.limits
    world.run(10 * (5 + math.log2(start / hurt)) + 1)
    assert world.limits == {}


def test_it_comes_back_to_what_is_better_at_once():
    """A change that was not for good: harm that comes after it is measured by what was good before."""
    signals = Signals(["lock_slowdown"])
    quiet = [1.0] * 50 + [3.0] * round(10 * QUIET)
    for n, slow in enumerate(quiet):
        signals.look(facts(n * TICK, host=slowness(slow)))
    assert signals.host("lock_slowdown") == pytest.approx(1.0)  # three times as slow is usual
    for n in range(round(10 * GOOD / 2) + 2):
        signals.look(facts((len(quiet) + n) * TICK, host=slowness(1.0)))
    signals.look(facts(1000, attrs.evolve(VICTIM, bus_locks=1000), host=slowness(2.0)))
    assert signals.host("lock_slowdown") == pytest.approx(2.0)


def test_in_a_closed_loop_with_the_cores_buckets():
    ticks: list[float] = []

    def host(total: float) -> HostFacts:
        ticks.append(total)
        return slowness((1.0 if len(ticks) < 100 else 2.0) * (1 + total / 1000))

    world = World(slowed(), [Guest("a", steady(300)), Guest("b", steady(100)), Guest("c", steady(5))], host=host)
    world.run(9.9)
    assert world.actions == []
    world.run(back(400) + 1)
    assert world.guests["a"].budget.limit is None
    assert world.guests["c"].longest == 0
    world.run(10)
    assert world.rate("a", 5) == pytest.approx(300, rel=0.05)


# ---- what it does not see -------------------------------------------------------------------------------------------


def test_a_start_in_the_midst_of_harm_is_seen_after_the_first_pause():
    policy = slowed()
    world = hosts(policy, [1e5], lambda _, did: 3.0 if did > 5e4 else 1.0)
    world.run(60)
    assert not any(world.held)
    world.wants[0] = 0.0
    world.run(GOOD / 2 + 1)
    world.wants[0] = 1e5
    world.run(1)
    assert world.limits


def test_what_is_remembered_stays_bounded():
    def size(hours: int, churn: int) -> int:
        signals = Signals(["lock_slowdown", "memory_slowdown", "work_drop"])
        draw = random.Random(1)
        for n in range(hours * 360):
            vms = [
                attrs.evolve(VICTIM, name=f"v{i}", generation=n // churn, cpu=10.0, work=draw.uniform(50, 100))
                for i in range(3)
            ]
            host = HostFacts(lock_ns=draw.uniform(10, 30), memory_ns=draw.uniform(50, 100))
            signals.look(facts(10.0 * n, *vms, host=host, interval=10.0))
        return len(pickle.dumps(signals))

    assert size(8, 10**9) <= 1.05 * size(1, 10**9)
    assert size(6, 36) <= 1.3 * size(2, 36)  # others under the same names every six minutes
