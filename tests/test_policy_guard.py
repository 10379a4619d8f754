"""Guard: floors, cool-downs, bounds, whose word counts, dry runs; and no policy starves anybody."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from closed_loop import SECOND, Guest, World, steady
from orchestra.model.actions import (
    Action,
    CapCpu,
    Evict,
    Isolate,
    Kill,
    Pause,
    Rejoin,
    Resume,
    SetLimit,
    Stop,
    Throttle,
    Unthrottle,
    Warn,
)
from orchestra.model.errors import SpecError
from orchestra.model.spec import Limit, Tenant
from orchestra.policy import Facts, Guard, Ruling, Verdict

HARD = [Pause(vm="a"), Isolate(vm="a"), Evict(vm="a"), Stop(vm="a"), Kill(vm="a")]
BACK = [Resume(vm="a"), Rejoin(vm="a"), Unthrottle(vm="a"), CapCpu(vm="a", share=None), SetLimit(vm="a", limit=None)]


def judge(guard: Guard, action: Action, time: float = 0.0, policy: str | None = "p", order: int = 0) -> Verdict:
    return guard.judge(action, policy, round(time * SECOND), order)


def throttle(rate: float, max_delay: float | None = 1.0, **more: object) -> Throttle:
    return Throttle(limit=Limit(rate=rate, burst=9, max_delay=max_delay), **({"vm": "a"} | more))  # type: ignore[arg-type]  # passed through


# ---- floors -------------------------------------------------------------------------------------------------------


def test_what_is_within_the_rules_goes_through_as_it_is():
    for action in (throttle(10), CapCpu(vm="a", share=0.5), Warn(vm="a"), Unthrottle(vm="a"), Pause(vm="a")):
        assert judge(Guard(), action) == Verdict(action, Ruling.ALLOWED, "", action)


def test_a_throttle_below_the_floor_is_raised_to_it_and_says_so():
    asked = attrs.evolve(throttle(0.5), reason="noisy", evidence={"rate": 900})
    verdict = judge(Guard(floor=5), asked)
    assert verdict.outcome is Ruling.CHANGED
    assert verdict.reason == "0.5/s raised to the floor of 5/s"
    assert verdict.action == Throttle(
        vm="a",
        limit=Limit(rate=5, burst=9, max_delay=1.0),
        reason="noisy (0.5/s raised to the floor of 5/s)",
        evidence={"rate": 900, "asked": {"rate": 0.5, "burst": 9, "max_delay": 1.0}},
    )


def test_each_meter_has_its_floor():
    guard = Guard(floor=5, exit_floor=50)
    for meter in ("exits", "answers"):
        assert judge(guard, throttle(10, meter=meter)).action.limit.rate == 50
    assert judge(guard, throttle(10)).action.limit.rate == 10


def test_a_limit_on_many_is_raised_for_each_of_them():
    guard = Guard(floor=5)
    for place in ({"vm": None, "tenant": "acme"}, {"vm": None}):
        assert guard.judge(throttle(10, **place), "p", 0, 0, vms=4).action.limit.rate == 20
    assert guard.judge(throttle(10, vm="a"), "p", 0, 0, vms=4).action.limit.rate == 10


@pytest.mark.parametrize("asked", [None, 60.0])
def test_max_delay_is_forced(asked):
    verdict = judge(Guard(max_delay=2), throttle(10, asked))
    assert verdict.action.limit == Limit(rate=10, burst=9, max_delay=2)
    assert "lowered to 2 s" in verdict.reason


def test_a_burst_that_makes_everybody_wait_is_raised():
    verdict = judge(Guard(), Throttle(vm="a", limit=Limit(rate=10)))
    assert verdict.action.limit == Limit(rate=10, burst=2)
    assert verdict.reason == "burst 1 raised to 2"


def test_limits_themselves_are_raised_as_well():
    assert judge(Guard(floor=5), SetLimit(vm="a", limit=Limit(rate=1))).action.limit.rate == 5


def test_a_cpu_cap_below_the_floor_is_raised():
    verdict = judge(Guard(cpu_floor=0.2), CapCpu(vm="a", share=0.01))
    assert (verdict.action.share, verdict.outcome) == (0.2, Ruling.CHANGED)
    assert verdict.action.evidence["asked"] == {"share": 0.01}
    assert judge(Guard(cpu_floor=0.2), CapCpu(vm="a", share=0.3)).outcome is Ruling.ALLOWED


def test_a_caller_may_do_what_no_policy_may():
    for action in (throttle(1e-6, None), CapCpu(vm="a", share=0.01), *HARD, *HARD, *BACK):
        assert judge(Guard(), action, policy=None) == Verdict(action, Ruling.ALLOWED, "", action)


# ---- cool-downs and bounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", HARD, ids=lambda action: type(action).__name__)
@pytest.mark.parametrize("first", HARD, ids=lambda action: type(action).__name__)
def test_a_vm_cools_down_between_two_hard_actions(first, second):
    guard = Guard(vm_cool_down=10, host_cool_down=0)
    assert judge(guard, first, 5).action == first
    refused = judge(guard, second, 14.9)
    assert (refused.action, refused.outcome) == (None, Ruling.REFUSED)
    assert refused.reason == "cool-down: 9.9 of 10 s since the last one on this VM"
    assert judge(guard, second, 15).action == second


def test_the_host_cools_down_between_two_vms():
    guard = Guard(host_cool_down=2)
    assert judge(guard, Pause(vm="a"), 1).action
    assert judge(guard, Pause(vm="b"), 2.9).reason == "cool-down: 1.9 of 2 s since the last one on this host"
    assert judge(guard, Pause(vm="b"), 3).action


def test_what_was_refused_does_not_prolong_a_cool_down():
    guard = Guard(vm_cool_down=10, host_cool_down=0)
    times = [n / 10 for n in range(250) if judge(guard, Stop(vm="a"), n / 10).action]
    assert times == [0, 10, 20]


@pytest.mark.parametrize("tried", HARD, ids=lambda action: type(action).__name__)
def test_nobody_cools_down_from_what_failed(tried):
    guard = Guard(vm_cool_down=10, host_cool_down=5)
    guard.failed(judge(guard, tried, 100), 101 * SECOND)
    other = Pause(vm="a") if not isinstance(tried, Pause) else Isolate(vm="a")
    assert judge(guard, other, 101).action == other
    assert judge(guard, Stop(vm="a"), 105).reason.startswith("cool-down: 4 of 10 s")


def test_a_failure_leaves_the_cool_down_from_what_was_done_before():
    guard = Guard(vm_cool_down=10, host_cool_down=0)
    assert judge(guard, Pause(vm="a"), 0).action
    guard.failed(judge(guard, Isolate(vm="a"), 10), 11 * SECOND)
    assert judge(guard, Stop(vm="a"), 11).action


@pytest.mark.parametrize("tried", [*HARD, Warn(vm="a"), throttle(10)], ids=lambda action: type(action).__name__)
def test_what_fails_over_and_over_is_tried_ever_more_seldom(tried):
    guard = Guard(vm_cool_down=0, host_cool_down=0)
    tries = []
    for n in range(3000):
        verdict = judge(guard, tried, n / 10)
        if verdict.action is not None:
            tries.append(n / 10)
            guard.failed(verdict, n * SECOND // 10)
    assert tries == [0, 1, 3, 7, 15, 31, 63, 127, 191, 255]
    assert verdict.reason == "it failed 10 times in a row: not tried again for 19.1 s"


def test_what_failed_at_one_place_may_be_tried_at_another_and_on_another_vm_of_that_name():
    guard = Guard(host_cool_down=0)
    guard.failed(judge(guard, Pause(vm="a")), 0)
    assert judge(guard, Pause(vm="b"), 0.1).action
    assert judge(guard, Pause(vm="a"), 0.5).reason == "it failed: not tried again for 0.5 s"
    guard.forget("a")
    assert judge(guard, Pause(vm="a"), 0.5).action


def test_long_after_a_failure_it_counts_as_the_first_again():
    guard = Guard()
    for time in (0, 1, 3):
        guard.failed(judge(guard, Evict(vm="a"), time), time * SECOND)
    guard.failed(judge(guard, Evict(vm="a"), 1000), 1000 * SECOND)
    assert judge(guard, Evict(vm="a"), 1001).action


def test_letting_go_is_tried_again_at_once():
    guard = Guard()
    for action in BACK:
        guard.failed(judge(guard, action), 0)
        assert judge(guard, action).action


def test_the_word_of_what_failed_does_not_count():
    guard = Guard(vm_cool_down=10, max_pause=60)
    guard.failed(judge(guard, Pause(vm="a"), 0, "first", 0), 0)
    assert guard.overdue(100 * SECOND) == []
    assert judge(guard, Resume(vm="a"), 0, "second", 1).action
    guard.failed(judge(guard, Resume(vm="a"), 20, "first", 0), 20 * SECOND)
    assert judge(guard, Pause(vm="a"), 21, "second", 1).action


def test_what_was_said_while_it_was_tried_counts_all_the_same():
    guard = Guard(vm_cool_down=10, host_cool_down=0)
    tried = judge(guard, Pause(vm="a"), 0, "first", 0)
    judge(guard, Pause(vm="a"), 1, None)
    guard.failed(tried, 2 * SECOND)
    assert judge(guard, Resume(vm="a"), 2, "first", 0).reason == "a caller holds it"


@pytest.mark.parametrize("leave", [Evict(vm="a"), Stop(vm="a"), Kill(vm="a")], ids=lambda a: type(a).__name__)
def test_a_pause_still_ends_if_the_eviction_after_it_fails(leave):
    guard = Guard(vm_cool_down=10, max_pause=60)
    judge(guard, Pause(vm="a"), 0)
    guard.failed(judge(guard, leave, 20), 20 * SECOND)
    assert [action.vm for action in guard.overdue(61 * SECOND)] == ["a"]


def test_failures_count_towards_the_bounds():
    guard = Guard(actions_per_minute=3)
    for n in range(3):
        guard.failed(judge(guard, Warn(vm=f"v{n}")), 0)
    assert judge(guard, Warn(vm="a")).reason == "3 actions in the last minute: no more"


def test_letting_go_is_never_too_soon_nor_too_often():
    guard = Guard(vm_cool_down=100, host_cool_down=100, actions_per_minute=1, limits_per_minute=0)
    assert judge(guard, Pause(vm="a")).action
    for action in BACK * 3:
        assert judge(guard, action).action == action


def test_actions_in_a_minute_are_bounded():
    guard = Guard(actions_per_minute=3)
    allowed = [n for n in range(200) if judge(guard, Warn(vm=f"v{n}"), n).action]
    assert allowed == [0, 1, 2, 60, 61, 62, 120, 121, 122, 180, 181, 182]
    assert judge(guard, CapCpu(vm="a", share=0.5), 190).reason == "3 actions in the last minute: no more"


def test_limits_have_a_bound_of_their_own():
    guard = Guard(actions_per_minute=0, limits_per_minute=2)
    assert [bool(judge(guard, throttle(10)).action) for _ in range(3)] == [True, True, False]
    free = Guard(actions_per_minute=None, limits_per_minute=None)
    assert all(judge(free, action).action for action in [throttle(10), Warn(vm="a")] * 2000)


# ---- whose word counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hold", "back"), [(Pause(vm="a"), Resume(vm="a")), (Isolate(vm="a"), Rejoin(vm="a"))])
def test_what_one_holds_a_later_one_can_not_let_go(hold, back):
    guard = Guard()
    judge(guard, hold, 0, "first", 0)
    refused = judge(guard, back, 100, "second", 1)
    assert refused.reason == "policy first, which goes first, holds it"
    assert judge(guard, back, 100, "first", 0).action
    assert judge(guard, back, 100, "second", 1).action  # nobody holds it any more


def test_what_a_later_one_holds_an_earlier_one_may_let_go_and_then_it_stays_so_for_a_while():
    guard = Guard(vm_cool_down=10, host_cool_down=0)
    judge(guard, Pause(vm="a"), 0, "second", 1)
    assert judge(guard, Resume(vm="a"), 12, "first", 0).action
    for action in (Pause(vm="a"), Evict(vm="a"), Stop(vm="a")):
        assert judge(guard, action, 15, "second", 1).reason == "policy first, which goes first, let it go 3 s ago"
    assert judge(guard, Isolate(vm="a"), 15, "second", 1).action  # another matter
    assert judge(guard, Pause(vm="a"), 25, "second", 1).action


def test_the_strongest_of_those_that_hold_counts():
    guard = Guard(vm_cool_down=0, host_cool_down=0)
    judge(guard, Pause(vm="a"), 0, "second", 1)
    judge(guard, Pause(vm="a"), 1, "first", 0)
    judge(guard, Pause(vm="a"), 2, "third", 2)
    assert judge(guard, Resume(vm="a"), 3, "second", 1).outcome is Ruling.REFUSED
    assert judge(guard, Resume(vm="a"), 3, "first", 0).action


def test_a_callers_word_goes_before_all_policies():
    guard = Guard()
    judge(guard, Pause(vm="a"), 0, None)
    assert judge(guard, Resume(vm="a"), 100).reason == "a caller holds it"
    judge(guard, Resume(vm="a"), 101, None)
    assert judge(guard, Pause(vm="a"), 102).reason == "a caller let it go 1 s ago"


def test_what_was_said_of_a_vm_that_is_gone_says_nothing_of_another():
    for end in (lambda guard: guard.forget("a"), lambda guard: judge(guard, Stop(vm="a"), 20, None)):
        guard = Guard()
        judge(guard, Pause(vm="a"), 0, None)
        end(guard)
        assert judge(guard, Resume(vm="a"), 30).action


def test_limits_of_two_policies_do_not_contradict():
    guard = Guard()
    assert judge(guard, throttle(10), 0, "first", 0).action
    assert judge(guard, Unthrottle(vm="a"), 0, "second", 1).action
    assert judge(guard, throttle(99), 0, "second", 1).action


# ---- pauses end ---------------------------------------------------------------------------------------------------


def test_a_pause_by_a_policy_ends_after_the_most_it_may_last():
    guard = Guard(max_pause=60, host_cool_down=0)
    judge(guard, Pause(vm="a"), 0)
    judge(guard, Pause(vm="b"), 0, None)
    judge(guard, Pause(vm="c"), 30)
    assert guard.overdue(60 * SECOND) == []
    (action,) = guard.overdue(61 * SECOND)
    assert (action.vm, action.reason) == ("a", "paused by policy p for more than 60 s")
    assert guard.overdue(61 * SECOND) == []
    assert [action.vm for action in guard.overdue(100 * SECOND)] == ["c"]
    assert Guard(max_pause=None).overdue(10**18) == []


def test_saying_it_again_does_not_prolong_a_pause():
    guard = Guard(max_pause=60, vm_cool_down=10)
    for time in range(0, 60, 10):
        assert judge(guard, Pause(vm="a"), time).action
    assert len(guard.overdue(61 * SECOND)) == 1


def test_a_vm_runs_between_pauses_for_its_part_of_the_time():
    guard = Guard(max_pause=60, vm_cool_down=0, host_cool_down=0, most_paused=0.75)
    judge(guard, Pause(vm="a"), 0)
    assert len(guard.overdue(61 * SECOND)) == 1
    judge(guard, Resume(vm="a"), 61, None)  # as the fleet carries it out
    assert judge(guard, Pause(vm="a"), 80).reason == "it was paused for 61 s and has run for 19 of 20.3 s since"
    assert judge(guard, Pause(vm="b"), 80).action
    assert judge(guard, Pause(vm="a"), 82).action
    judge(guard, Resume(vm="a"), 83)
    assert judge(guard, Pause(vm="a"), 84).action  # it was a short one
    judge(guard, Resume(vm="a"), 100)
    guard.forget("a")
    assert judge(guard, Pause(vm="a"), 101).action  # another one


# ---- dry runs -----------------------------------------------------------------------------------------------------


def test_a_dry_run_decides_and_does_nothing():
    verdict = judge(Guard(dry_run=True, floor=5), throttle(1))
    assert verdict.action is None
    assert verdict.outcome is Ruling.DRY_RUN
    assert verdict.reason == "a dry run; 1/s raised to the floor of 5/s"
    assert verdict.judged.limit.rate == 5


def test_single_policies_can_be_run_dry():
    guard = Guard(dry_run=("new-*",))
    assert judge(guard, Warn(vm="a"), policy="new-ladder").outcome is Ruling.DRY_RUN
    assert judge(guard, Warn(vm="a"), policy="ladder").outcome is Ruling.ALLOWED
    assert judge(guard, Warn(vm="a"), policy=None).outcome is Ruling.ALLOWED
    assert Guard(dry_run="ladder").is_dry("ladder")


def test_a_dry_run_is_held_to_the_rules_and_holds_nobody_to_them():
    guard = Guard(dry_run="dry", vm_cool_down=10, host_cool_down=10, actions_per_minute=1)
    assert judge(guard, Pause(vm="a"), 0, "dry", 2).outcome is Ruling.DRY_RUN
    assert judge(guard, Pause(vm="a"), 1, "dry", 2).outcome is Ruling.REFUSED
    assert judge(guard, Pause(vm="a"), 1, "real", 1).outcome is Ruling.ALLOWED
    assert judge(guard, Resume(vm="a"), 2, "dry", 2).reason == "policy real, which goes first, holds it"
    assert judge(guard, Stop(vm="a"), 70, "dry", 2).outcome is Ruling.DRY_RUN
    assert judge(guard, Resume(vm="a"), 71, "later", 3).outcome is Ruling.REFUSED  # it was not really stopped


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("floor", 0),
        ("exit_floor", math.nan),
        ("cpu_floor", 0),
        ("max_delay", None),
        ("vm_cool_down", -1),
        ("host_cool_down", math.inf),
        ("actions_per_minute", -1),
        ("limits_per_minute", "many"),
        ("max_pause", 0),
        ("most_paused", 1),
        ("dry_run", (1,)),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(SpecError, match=field):
        Guard(**{field: value})


def test_what_is_remembered_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr("orchestra.policy.guard_state.MOST_REMEMBERED", 100)
    guard = Guard(host_cool_down=0, vm_cool_down=10)
    for n in range(2000):
        assert judge(guard, Pause(vm=f"v{n}"), n).action
        assert judge(guard, Resume(vm=f"v{n}"), n).action
        guard.failed(judge(guard, Warn(vm=f"v{n}"), n), n * SECOND)
    records = guard._records
    assert max(len(records.hard), len(records.let), len(records.recent), len(guard._failures)) <= 121
    assert records.held == {}


# ---- no policy starves anybody ------------------------------------------------------------------------------------

VMS = ("a", "b", "c")
LIMITS = st.builds(Limit, rate=st.floats(1e-9, 1e4), burst=st.just(1.0), max_delay=st.none() | st.floats(0.01, 1e6))
MALICE = st.one_of(
    st.builds(Throttle, vm=st.sampled_from(VMS), limit=LIMITS),
    st.builds(CapCpu, vm=st.sampled_from(VMS), share=st.floats(0.01, 1)),
    st.builds(Unthrottle, vm=st.sampled_from(VMS)),
)
HARSH = st.one_of(
    MALICE,
    st.builds(Throttle, limit=LIMITS),
    st.builds(Throttle, tenant=st.just("default"), limit=LIMITS),
    st.builds(Isolate, vm=st.sampled_from(VMS)),
    st.builds(Pause, vm=st.sampled_from(VMS)),
    st.builds(Pause, vm=st.sampled_from(VMS)),
    st.builds(Resume, vm=st.sampled_from(VMS)),
)


class Malicious:
    """Does whatever comes to its mind."""

    interval = 0.1

    def __init__(self, name: str, plan: list[list[Action]]) -> None:
        self.name, self.plan, self.n = name, plan, 0

    def decide(self, facts: Facts) -> list[Action]:
        self.n += 1
        return self.plan[self.n % len(self.plan)] if self.plan else []


PLAN = st.lists(st.lists(MALICE, max_size=3), max_size=20)


@settings(max_examples=20)
@given(PLAN, PLAN, st.floats(10, 40), st.floats(0.3, 2))
def test_no_policy_starves_a_vm_below_its_floor(one, other, floor, max_delay):
    rates = {"a": 300.0, "b": floor, "c": 5.0}
    world = World(
        [Malicious("one", one), Malicious("other", other)],
        [Guest(name, steady(rate)) for name, rate in rates.items()],
        guard=Guard(floor=floor, cpu_floor=1.0, max_delay=max_delay),
    ).run(5)
    for name, rate in rates.items():
        # What it asks for, or its floor; but for an event or two at each end.
        assert world.rate(name, 4) * 4 >= min(rate, floor) * 4 * 0.98 - 4, name
        assert world.guests[name].longest <= max_delay + 1e-6, name
        assert {limit.rate >= floor for limit in [world.guests[name].budget.limit] if limit} <= {True}


@pytest.mark.parametrize("place", [{"tenant": "acme"}, {}], ids=["tenant", "host"])
def test_vms_that_share_a_limit_get_their_floors_together(place):
    world = World(
        Malicious("one", [[Throttle(limit=Limit(rate=0.1, burst=1), **place)]]),
        [Guest(name, steady(300), tenant="acme") for name in VMS],
        tenants=[Tenant(name="acme")],
        guard=Guard(floor=10),
    ).run(6)
    assert sum(world.rate(name, 5) for name in VMS) == pytest.approx(30, rel=0.05)
    assert {name: world.rate(name, 5) for name in VMS} == pytest.approx(dict.fromkeys(VMS, 10), rel=0.1)


KINDS = (Pause, Resume, Isolate, Rejoin, Evict, Stop, Warn)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([kind(vm=vm) for vm in VMS for kind in KINDS]),
            st.sampled_from(["caller", "p0", "p1", "p2"]),
            st.integers(0, 20),
        ),
        max_size=80,
    )
)
def test_whatever_is_asked_for_the_cool_downs_and_the_order_hold(asked):
    guard = Guard(vm_cool_down=5, host_cool_down=2, actions_per_minute=20, max_pause=None)
    time, hard, done = 0, [], []
    paused: dict[str, int] = {}
    for action, by, later in asked:
        time += later
        order = -1 if by == "caller" else int(by[1])
        verdict = judge(guard, action, time, None if order < 0 else by, order)
        if verdict.action is None:
            assert verdict.reason
            assert order >= 0
            continue
        if order >= 0 and isinstance(action, Pause | Isolate | Evict | Stop):
            hard.append((time, action.vm))
        if order >= 0 and not isinstance(action, Resume | Rejoin):
            done.append(time)
        if isinstance(action, Resume):
            assert paused.pop(action.vm, 3) >= order
        elif isinstance(action, Pause):
            paused[action.vm] = min(order, paused.get(action.vm, 3))
        elif isinstance(action, Evict | Stop):
            paused.pop(action.vm, None)
    for n, (at, vm) in enumerate(hard):
        assert all(at - before >= 2 for before, _ in hard[:n])
        assert all(at - before >= 5 for before, other in hard[:n] if other == vm)
    assert all(sum(1 for other in done if at - 60 < other <= at) <= 20 for at in done)


@settings(max_examples=200)
@given(st.lists(st.lists(HARSH, max_size=3), min_size=1, max_size=30), st.floats(0.1, 0.9), st.floats(1, 40))
def test_no_policy_pauses_a_vm_for_more_than_its_part_of_the_time(plan, most_paused, max_pause):
    guard = Guard(most_paused=most_paused, max_pause=max_pause, vm_cool_down=0, host_cool_down=0)
    paused, total = dict.fromkeys(VMS, False), dict.fromkeys(VMS, 0)
    for second in range(600):
        for resume in guard.overdue(second * SECOND):
            judge(guard, resume, second, None)
            paused[resume.vm] = False
        for action in plan[second % len(plan)]:
            if judge(guard, action, second).action and isinstance(action, Pause | Resume):
                paused[action.vm] = isinstance(action, Pause)
        for vm in VMS:
            total[vm] += paused[vm]
    for vm in VMS:  # but for one that has not ended
        assert total[vm] <= most_paused * 600 + max_pause + 1, vm
