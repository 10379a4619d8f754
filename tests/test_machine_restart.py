"""What follows a run: a restart after a back-off, a reset in its turn, or nothing."""

from __future__ import annotations

import pytest

import orchestra as orc
from conftest import blank
from orchestra.machine.restart import RESET_LIMIT, Next, Succession
from orchestra.model.actions import RESETS

SECOND = 1_000_000_000
FAULT = orc.Shutdown("triple fault")


@pytest.fixture
def made():
    """Makes one for a spec."""
    all_of_them: list[Succession] = []

    def make(**more: object) -> Succession:
        all_of_them.append(Succession(blank(**more), 1))
        return all_of_them[-1]

    yield make
    for succession in all_of_them:
        succession.close()


@pytest.mark.parametrize("outcome", [orc.Halted(), FAULT, orc.Stopped("x"), orc.Failed("x"), orc.Shutdown(code=1)])
def test_nothing_follows_unless_it_is_asked_for(made, outcome):
    assert made().after(outcome, 1.0, 1, None) is None


@pytest.mark.parametrize("reason", RESETS)
def test_a_reset_of_the_guests_own_is_one_where_the_spec_wants_it(made, reason):
    assert made(on_reset="reset").after(orc.Shutdown(reason), 1.0, 1, None) == Next("reset", 0, reason)


@pytest.mark.parametrize("outcome", [orc.Shutdown("system event: shutdown"), orc.Shutdown(code=0), orc.Halted()])
def test_what_is_no_reset_ends_it_as_before(made, outcome):
    assert made(on_reset="reset").after(outcome, 1.0, 1, None) is None


@pytest.mark.parametrize("outcome", [orc.Stopped("reset()"), orc.Halted(), orc.Failed("x")])
def test_somebody_outside_may_have_it_reset_however_it_ended(made, outcome):
    assert made().after(outcome, 1.0, 1, "button") == Next("reset", 0, "button")


def test_a_guest_that_does_nothing_but_reset_is_bounded(made):
    """In any time t, at most burst + rate * t; all it takes is a guest of one instruction."""
    succession, now, times = made(on_reset="reset"), 1, []
    for _ in range(50):
        following = succession.after(FAULT, 0.0, now, None)
        now += round(following.delay * SECOND)
        times.append(now / SECOND)
    burst, rate = RESET_LIMIT.tokens, RESET_LIMIT.rate
    assert times[3] < 0.1
    for first in range(50):
        for last in range(first, 50):
            assert last - first + 1 <= burst + rate * (times[last] - times[first]) + 1
    assert times[-1] > 40


def test_resets_are_neither_restarts_nor_make_the_back_off_longer(made):
    succession = made(on_reset="reset", restart=orc.Restart("on-failure", backoff=1, backoff_max=8, most=2))
    assert succession.after(orc.Failed("x"), 0.0, 1, None) == Next("restart", 1)
    assert succession.begin(Next("restart", 1)) == "restart 1"
    following = succession.after(FAULT, 0.0, 1, None)
    assert succession.begin(following) == "reset 1: triple fault"
    assert succession.after(orc.Failed("x"), 0.0, 1, None) == Next("restart", 2)
    assert (succession.restarts, succession.resets) == (1, 1)


def test_the_limit_of_restarts_is_one_of_restarts(made):
    succession = made(restart=orc.Restart("on-failure", backoff=1, most=1))
    assert succession.after(orc.Failed("x"), 0.0, 1, "button").kind == "reset"
    assert succession.after(orc.Failed("x"), 0.0, 1, None).kind == "restart"
    assert succession.after(orc.Failed("x"), 0.0, 1, None) is None
