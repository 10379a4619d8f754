"""The simulator's fluid limits against the C core's buckets, lock by lock, and QEMU's window against its own code."""

from __future__ import annotations

import heapq
import math
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import closed_loop
from orchestra.model.actions import SetLimit
from orchestra.model.spec import Limit, Tenant
from orchestra.policy import StaticLimits
from orchestra.simulate import QemuWindow, Scenario
from orchestra.simulate.behaviours import Steady
from orchestra.simulate.buckets import Windows, shared_waits
from orchestra.simulate.cpus import LimitSpec
from orchestra.simulate.layout import Layout
from orchestra.simulate.scenario import Hosts, Tenants, Vms
from orchestra.simulate.world import World


@attrs.frozen
class Guest:
    rate: float  # of each vCPU
    vcpus: int = 1
    tenant: str = "a"
    limit: Limit | None = None


def spec(limit: Limit | None) -> LimitSpec | None:
    return None if limit is None else LimitSpec(rate=limit.rate, burst=limit.burst, max_delay=limit.max_delay)


def scenario(
    guests: Sequence[Guest],
    host: Limit | None = None,
    tenants: Sequence[Tenant] = (),
    seconds: float = 10.0,
    tick: float = 1.0,
) -> Scenario:
    return Scenario(
        duration=seconds,
        tick=tick,
        hosts=(Hosts(count=1, limit=spec(host)),),
        tenants=tuple(Tenants(name=one.name, limit=spec(one.limit)) for one in tenants),
        vms=tuple(
            Vms(
                name=f"g{i}",
                count=1,
                vcpus=guest.vcpus,
                tenant=guest.tenant,
                limit=spec(guest.limit),
                behaviour=Steady(rate=guest.rate * guest.vcpus),
            )
            for i, guest in enumerate(guests)
        ),
    )


class Even:
    """A crowd without chance, as the core's guests in the closed loop have none."""

    def __init__(self, count: float) -> None:
        self._count = count

    def wants(self, now: float, tick: float, felt: Any) -> tuple[Any, Any]:
        count = self._count * tick
        return (np.array([0]), np.array([count])) if count else (np.empty(0, np.int64), np.empty(0))


def even(asked: Scenario, *factories: Any, window: QemuWindow | None = None) -> World:
    world = World(Layout(asked, 1), 1, factories, window)
    world._crowds = [Even(vms.behaviour.rate) for vms in asked.vms]
    return world


def uneven(rate: float, chance: random.Random) -> Callable[[float, list[int]], float]:
    """The times between two locks are a fifth off the mean, at most."""
    return lambda now, seen: rate / chance.uniform(0.8, 1.2)


def exact(
    guests: Sequence[Guest],
    host: Limit | None,
    tenants: Sequence[Tenant],
    seconds: float,
    locking: Callable[[float], Callable[[float, list[int]], float]] = closed_loop.steady,
) -> list[int]:
    """Locks that the same guests make under the core's own buckets."""
    played = [
        closed_loop.Guest(f"g{i}-0", locking(guest.rate), tenant=guest.tenant, vcpus=guest.vcpus, own=guest.limit)
        for i, guest in enumerate(guests)
    ]
    world = closed_loop.World(StaticLimits(), played, tenants=tenants, limit=host)
    world.run(seconds)
    return [sum(guest.seen) for guest in played]


def compare(
    guests: Sequence[Guest],
    host: Limit | None = None,
    tenants: Sequence[Tenant] = (),
    seconds: float = 10.0,
    tick: float = 1.0,
    off: float = 0.02,
) -> World:
    """Locks made in all, as the core lets them through and as the fluid does, are alike for each guest."""
    asked = scenario(guests, host, tenants, seconds, tick)
    world = even(asked)
    for _ in range(asked.ticks):
        world.step()
    done = exact(guests, host, tenants, seconds)
    for i, guest in enumerate(guests):
        # Events are whole, and each vCPU begins with one.
        assert world.locks[i] == pytest.approx(done[i], rel=off, abs=1.5 + 2 * guest.vcpus), (i, guest)
    return world


