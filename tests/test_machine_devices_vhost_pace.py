"""What the thread of a back-end may have of a CPU."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from orchestra.machine.devices.vhost.pace import BURST, SHARE, Pace


def test_healthy_driver_never_makes_it_rest():
    pace = Pace(since=0)
    assert [pace.spent(0.002, now) for now in range(100)] == [0] * 100


def test_it_rests_until_the_debt_is_paid():
    pace = Pace(since=0)
    assert pace.spent(BURST, 0) == 0
    rest = pace.spent(0.001, 0)
    assert rest == pytest.approx(0.001 / SHARE)
    assert pace.spent(0, rest) == pytest.approx(0, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 0.01), st.floats(0, 1)), max_size=200))
def test_in_no_window_it_has_more_than_its_burst_and_its_share(work: list[tuple[float, float]]):
    pace, now, total = Pace(since=0), 0.0, 0.0
    for seconds, pause in work:
        now += pause + seconds  # it can't spend more than there is
        rest = pace.spent(seconds, now)
        total += seconds
        assert total <= BURST + now * SHARE + 0.01 + 1e-9  # the last piece is paid afterwards
        now += rest
