"""Weighted max-min sharing: the properties that define it."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, strategies as st

from orchestra.model.errors import SpecError
from orchestra.policy.maxmin import max_min

NEAR = 1e-9

amounts = st.one_of(st.just(0.0), st.floats(1e-6, 1e9))
weights = st.floats(1e-6, 1e6)
claims = st.lists(st.tuples(st.one_of(amounts, st.just(math.inf)), weights), max_size=30)


def split(claims: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [demand for demand, _ in claims], [weight for _, weight in claims]


@given(amounts, claims)
def test_shares_add_up_to_the_budget_or_to_the_demands(budget: float, claims: list[tuple[float, float]]) -> None:
    demands, by = split(claims)
    assert math.isclose(sum(max_min(budget, demands, by)), min(budget, sum(demands)), rel_tol=NEAR)


@given(amounts, claims)
def test_nobody_gets_more_than_it_asked_for(budget: float, claims: list[tuple[float, float]]) -> None:
    demands, by = split(claims)
    assert all(0 <= share <= demand for share, demand in zip(max_min(budget, demands, by), demands, strict=True))


@given(amounts, claims)
def test_nobody_gets_less_than_its_demand_or_its_fair_share(budget: float, claims: list[tuple[float, float]]) -> None:
    demands, by = split(claims)
    for share, demand, weight in zip(max_min(budget, demands, by), demands, by, strict=True):
        assert share >= min(demand, budget * weight / sum(by)) * (1 - NEAR) - budget * 1e-12


@given(amounts, claims)
@example(1.0, [(math.inf, 1e6), (math.inf, 1e-6)])
def test_whoever_lacks_something_has_the_highest_level_of_all(budget: float, claims: list[tuple[float, float]]) -> None:
    # The definition of max-min: no share can grow but at the cost of one whose level (share / weight) is not higher.
    demands, by = split(claims)
    shares = max_min(budget, demands, by)
    levels = [share / weight for share, weight in zip(shares, by, strict=True)]
    # Rounding is relative to the budget, so a small share beside huge ones may be off by that much of it.
    slack = [NEAR * level + budget * 1e-12 / weight for level, weight in zip(levels, by, strict=True)]
    for i, demand in enumerate(demands):
        if shares[i] < demand * (1 - NEAR):
            assert all(levels[i] >= level - slack[i] - slack[j] for j, level in enumerate(levels))


@given(st.floats(1e-3, 1e6), claims, st.integers(-20, 20), st.integers(-10, 10))
def test_the_unit_and_the_scale_of_weights_do_not_matter(
    budget: float, claims: list[tuple[float, float]], unit: int, scale: int
) -> None:
    demands, by = split(claims)
    shares = max_min(budget, demands, by)
    scaled = max_min(budget * 2.0**unit, [demand * 2.0**unit for demand in demands], [w * 2.0**scale for w in by])
    assert scaled == [share * 2.0**unit for share in shares]  # powers of two: not even rounding differs


@given(amounts, claims, st.randoms(use_true_random=False))
def test_the_order_of_the_claims_does_not_matter(budget: float, claims: list[tuple[float, float]], random) -> None:  # type: ignore[no-untyped-def]  # hypothesis gives a Random
    demands, by = split(claims)
    shares = max_min(budget, demands, by)
    order = list(range(len(claims)))
    random.shuffle(order)
    shuffled = max_min(budget, [demands[i] for i in order], [by[i] for i in order])
    assert shuffled == pytest.approx([shares[i] for i in order], rel=NEAR, abs=budget * 1e-12)


def test_the_textbook_example() -> None:
    assert max_min(10, [2, 2.6, 4, 5], [1, 1, 1, 1]) == pytest.approx([2, 2.6, 2.7, 2.7])


def test_greedy_ones_share_by_weight() -> None:
    assert max_min(1000, [math.inf, math.inf], [1, 3]) == [250, 750]


def test_an_endless_budget_gives_everybody_what_it_asks_for() -> None:
    assert max_min(math.inf, [1, math.inf, 0], [1, 2, 3]) == [1, math.inf, 0]


def test_nobody_asks_and_nobody_gets() -> None:
    assert max_min(1000, [], []) == []


@pytest.mark.parametrize(
    ("budget", "demands", "by", "named"),
    [
        (-1, [1], [1], "budget=-1"),
        (math.nan, [1], [1], "budget=nan"),
        (1, [-2], [1], "-2"),
        (1, [math.nan], [1], "nan"),
        (1, [1], [0], "weights: 0"),
        (1, [1], [math.inf], "weights: inf"),
        (1, [1], [], "1 demands need as many weights"),
    ],
)
def test_bad_numbers_are_named(budget: float, demands: list[float], by: list[float], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        max_min(budget, demands, by)