@pytest.mark.parametrize("tick", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("limit", [Limit(rate=50), Limit(rate=50, burst=200), Limit(rate=500), Limit(rate=7, burst=1)])
def test_one_guest_gets_through_a_limit_what_the_core_lets_through(limit, tick):
    compare([Guest(rate=200, limit=limit)], tick=tick)


def test_a_guest_with_several_vcpus_does_too():
    compare([Guest(rate=100, vcpus=4, limit=Limit(rate=90, burst=10))])


def test_who_shares_the_hosts_bucket_waits_alike():
    compare([Guest(rate=300), Guest(rate=40), Guest(rate=40, vcpus=3)], host=Limit(rate=150, burst=10), off=0.06)


def test_who_asks_for_little_is_hardly_slowed_by_a_shared_bucket():
    world = compare([Guest(rate=400), Guest(rate=5)], host=Limit(rate=100, burst=5))
    assert world.locks[1] > 45  # of 50: it waits, but not for long


def test_a_bucket_of_one_gains_nothing_while_its_only_guest_thinks():
    world = compare([Guest(rate=5, limit=Limit(rate=5, burst=1))])
    assert world.locks[0] == pytest.approx(25)  # not 50
    compare([Guest(rate=100, limit=Limit(rate=10))])
    compare([Guest(rate=5, limit=Limit(rate=5, burst=1.5))])
    compare([Guest(rate=5)], host=Limit(rate=5, burst=1))


def test_buckets_stack_and_a_vcpu_waits_for_the_slowest():
    guests = [
        Guest(rate=300, tenant="a", limit=Limit(rate=60)),
        Guest(rate=300, tenant="a"),
        Guest(rate=300, tenant="b"),
        Guest(rate=20, tenant="b"),
    ]
    compare(guests, host=Limit(rate=200, burst=20), tenants=[Tenant("a", limit=Limit(rate=90)), Tenant("b")])


def test_nobody_waits_longer_than_max_delay_and_releases_are_counted():
    limit = Limit(rate=0.5, burst=1, max_delay=0.25)
    world = compare([Guest(rate=100, limit=limit)], seconds=20, off=0.05)
    assert world.locks[0] == pytest.approx(20 / 0.26, rel=0.05)
    assert world.released == pytest.approx(world.locks[0] - 20 * 0.5 - 1, rel=0.02)


limits = st.builds(Limit, rate=st.floats(5, 300), burst=st.floats(2, 40), max_delay=st.sampled_from([None, 10.0, 1.0]))
guests = st.builds(
    Guest,
    rate=st.floats(5, 200),
    vcpus=st.integers(1, 3),
    tenant=st.sampled_from("ab"),
    limit=st.none() | limits,
)


def let_through(limit: Limit | None, members: Sequence[Guest], wanted: float, seconds: float) -> float:
    """The most of `wanted` that a bucket lets through, with what `max_delay` lets go beyond it."""
    if limit is None:
        return wanted
    released = 0.0 if limit.max_delay is None else sum(guest.vcpus for guest in members) * seconds / limit.max_delay
    return min(wanted, limit.tokens + limit.rate * seconds + released)


def bounds(several: Sequence[Guest], host: Limit | None, of_a: Limit | None, seconds: float) -> tuple[float, float]:
    """What all guests do together at least and at most, in whatever order they come: the asymptotic bounds of a closed
    network (Lazowska et al., Quantitative System Performance, chapter 5). A vCPU waits at worst for one token of each
    vCPU under its bucket; at best it never waits, as long as there are tokens."""

    def longest(limit: Limit | None, members: Sequence[Guest]) -> float:
        if limit is None:
            return 0.0
        queue = sum(guest.vcpus for guest in members) / limit.rate
        return queue if limit.max_delay is None else min(queue, limit.max_delay)

    of = {tenant: [guest for guest in several if guest.tenant == tenant] for tenant in "ab"}
    limits = {"a": of_a, "b": None}
    low = high = 0.0
    for tenant, members in of.items():
        free = 0.0
        for guest in members:
            wait = max(longest(guest.limit, [guest]), longest(limits[tenant], members), longest(host, several))
            low += guest.vcpus * seconds / (1 / guest.rate + wait)
            free += let_through(guest.limit, [guest], guest.rate * guest.vcpus * seconds, seconds)
        high += let_through(limits[tenant], members, free, seconds)
    return low, let_through(host, several, high, seconds)


# The same hosts each time. Once in some thousand hosts, a guest that makes some twenty locks while three share a burst
# is 31 % off in a fluid (27 for 21). ORCHESTRA_HOSTS=n looks at n other hosts.
@settings(max_examples=int(os.environ.get("ORCHESTRA_HOSTS", "25")), derandomize="ORCHESTRA_HOSTS" not in os.environ)
@given(st.lists(guests, min_size=1, max_size=4), st.none() | limits, st.none() | limits)
@example([Guest(5.0), Guest(5.0), Guest(6.0)], None, Limit(rate=16.0, burst=2.0, max_delay=None))
@example([Guest(6.0), Guest(17.0)], None, Limit(rate=6.0, burst=2.0, max_delay=None))
def test_any_small_host_fares_as_under_the_core(several, host, of_a):
    """Guests that lock like a clock get into step with each other under a bucket that few share: one of them finds it
    empty at each of its turns, and another never does. A fluid knows of no such order, and no real guest keeps to one:
    so here the guests' times vary. What chance does beyond that is not the fluid's either: where a bucket has just what
    its guests ask for and hardly any burst, tokens overflow while they think. How much, the bounds of what they can do
    in any order say. Else what they do together is hardly off."""
    tenants = [Tenant("a", limit=of_a), Tenant("b")]
    world = even(scenario(several, host, tenants))
    for _ in range(10):
        world.step()
    chance = random.Random(1)
    done = exact(several, host, tenants, 10.0, lambda rate: uneven(rate, chance))
    low, high = bounds(several, host, of_a, 10.0)
    vcpus = sum(guest.vcpus for guest in several)
    for together in (world.locks.sum(), sum(done)):
        assert 0.97 * low - 2 * vcpus <= together <= 1.03 * high + 2 * vcpus
    assert world.locks.sum() == pytest.approx(sum(done), rel=0.05, abs=max(high - low, 4 * len(done)))
    for i, count in enumerate(done):
        assert world.locks[i] == pytest.approx(count, rel=0.3, abs=5), several[i]


def test_over_many_hosts_single_guests_are_off_by_little():
    chance = random.Random(3)

    def limit() -> Limit:
        return Limit(rate=chance.uniform(10, 300), burst=chance.uniform(2, 40), max_delay=chance.choice([None, 1.0]))

    errors = []
    for _ in range(40):
        several = [
            Guest(chance.uniform(5, 200), chance.randint(1, 3), chance.choice("ab"), chance.choice([None, limit()]))
            for _ in range(chance.randint(1, 5))
        ]
        host, tenants = chance.choice([None, limit()]), [Tenant("a", limit=limit()), Tenant("b")]
        world = even(scenario(several, host, tenants))
        for _ in range(10):
            world.step()
        for i, count in enumerate(exact(several, host, tenants, 10.0)):
            errors.append(abs(world.locks[i] - count) / max(count, 1))
    assert np.quantile(errors, 0.5) < 0.01
    assert np.quantile(errors, 0.95) < 0.12


wanted_rates = st.just(0.0) | st.floats(0.001, 5000)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(wanted_rates, wanted_rates), min_size=2, max_size=40),
    st.sampled_from([0.05, 1.0, 3.0]),
    st.builds(Limit, rate=st.floats(1, 2000), burst=st.floats(1, 3000), max_delay=st.none()),
    st.builds(Limit, rate=st.floats(1, 2000), burst=st.floats(1, 3000), max_delay=st.none()),
)
def test_in_any_window_no_more_locks_than_burst_and_rate_allow(wanted, tick, own, host):
    asked = scenario([Guest(rate=1, limit=own), Guest(rate=1)], host, seconds=tick * len(wanted), tick=tick)
    world = even(asked)
    own_made, all_made = [0.0], [0.0]
    for a, b in wanted:
        world._crowds = [Even(a), Even(b)]
        world.step()
        own_made.append(world.locks[0])
        all_made.append(world.locks.sum())
    for made, limit in ((own_made, own), (all_made, host)):
        for first in range(len(made)):
            for last in range(first + 1, len(made)):
                allowed = limit.tokens + limit.rate * tick * (last - first)
                assert made[last] - made[first] <= allowed * (1 + 1e-9)


