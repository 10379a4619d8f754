"""WeightedShare in a closed loop: guests, buckets and time are a small model, so every run is the same.

The buckets follow native/bucket.c: an event takes a ticket in every bucket at once, and its vCPU waits for the latest
turn of them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from itertools import count

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from orchestra.model.actions import Throttle, Unthrottle
from orchestra.model.errors import SpecError
from orchestra.model.spec import Limit, Meter, Tenant
from orchestra.policy import Facts, Policy, VmFacts, WeightedShare

HOST = Limit(rate=1000, burst=100, max_delay=1.0)
GREEDY = 20e-6  # seconds of work between two events


class Bucket:
    """A GCRA whose limit can change while tickets wait."""

    def __init__(self, limit: Limit | None = None) -> None:
        self.last = self.made = self.since = 0.0
        self.limit = limit

    def tokens(self, now: float) -> float:
        return self.made + (0.0 if self.limit is None else max(0.0, now - self.since) * self.limit.rate)

    def set(self, limit: Limit | None, now: float) -> None:
        self.made, self.since = self.tokens(now), now
        if self.limit is None:
            self.last = self.made
        self.limit = limit

    def charge(self, now: float) -> float:
        self.last = max(self.last, self.tokens(now)) + 1
        return self.last

    def turn(self, ticket: float) -> float:
        if self.limit is None:
            return -math.inf
        return self.since + (ticket - (self.limit.tokens - 1) - self.made) / self.limit.rate


@attrs.define(eq=False)
class Guest:
    """A VM that works for `think(now)` seconds between two events on each of its vCPUs; inf: it is idle for now."""

    name: str
    think: Callable[[float], float]
    tenant: str = "default"
    weight: float = 1.0
    vcpus: int = 1
    own: Bucket = attrs.field(factory=Bucket)
    bucket: Bucket = attrs.field(factory=Bucket)
    events: int = 0
    throttled: float = 0.0


def steady(rate: float) -> Callable[[float], float]:
    return lambda now: 1 / rate


def greedy_during(*spans: tuple[float, float]) -> Callable[[float], float]:
    return lambda now: GREEDY if any(start <= now < end for start, end in spans) else math.inf


class World:
    """Guests under one host bucket, and a policy that looks at them every tick."""

    def __init__(
        self,
        policy: Policy,
        guests: Iterable[Guest],
        tenants: Iterable[Tenant] = (),
        host: Limit | None = HOST,
        ticks: Callable[[int], float] = lambda n: 0.1,
    ) -> None:
        self.policy, self.ticks = policy, ticks
        self.guests = {guest.name: guest for guest in guests}
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self.buckets = {tenant.name: Bucket(tenant.limit) for tenant in self.tenants.values()}
        self.host = Bucket(host)
        self.now = 0.0
        self.actions: list[tuple[float, Throttle | Unthrottle]] = []
        self.history: list[dict[str, int]] = []
        self._order = count()
        self._wakes: list[tuple[float, int, Guest]] = []
        # [vCPU's guest, its tickets, when it was looked at last]
        self._waiting: list[tuple[Guest, list[tuple[Bucket, float]], float]] = []
        for guest in self.guests.values():
            for _ in range(guest.vcpus):
                self._wake(0.0, guest)

    def _wake(self, at: float, guest: Guest) -> None:
        heapq.heappush(self._wakes, (at, next(self._order), guest))

    def _event(self, guest: Guest) -> None:
        guest.events += 1
        above = [self.host, guest.own, guest.bucket]
        if guest.tenant in self.buckets:
            above.append(self.buckets[guest.tenant])
        tickets = [(bucket, bucket.charge(self.now)) for bucket in above if bucket.limit is not None]
        at = max((bucket.turn(ticket) for bucket, ticket in tickets), default=-math.inf)
        if at > self.now:
            self._waiting.append((guest, tickets, self.now))
        else:
            self._think(guest)

    def _think(self, guest: Guest) -> None:
        work = guest.think(self.now)
        # Whoever is idle looks again a little later, and does nothing for it.
        self._wake(self.now + (work if work < math.inf else 0.01), guest)

    def _turns(self) -> list[float]:
        return [max((b.turn(t) for b, t in tickets), default=-math.inf) for _, tickets, _ in self._waiting]

    def run(self, seconds: float) -> World:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.tick()
        return self

    def tick(self) -> None:
        interval = self.ticks(len(self.history))
        end = self.now + interval
        while True:
            turns = self._turns()
            turn = min(turns, default=math.inf)
            wake = self._wakes[0][0] if self._wakes else math.inf
            if min(turn, wake) >= end:
                break
            if turn <= wake:
                guest, _, since = self._waiting.pop(turns.index(turn))
                self.now = max(self.now, turn)
                guest.throttled += self.now - since
                self._think(guest)
            else:
                self.now, _, guest = heapq.heappop(self._wakes)
                if guest.think(self.now) < math.inf:
                    self._event(guest)
                else:
                    self._think(guest)
        self.now = end
        for i, (guest, tickets, since) in enumerate(self._waiting):
            guest.throttled += end - since
            self._waiting[i] = (guest, tickets, end)
        self._decide(interval)

    def _decide(self, interval: float) -> None:
        vms = {
            g.name: VmFacts(g.name, g.tenant, g.weight, g.vcpus, g.events, g.events, g.throttled)
            for g in self.guests.values()
            if g.events  # the strictest reading of "did something": a VM that only waited is not told
        }
        self.history.append({g.name: g.events for g in self.guests.values()})
        for guest in self.guests.values():
            guest.events, guest.throttled = 0, 0.0
        facts = Facts(round(self.now * 1e9), interval, self.host.limit, None, self.tenants, vms)
        for action in self.policy.decide(facts):
            assert isinstance(action, Throttle | Unthrottle)
            assert action.vm is not None
            self.actions.append((self.now, action))
            self.guests[action.vm].bucket.set(action.limit if isinstance(action, Throttle) else None, self.now)

    def limits(self) -> dict[str, float]:
        return {g.name: g.bucket.limit.rate for g in self.guests.values() if g.bucket.limit is not None}

    def rate(self, name: str, ticks: int) -> float:
        return sum(tick[name] for tick in self.history[-ticks:]) / sum(
            self.ticks(n) for n in range(len(self.history) - ticks, len(self.history))
        )

    def actions_since(self, time: float) -> list[Throttle | Unthrottle]:
        return [action for at, action in self.actions if at > time + 1e-9]


GOLD, BRASS = Tenant(name="gold", weight=3), Tenant(name="brass", weight=1)


def greedy(name: str, tenant: str = "default", **more: object) -> Guest:
    return Guest(name, steady(1 / GREEDY), tenant, **more)  # type: ignore[arg-type]  # passed through


def test_it_is_a_policy() -> None:
    assert isinstance(WeightedShare(), Policy)
    assert WeightedShare(interval=0.5).interval == 0.5


# ---- what it is for ----------------------------------------------------------------------------------------------


def test_two_greedy_tenants_run_as_their_weights_say_within_3_percent() -> None:
    world = World(WeightedShare(), [greedy("a", "brass"), greedy("b", "gold")], [GOLD, BRASS]).run(1.0)
    assert world.limits() == pytest.approx({"a": 250, "b": 750})
    world.run(5.0)
    assert world.rate("b", 50) / world.rate("a", 50) == pytest.approx(3, rel=0.03)
    assert world.rate("a", 50) + world.rate("b", 50) == pytest.approx(1000, rel=0.01)


def test_the_ratio_holds_from_the_third_tick_on() -> None:
    world = World(WeightedShare(), [greedy("a", "brass"), greedy("b", "gold")], [GOLD, BRASS]).run(0.6)
    assert world.rate("b", 3) / world.rate("a", 3) == pytest.approx(3, rel=0.06)  # 25 events a tick, one more or less


def test_weights_count_among_tenants_first_and_then_among_their_vms() -> None:
    guests = [greedy(f"a{i}", "brass") for i in range(4)]
    guests += [greedy("b1", "gold", weight=1), greedy("b2", "gold", weight=2, vcpus=4)]
    world = World(WeightedShare(), guests, [GOLD, BRASS]).run(3.0)
    assert world.limits() == pytest.approx({f"a{i}": 62.5 for i in range(4)} | {"b1": 250, "b2": 500})
    for name, share in world.limits().items():
        assert world.rate(name, 20) == pytest.approx(share, rel=0.03)


def test_nothing_is_done_once_the_shares_are_found() -> None:
    guests = [greedy("a", "brass"), greedy("b", "gold", vcpus=8), Guest("q", steady(100), "gold")]
    world = World(WeightedShare(), guests, [GOLD, BRASS]).run(1.5).run(10.0)
    assert world.actions_since(1.5) == []


def test_a_quiet_vm_beside_greedy_ones_gets_all_it_asks_for_and_no_limit() -> None:
    world = World(WeightedShare(), [greedy("a"), greedy("b", vcpus=4), Guest("q", steady(100))]).run(3.0)
    assert set(world.limits()) == {"a", "b"}
    assert world.rate("q", 20) == pytest.approx(100, rel=0.03)
    assert world.rate("a", 20) == pytest.approx(world.rate("b", 20), rel=0.03)
    assert sum(world.rate(name, 20) for name in world.guests) == pytest.approx(1000, rel=0.02)


def test_what_an_idle_tenant_leaves_is_lent_and_given_back() -> None:
    a = Guest("a", greedy_during((0, 2), (4, 9)), "brass")
    world = World(WeightedShare(), [a, greedy("b", "gold")], [GOLD, BRASS]).run(2.5)
    assert world.limits() == pytest.approx({"b": 1000})
    world.run(1.4)
    assert world.rate("b", 10) == pytest.approx(1000, rel=0.01)
    world.run(0.4)
    assert world.limits() == pytest.approx({"a": 250, "b": 750})
    world.run(2.0)
    assert world.rate("b", 15) / world.rate("a", 15) == pytest.approx(3, rel=0.03)


def test_an_idle_vm_loses_its_limit_so_that_it_comes_back_free() -> None:
    world = World(WeightedShare(), [Guest("a", greedy_during((0, 1))), greedy("b")]).run(2.0)
    released = [action for action in world.actions_since(0) if isinstance(action, Unthrottle)]
    assert [(action.vm, action.meter) for action in released] == [("a", Meter.BUS_LOCKS)]
    assert "idle" in released[0].reason


def test_nobody_is_limited_while_the_budget_has_room_for_all() -> None:
    world = World(WeightedShare(), [Guest("a", steady(300)), Guest("b", steady(200)), Guest("c", steady(350))]).run(3.0)
    assert world.actions == []


def test_limits_go_when_the_greedy_calm_down_and_do_not_come_back() -> None:
    a = Guest("a", lambda now: GREEDY if now < 2 else 1 / 300)
    world = World(WeightedShare(), [a, Guest("b", steady(200))]).run(2.0)
    assert set(world.limits()) == {"a"}
    world.run(0.6)
    assert world.limits() == {}
    world.run(5.0)
    assert world.actions_since(2.6) == []


@pytest.mark.parametrize("demand", [450, 480, 499, 505, 520, 600])
def test_demands_close_to_the_budget_do_not_make_it_flap(demand: float) -> None:
    world = World(WeightedShare(), [Guest("a", steady(demand)), Guest("b", steady(demand))]).run(2.0).run(10.0)
    assert len(world.actions_since(2.0)) <= 4
    assert world.rate("a", 50) == pytest.approx(min(demand, 500), rel=0.03)


def test_a_guest_in_bursts_is_served_and_moves_the_others_seldom() -> None:
    bursty = Guest("s", lambda now: 1 / 400 if now % 0.25 < 0.05 else math.inf)
    world = World(WeightedShare(), [bursty, greedy("a"), greedy("b")]).run(2.0).run(10.0)
    alone = World(WeightedShare(), [attrs.evolve(bursty, own=Bucket(), bucket=Bucket())]).run(12.0)
    assert world.rate("s", 100) >= 0.9 * alone.rate("s", 100)
    assert len(world.actions_since(2.0)) <= 0.2 * 100 * 2  # a fifth of the ticks


def test_slow_shares_are_kept_although_their_vms_are_silent_for_many_ticks() -> None:
    # 2.5 events a second are one in four ticks: a VM that waits must not be taken for an idle one.
    guests = [greedy("a", "brass"), greedy("b", "gold")]
    slow = Limit(rate=10, burst=2, max_delay=None)
    world = World(WeightedShare(), guests, [GOLD, BRASS], host=slow).run(5.0).run(40.0)
    assert world.actions_since(5.0) == []
    assert world.rate("b", 400) / world.rate("a", 400) == pytest.approx(3, rel=0.03)


# ---- limits of other kinds ----------------------------------------------------------------------------------------


def test_a_tenants_own_limit_caps_what_its_vms_share_and_the_rest_is_lent() -> None:
    capped = Tenant(name="gold", weight=3, limit=Limit(rate=200))
    guests = [greedy("a", "brass"), greedy("b1", "gold"), greedy("b2", "gold", weight=3)]
    world = World(WeightedShare(), guests, [capped, BRASS]).run(3.0)
    assert world.limits() == pytest.approx({"a": 800, "b1": 50, "b2": 150})
    assert world.rate("b2", 20) / world.rate("b1", 20) == pytest.approx(3, rel=0.03)
    assert world.rate("a", 20) == pytest.approx(800, rel=0.03)


def test_a_tenants_limit_is_shared_even_if_the_host_has_none() -> None:
    capped = Tenant(name="gold", limit=Limit(rate=200))
    guests = [Guest("a", steady(500), "brass"), greedy("b1", "gold"), greedy("b2", "gold", weight=3)]
    world = World(WeightedShare(), guests, [capped, BRASS], host=None).run(3.0)
    assert world.limits() == pytest.approx({"b1": 50, "b2": 150})
    assert "its tenant's limit" in world.actions[0][1].reason


def test_what_a_vm_with_a_limit_of_its_own_cannot_use_is_lent() -> None:
    held = greedy("held", own=Bucket(Limit(rate=200)))
    world = World(WeightedShare(), [held, greedy("a")]).run(3.0).run(5.0)
    assert world.actions_since(3.0) == []
    assert world.limits() == pytest.approx({"a": 780}, rel=0.03)
    assert world.rate("held", 50) == pytest.approx(200, rel=0.03)


def test_a_vm_whose_own_limit_is_lifted_gets_its_share() -> None:
    held = greedy("held", own=Bucket(Limit(rate=200)))
    world = World(WeightedShare(), [held, greedy("a")]).run(3.0)
    held.own.set(None, world.now)
    world.run(0.5)
    assert world.limits() == pytest.approx({"held": 500, "a": 500})


def test_a_budget_of_its_own_goes_before_the_hosts_limit() -> None:
    world = World(WeightedShare(Limit(rate=100, max_delay=2.0)), [greedy("a"), greedy("b")], host=None).run(3.0)
    assert world.limits() == pytest.approx({"a": 50, "b": 50})
    assert all(action.limit.max_delay == 2.0 for _, action in world.actions if isinstance(action, Throttle))


def test_a_changed_host_limit_changes_the_shares_at_the_next_tick() -> None:
    world = World(WeightedShare(), [greedy("a"), greedy("b")]).run(1.0)
    world.host.set(Limit(rate=400, burst=100, max_delay=0.5), world.now)
    world.run(0.1)
    assert world.limits() == pytest.approx({"a": 200, "b": 200})
    assert [action.limit.max_delay for action in world.actions_since(1.0) if isinstance(action, Throttle)] == [0.5, 0.5]


def test_a_limit_that_got_lost_is_set_again() -> None:
    world = World(WeightedShare(), [greedy("a"), greedy("b", weight=9)]).run(1.0)
    world.guests["a"].bucket.set(None, world.now)
    world.run(0.3)
    assert world.limits() == pytest.approx({"a": 100, "b": 900})


# ---- facts as they come -------------------------------------------------------------------------------------------


def tick(policy: WeightedShare, *vms: VmFacts, interval: float = 0.1, **more: object) -> list[Throttle | Unthrottle]:
    told = {"limit": HOST, "exit_limit": None, "tenants": {}} | more
    return policy.decide(Facts(time=0, interval=interval, vms={vm.name: vm for vm in vms}, **told))  # type: ignore[arg-type]  # passed through


def busy(name: str, events: int | None = 90, **more: object) -> VmFacts:
    fields = {"tenant": "default", "weight": 1.0, "vcpus": 1, "exits": events or 0, "throttled": 0.1} | more
    return VmFacts(name=name, bus_locks=events, **fields)  # type: ignore[arg-type]  # passed through


def rates(actions: list[Throttle | Unthrottle]) -> dict[str | None, float]:
    return {action.vm: action.limit.rate for action in actions if isinstance(action, Throttle)}


def test_no_vms_no_actions() -> None:
    assert tick(WeightedShare()) == []


def test_where_no_bus_locks_are_reported_there_is_nothing_to_share() -> None:
    assert tick(WeightedShare(), busy("a", None), busy("b", None)) == []


def test_exits_are_shared_by_the_hosts_exit_limit() -> None:
    policy = WeightedShare(meter="exits")
    vms = busy("a", None, exits=5000), busy("b", None, exits=5000)
    actions = tick(policy, *vms, limit=None, exit_limit=Limit(rate=10000))
    assert rates(actions) == pytest.approx({"a": 5000, "b": 5000})
    assert {action.meter for action in actions} == {Meter.EXITS}
    assert policy.name != WeightedShare().name


def test_a_tenants_exit_limit_counts_for_exits_only() -> None:
    tenants = {"default": Tenant(name="default", limit=Limit(rate=1), exit_limit=Limit(rate=100))}
    assert rates(tick(WeightedShare(meter="exits"), busy("a"), exit_limit=HOST, tenants=tenants)) == {"a": 100}


def test_a_vm_of_a_tenant_that_is_not_told_counts_with_weight_1() -> None:
    actions = tick(WeightedShare(), busy("a", tenant="who"), busy("b", tenant="gold"), tenants={"gold": GOLD})
    assert rates(actions) == pytest.approx({"a": 250, "b": 750})


def test_extreme_weights_still_give_valid_limits() -> None:
    actions = tick(WeightedShare(), busy("a", weight=1e6), busy("b", weight=1e-6))
    assert rates(actions) == pytest.approx({"a": 1000, "b": 1e-9})


def test_bursts_cover_50_ms_of_lateness_and_no_more() -> None:
    for action in tick(WeightedShare(), busy("a"), busy("b", weight=3)):
        assert isinstance(action, Throttle)
        assert action.limit.tokens - 1 == pytest.approx(0.05 * action.limit.rate)
        assert action.limit.max_delay == HOST.max_delay


def test_an_action_tells_the_share_and_what_it_was_made_from() -> None:
    action, _ = tick(WeightedShare(), busy("a", throttled=0.07), busy("b", tenant="gold"), tenants={"gold": GOLD})
    assert action.reason == "fair share: 250 bus locks/s of the budget of 1000/s"
    assert action.evidence == {
        "rate": 900.0,
        "demand": None,
        "throttled": 0.07,
        "interval": 0.1,
        "share": 250.0,
        "weight": 1.0,
        "tenant": "default",
        "tenant_weight": 1.0,
        "budget": 1000.0,
    }


def test_ticks_that_come_early_and_late_change_nothing() -> None:
    jitter = [0.1, 0.03, 0.25, 0.1, 0.5, 0.07]
    guests = [greedy("a", "brass"), greedy("b", "gold"), Guest("q", steady(200), "gold")]
    world = World(WeightedShare(), guests, [GOLD, BRASS], ticks=lambda n: jitter[n % len(jitter)]).run(4.0).run(10.0)
    assert len(world.actions_since(4.0)) <= 6
    assert world.rate("q", 40) == pytest.approx(200, rel=0.03)
    assert world.rate("a", 40) == pytest.approx(250, rel=0.03)


def test_small_changes_are_left_alone_and_a_large_one_moves_all_who_are_off() -> None:
    policy = WeightedShare(headroom=0.1, tolerance=0.02)
    quiet = [busy("q", 0, throttled=0.0), busy("q", 1, throttled=0.0), busy("q", 6, throttled=0.0)]
    assert rates(tick(policy, busy("a"), busy("b"), quiet[0])) == {"a": 500, "b": 500}
    assert tick(policy, busy("a"), busy("b"), quiet[1]) == []  # 494.5: off by 1.1 %
    assert rates(tick(policy, busy("a"), busy("b"), quiet[2])) == pytest.approx({"a": 467, "b": 467})


def test_what_is_remembered_follows_the_vms_that_are_active() -> None:
    policy = WeightedShare()
    for i in range(100):
        tick(policy, busy(f"vm-{i}", throttled=0.0), busy(f"other-{i}"))
    for _ in range(20):  # some have to rest for what they had beyond their share
        tick(policy)
    assert len(policy._vms) == 0


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["gold", "brass", "tin"]), st.floats(0.1, 10), st.sampled_from([20, 80, 300, 5e4])),
        min_size=1,
        max_size=5,
    )
)
def test_whoever_shares_everybody_gets_its_demand_or_its_fair_share(fleet: list[tuple[str, float, float]]) -> None:
    tenants = {"gold": 3.0, "brass": 1.0, "tin": 1.0}  # tin is not among the tenants told
    guests = [Guest(str(i), steady(demand), tenant, weight) for i, (tenant, weight, demand) in enumerate(fleet)]
    world = World(WeightedShare(), guests, [GOLD, BRASS]).run(4.0)
    total = sum(tenants[tenant] for tenant in {tenant for tenant, _, _ in fleet})
    for i, (tenant, weight, demand) in enumerate(fleet):
        part = weight / sum(w for t, w, _ in fleet if t == tenant)
        fair = 1000 * tenants[tenant] / total * part
        assert world.rate(str(i), 20) >= 0.95 * min(demand, fair) - 2  # two events more or less at the ends
    assert sum(world.limits().values()) <= 1000 * 1.021
    assert sum(world.rate(name, 20) for name in world.guests) >= 0.9 * min(1000, sum(d for _, _, d in fleet))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"limit": 1000}, "limit=1000: must be a Limit"),
        ({"interval": 0}, "interval=0"),
        ({"interval": math.nan}, "interval=nan"),
        ({"headroom": 0.01}, "headroom=0.01"),
        ({"tolerance": -1}, "tolerance=-1"),
        ({"memory": 0}, "memory=0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        WeightedShare(**arguments)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_one_that_keeps_to_a_low_share_gets_all_of_it(rate: float) -> None:
    """Without a second event of burst it would wait after each, and work only then."""
    guests = [Guest("a", steady(rate)), greedy("b")]
    world = World(WeightedShare(Limit(rate=2 * rate, burst=4)), guests).run(30.0)
    assert world.rate("a", 250) >= 0.9 * rate
