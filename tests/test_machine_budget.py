"""A budget: what is in force of a limit set in several places, and buckets stacked on a vCPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from orchestra.machine.budget import HOST, TENANT, VCPU, VM, Budget, connect, make_budgets, tightest
from orchestra.model.spec import Limit, Meter
from orchestra.native import ffi, lib
from orchestra.native.core import NEVER, FleetCore, VcpuCore
from orchestra.native.records import BUS_LOCK, build

SECOND = 1_000_000_000
SLOW, MIDDLE, FAST = Limit(rate=1, burst=1), Limit(rate=10, burst=1), Limit(rate=100, burst=1)
LIMITS = st.builds(
    Limit,
    rate=st.floats(0.01, 1e9),
    burst=st.none() | st.floats(1, 1e9),
    max_delay=st.none() | st.floats(0.001, 1e6),
)


@pytest.fixture
def budget() -> Iterator[Budget]:
    made = Budget(MIDDLE, now=0)
    yield made
    made.close()


def test_without_any_limit_none_is_in_force():
    assert tightest(None) is None
    assert tightest(None, []) is None


def test_lowest_rate_is_in_force_whoever_set_it():
    assert tightest(None, [FAST, SLOW, MIDDLE]) == SLOW
    assert tightest(SLOW, [FAST, MIDDLE]) == SLOW


def test_throttle_with_a_larger_burst_does_not_loosen_the_burst_below():
    assert tightest(Limit(rate=100, burst=5), [Limit(rate=90, burst=1000)]) == Limit(rate=90, burst=5)


@pytest.mark.parametrize(("own", "other"), [(None, 0.001), (1.0, 10.0), (1.0, 0.5)])
def test_how_long_a_guest_may_be_delayed_is_for_the_base_to_say(own, other):
    inforce = tightest(Limit(rate=10, burst=1, max_delay=own), [Limit(rate=1, burst=1, max_delay=other)])
    assert inforce == Limit(rate=1, burst=1, max_delay=own)


def test_without_a_base_the_most_patient_throttle_says_it():
    throttles = [Limit(rate=1, burst=1, max_delay=3.0), Limit(rate=2, burst=1, max_delay=7.0)]
    assert tightest(None, throttles) == Limit(rate=1, burst=1, max_delay=7.0)
    assert tightest(None, [*throttles, Limit(rate=3, burst=1, max_delay=None)]) == Limit(
        rate=1, burst=1, max_delay=None
    )


@given(st.lists(LIMITS, min_size=1, max_size=4))
def test_what_is_in_force_allows_no_more_than_any_of_the_limits(limits):
    inforce = tightest(limits[0], limits[1:])
    assert inforce is not None
    for limit in limits:
        assert inforce.rate <= limit.rate
        assert inforce.tokens <= limit.tokens


def test_throttle_holds_until_it_is_taken_away(budget):
    budget.set_throttle("policy", SLOW, 0)
    assert budget.limit == SLOW
    budget.set_throttle("policy", None, 0)
    assert budget.limit == MIDDLE == budget.base


def test_throttle_that_would_loosen_has_no_effect(budget):
    budget.set_throttle(None, FAST, 0)
    assert budget.limit == MIDDLE


def test_throttles_of_two_policies_do_not_undo_each_other(budget):
    budget.set_throttle("a", SLOW, 0)
    budget.set_throttle("b", Limit(rate=5, burst=1), 0)
    assert budget.limit == SLOW
    budget.set_throttle("a", None, 0)
    assert budget.limit == Limit(rate=5, burst=1)


def test_new_base_leaves_the_throttle_in_force(budget):
    budget.set_throttle(None, MIDDLE, 0)
    budget.set_base(FAST, 0)
    assert (budget.base, budget.limit) == (FAST, MIDDLE)
    budget.set_base(None, 0)
    assert budget.limit == MIDDLE


def test_taking_away_a_throttle_that_nobody_set_changes_nothing(budget):
    budget.set_throttle("nobody", None, 0)
    assert budget.limit == MIDDLE


def test_budget_without_a_limit_leaves_its_bucket_unlimited():
    made = Budget(None, now=0)
    assert not lib.orc_bucket_limited(made.bucket.handle)
    made.set_throttle(None, SLOW, 0)
    assert lib.orc_bucket_limited(made.bucket.handle)
    made.set_throttle(None, None, 0)
    assert not lib.orc_bucket_limited(made.bucket.handle)
    made.close()
    assert made.bucket.handle == ffi.NULL


NO_LIMITS = dict.fromkeys(Meter)


def turns(levels: dict[int, Limit], meter: Meter, flags: int = 0, answered: bool = False) -> list[int]:
    """When a vCPU with those limits at the levels may go on after each of three exits at time 0.

    With a burst of 1 each exit is paid for before the guest goes on.
    """
    fleet = FleetCore()
    core = VcpuCore(fleet, 1)
    stack = [make_budgets({**NO_LIMITS, meter: levels.get(i)}, 0) for i in (HOST, TENANT, VM, VCPU)]
    connect(core, (stack[0], stack[1], stack[2], stack[3]))
    record = build("x86_bus_lock" if flags else "hlt", flags=flags)

    def account() -> int:
        at = int(lib.orc_vcpu_account(core.handle, record, 1))
        if not answered:
            return at
        lib.orc_vcpu_answered(core.handle, 1, 1)
        return int(lib.orc_vcpu_turn(core.handle))

    made = [account() for _ in range(3)]
    core.close()
    for budgets in stack:
        for each in budgets.values():
            each.close()
    fleet.close()
    return made


@pytest.mark.parametrize("level", [HOST, TENANT, VM, VCPU])
@pytest.mark.parametrize(
    ("meter", "flags", "answered"),
    [(Meter.BUS_LOCKS, BUS_LOCK, False), (Meter.EXITS, 0, False), (Meter.ANSWERS, 0, True)],
)
def test_a_limit_holds_at_every_level_on_its_meter(level, meter, flags, answered):
    assert turns({level: SLOW}, meter, flags, answered) == pytest.approx([SECOND, 2 * SECOND, 3 * SECOND], abs=1e5)


def test_a_vcpu_waits_for_the_slowest_of_its_levels():
    assert turns({HOST: FAST, VM: SLOW, VCPU: MIDDLE}, Meter.EXITS, 0)[0] == pytest.approx(SECOND, abs=1e5)


def test_bus_lock_limit_does_not_hold_exits_without_a_lock():
    assert turns({VM: SLOW}, Meter.BUS_LOCKS, 0) == [NEVER] * 3