def test_a_changed_limit_keeps_what_was_left_as_in_the_core():
    asked = scenario([Guest(rate=1000, limit=Limit(rate=100, burst=1000, max_delay=None))], seconds=6)
    world = even(asked)
    world.step()
    spent = world.locks[0]  # 1000 of the burst and of the rate's tokens: some of the burst is left
    assert spent == pytest.approx(1000)
    world.enforcement.apply(0, "p", SetLimit(vm="g0-0", limit=Limit(rate=10, burst=500, max_delay=None)), world.now)
    for _ in range(5):
        world.step()
    assert world.locks[0] - spent == pytest.approx(100 + 10 * 5)  # what was left of the first burst, not a new one
    world.enforcement.apply(0, "p", SetLimit(vm="g0-0", limit=None), world.now)
    world.step()
    assert world.locks[0] == pytest.approx(1150 + 1000)
    world.enforcement.apply(0, "p", SetLimit(vm="g0-0", limit=Limit(rate=10, burst=500, max_delay=None)), world.now)
    world.step()
    assert world.locks[0] == pytest.approx(2150 + 10 + 10)  # of the rate before it and since, and no new burst


def test_waits_use_up_the_budget_and_no_more():
    rng = np.random.default_rng(7)
    bucket = rng.integers(0, 50, 400)
    bucket[:50] = np.arange(50)
    vcpus, think = rng.integers(1, 9, 400).astype(float), rng.uniform(1e-5, 1, 400)
    least = np.where(rng.random(400) < 0.3, rng.uniform(0, 0.1, 400), 0.0)
    free = np.bincount(bucket, vcpus / (think + least), 50)
    rate = free * rng.uniform(1e-4, 0.99, 50)
    waits = shared_waits(bucket, vcpus, think, least, rate)
    through = np.bincount(bucket, vcpus / (think + np.maximum(least, waits[bucket])), 50)
    assert through == pytest.approx(rate, rel=1e-8)


