"""Fair shares of many hosts at once against the policy's own arithmetic, and Jain's index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from orchestra.policy.maxmin import max_min
from orchestra.simulate.fairness import fair_shares, jain

guest = st.tuples(st.integers(0, 4), st.floats(0.01, 1e5), st.floats(0.1, 10))


@settings(max_examples=200)
@given(st.lists(guest, min_size=1, max_size=30), st.lists(st.floats(1, 1e5), min_size=5, max_size=5))
def test_shares_are_those_of_each_host_for_itself(guests, budgets):
    host, wants, weight = (np.array(column) for column in zip(*guests, strict=True))
    shares = fair_shares(host, wants, weight, np.array(budgets))
    for number, budget in enumerate(budgets):
        here = np.flatnonzero(host == number)
        expected = max_min(budget, wants[here].tolist(), weight[here].tolist())
        assert shares[here] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_nobody_shares_nothing():
    none = np.empty(0)
    assert len(fair_shares(np.empty(0, np.int64), none, none, np.array([5.0]))) == 0


def test_jains_index_is_1_for_equals_and_1_of_n_for_one_that_has_all():
    assert jain(np.full(7, 3.0)) == pytest.approx(1)
    assert jain(np.array([5.0, 0, 0, 0])) == pytest.approx(0.25)
    assert jain(np.zeros(3)) == 1.0
