"""What each behaviour does on the average, and that nothing but its own generator moves it."""

from __future__ import annotations

import numpy as np
import pytest

from orchestra import SpecError
from orchestra.simulate.arrays import generator
from orchestra.simulate.behaviours import BEHAVIOURS, Adversarial, Behaviour, Bursty, Diurnal, Escalating, Quiet, Steady


def play(behaviour: Behaviour, size: int, ticks: int, tick: float = 1.0, held=lambda t, counts: 0.0) -> np.ndarray:
    """Locks of each member in each tick: ticks by members. `held`: the part that it is held back from."""
    crowd = behaviour.begin(size, generator(5, 1))
    rows = np.zeros((ticks, size))
    felt = np.zeros(size)
    for t in range(ticks):
        members, counts = crowd.wants(t * tick, tick, felt)
        assert (counts > 0).all()
        assert (np.diff(members) > 0).all()
        rows[t, members] = counts
        felt = np.broadcast_to(held(t, rows[t]), (size,)) * (rows[t] > 0)
    return rows


def test_quiet_locks_now_and_then():
    rows = play(Quiet(rate=0.01), 1000, 500)
    assert rows.sum() == pytest.approx(5000, rel=0.06)
    assert rows.max() <= 3
    assert play(Quiet(), 1000, 10).sum() == 0


def test_steady_keeps_its_rate_between_start_and_stop():
    rows = play(Steady(rate=200, start=10, stop=40), 20, 60)
    assert rows[:10].sum() == rows[40:].sum() == 0
    assert rows[10:40].mean() == pytest.approx(200, rel=0.01)
    assert rows[10:40].std() == pytest.approx(200**0.5, rel=0.1)  # Poisson


def test_members_that_differ_start_at_their_own_time_and_rate():
    rows = play(Steady(rate=100, stagger=50, spread=0.5), 400, 100)
    started = (rows > 0).argmax(axis=0)
    assert started.min() < 3
    assert started.max() > 45
    rates = np.log(rows[60:].mean(axis=0))
    assert rates.mean() == pytest.approx(np.log(100), abs=0.08)
    assert rates.std() == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("tick", [0.1, 1.0])
def test_bursts_and_pauses_have_their_mean_lengths(tick):
    rows = play(Bursty(rate=1000, on=4, off=12), 300, round(400 / tick), tick)
    on = rows > 0
    assert on.mean() == pytest.approx(0.25, rel=0.05)
    begun = (on[1:] & ~on[:-1]).sum()
    assert on.sum() * tick / begun == pytest.approx(4, rel=0.25 if tick == 1 else 0.08)  # short ones hide in long ticks
    assert rows[on].mean() == pytest.approx(1000 * tick, rel=0.01)


def test_diurnal_follows_the_day():
    rows = play(Diurnal(rate=100, depth=0.8, period=100, peak=25), 50, 200)
    hours = rows.mean(axis=1)
    assert hours.mean() == pytest.approx(100, rel=0.01)
    assert hours[20:30].mean() == pytest.approx(180, rel=0.03)
    assert hours[70:80].mean() == pytest.approx(20, rel=0.1)
    assert np.corrcoef(hours[:100], hours[100:])[0, 1] > 0.99
    scattered = play(Diurnal(rate=100, depth=0.8, period=100, scatter=100), 500, 100)
    assert np.ptp(scattered.mean(axis=1)) < 20  # each has its own noon


def test_escalating_doubles_until_its_most():
    rows = play(Escalating(rate=50, start=10, factor=2, every=10, most=800), 20, 100)
    means = rows.mean(axis=1)
    assert means[:10].sum() == 0
    assert means[20] == pytest.approx(100, rel=0.1)
    assert means[40] == pytest.approx(400, rel=0.1)
    assert means[60:].mean() == pytest.approx(800, rel=0.02)


def test_the_adversary_learns_how_long_a_burst_may_be():
    """Whoever is caught after 3 s of a burst learns to stop before, and comes back all the sooner."""

    runs = np.zeros(30)

    def caught_after_3(t, counts):
        runs[:] = np.where(counts > 0, runs + 1, 0)
        return np.where(runs > 3, 0.9, 0.0)

    rows = play(Adversarial(rate=1000, on=10, off=10), 30, 600, held=caught_after_3)
    late = rows[300:] > 0
    lengths = [len(run) for member in late.T for run in "".join("x" if on else " " for on in member).split()]
    assert np.mean(lengths) == pytest.approx(3, abs=0.8)
    assert max(lengths) <= 5
    assert late.mean() > 0.4  # it locks a good part of the time although bursts are hunted


def test_the_adversary_hides_longer_while_it_is_remembered():
    rows = play(Adversarial(rate=1000, on=2, off=2), 30, 600, held=lambda t, counts: 0.9)
    assert (rows[:60] > 0).mean() > 4 * (rows[400:] > 0).mean()


def test_the_adversary_grows_bold_when_nobody_acts():
    rows = play(Adversarial(rate=1000, on=1, off=10), 30, 600)
    assert (rows[:60] > 0).mean() < 0.2
    assert (rows[500:] > 0).mean() > 0.7


@pytest.mark.parametrize("kind", sorted(BEHAVIOURS))
def test_the_same_seed_gives_the_same_locks(kind):
    make = {"quiet": Quiet(rate=1.0)}.get(kind) or BEHAVIOURS[kind](rate=50.0)
    assert (play(make, 20, 50) == play(make, 20, 50)).all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Steady(rate=-1), "rate=-1"),
        (lambda: Quiet(rate=float("nan")), "rate=nan"),
        (lambda: Steady(rate=1, start=5, stop=5), "stop=5"),
        (lambda: Steady(rate=1, spread=9), "spread=9"),
        (lambda: Bursty(rate=1, on=0), "on=0"),
        (lambda: Diurnal(rate=1, depth=1.5), "depth=1.5"),
        (lambda: Escalating(rate=1, factor=0.5), "factor=0.5"),
        (lambda: Adversarial(rate=1, notices=2), "notices=2"),
    ],
)
def test_what_can_not_be_is_refused(make, text):
    with pytest.raises(SpecError, match=text):
        make()