# ---- QEMU's window


def qemu(arrivals: float, quota: float, vcpus: int, seconds: float) -> list[float]:
    """When locks happen, by the code of QEMU's ratelimit_calculate_delay for vCPUs that lock at a rate each."""
    start = end = 0.0
    dispatched = 0
    think = 1 / arrivals
    ready = [(think * (i + 1) / vcpus, i) for i in range(vcpus)]
    times = []
    while ready[0][0] < seconds:
        now, vcpu = heapq.heappop(ready)
        times.append(now)
        if end < now:
            start, end, dispatched = now, now + 1.0, 0
        dispatched += 1
        wait = 0.0
        if dispatched >= quota:
            end = start + dispatched / quota * 1.0
            wait = end - now
        heapq.heappush(ready, (now + wait + think, vcpu))
    return times


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("tick", [0.05, 0.5, 1.0, 4.0])
def test_qemus_window_lets_through_what_qemu_does(tick, vcpus):
    times = qemu(400, 100, vcpus, 20.0)
    asked = scenario([Guest(rate=400, vcpus=vcpus)], seconds=20, tick=tick)
    world = even(asked, window=QemuWindow(rate=100))
    for _ in range(asked.ticks):
        world.step()
    assert world.locks[0] == pytest.approx(len(times), rel=0.05)


def test_qemus_window_lets_through_twice_its_quota_across_an_edge():
    windows = Windows(1, 100, 1.0)
    one, at = np.array([0]), np.array([1.0])
    made = []
    for step in range(40):
        now = step * 0.05
        # One lock starts the slice; the rest of its quota at its end, the next one's at once.
        want = 1.0 if step == 0 else 1000.0 if 19 <= step <= 21 else 0.0
        made.append(float(windows.through(one, np.array([want]), at, now, 0.05)[0]))
    edge = sum(made[19:21])
    assert 198 <= edge <= 200
    bucket = [min(100.0, edge)]
    assert edge > 1.9 * bucket[0]


def test_qemus_windows_are_each_their_own():
    windows = Windows(2, 10, 1.0)
    both, at = np.array([0, 1]), np.array([1.0, 1.0])
    assert windows.through(both, np.array([50.0, 5.0]), at, 0.0, 0.5) == pytest.approx([10, 5])
    assert windows.through(both, np.array([50.0, 50.0]), at, 0.5, 0.5) == pytest.approx([0, 5])
    assert windows.through(both, np.array([50.0, 50.0]), at, 1.0, 0.5) == pytest.approx([10, 10])
    assert math.isfinite(windows.through(both, np.array([1e9, 0.0]), at, 1.5, 100.0).sum())
