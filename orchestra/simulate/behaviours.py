"""How guests behave: the bus locks that each guest wants to make in a tick, for a whole group at a time.

Each class is both what a scenario says (its fields) and what makes the group's state (`start`). Counts are Poisson
around the rate. Each group draws from a generator of its own and always for all its members, so that one policy's
world sees the same guests as another's.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final, Protocol, TypeAlias

import attrs

from ..model.errors import SpecError
from .arrays import Bools, Floats, Generator, Ints, np

__all__ = [
    "Adversarial",
    "Behaviour",
    "Bursty",
    "Crowd",
    "Diurnal",
    "Escalating",
    "Quiet",
    "Steady",
]

DAY: Final = 86400.0


class Crowd(Protocol):
    """A group of guests with one behaviour."""

    def wants(self, now: float, tick: float, felt: Floats) -> tuple[Ints, Floats]:
        """Members that want to lock in the tick that begins at `now`, ascending, and how often each.

        Parameters:
            felt: the part of its locks that each member was held back from in the last tick, 0 to 1: all a guest can
                know of a limit.
        """


def _check(value: float, field: str, low: float, high: float = math.inf, unit: str = "") -> None:
    if not low <= value <= high or math.isnan(value):
        upto = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
        raise SpecError(f"{field}={value!r}: must be {upto}{unit and ' ' + unit}")


@attrs.frozen(kw_only=True)
class _Timed:
    """Parameters that all behaviours but quiet have.

    Parameters:
        rate: locks per second that it would make alone (what it peaks at, or starts with: see there).
        start, stop: when the group begins and ends to lock, in seconds.
        stagger: seconds over which its members begin, each at a random time (and end so much later).
        spread: how much members differ in rate: the standard deviation of its logarithm.
    """

    rate: float
    start: float = 0.0
    stop: float = math.inf
    stagger: float = 0.0
    spread: float = 0.0

    def __attrs_post_init__(self) -> None:
        _check(self.rate, "rate", 0.0, 1e9, "locks a second")
        _check(self.start, "start", 0.0, unit="seconds")
        _check(self.stagger, "stagger", 0.0, unit="seconds")
        _check(self.spread, "spread", 0.0, 3.0)
        if not self.stop > self.start:
            raise SpecError(f"stop={self.stop!r}: must be after start={self.start!r}")
        self._check_more()

    def _check_more(self) -> None:
        """What a subclass asks for besides."""


class _TimedCrowd:
    """Start times and rates of the members. A subclass says at which part of its rate each member locks."""

    def __init__(self, how: _Timed, size: int, rng: Generator) -> None:
        self.size = size
        self.rng = rng
        self.how = how
        self.delay = how.stagger * rng.random(size) if how.stagger else None
        self.rate = (
            how.rate * np.exp(how.spread * rng.standard_normal(size))
            if how.spread
            else np.full(size, how.rate, np.float64)
        )

    def wants(self, now: float, tick: float, felt: Floats) -> tuple[Ints, Floats]:
        level = self.level(now, tick, felt)
        how = self.how
        if now < how.start or now >= how.stop + how.stagger:
            return np.empty(0, np.int64), np.empty(0)
        mean = self.rate * level * tick
        if self.delay is not None:
            mean *= (now >= how.start + self.delay) & (now < how.stop + self.delay)
        counts = self.rng.poisson(mean)
        members = np.flatnonzero(counts)
        return members, counts[members].astype(np.float64)

    def level(self, now: float, tick: float, felt: Floats) -> Floats | float:
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class Quiet:
    """Makes a lock now and then. Its cost grows with the locks and not with the number of members.

    Parameters:
        rate: locks per second of each member. Default: none.
    """

    kind: ClassVar[str] = "quiet"
    guilty: ClassVar[bool] = False
    rate: float = 0.0

    def __attrs_post_init__(self) -> None:
        _check(self.rate, "rate", 0.0, 1e6, "locks a second")

    def begin(self, size: int, rng: Generator) -> Crowd:
        return _QuietCrowd(self.rate, size, rng)


class _QuietCrowd:
    def __init__(self, rate: float, size: int, rng: Generator) -> None:
        self._rate, self._size, self._rng = rate, size, rng

    def wants(self, now: float, tick: float, felt: Floats) -> tuple[Ints, Floats]:
        # The locks of many Poisson sources are one Poisson source whose locks are theirs with equal chance.
        total = int(self._rng.poisson(self._rate * self._size * tick)) if self._rate else 0
        if not total:
            return np.empty(0, np.int64), np.empty(0)
        members, counts = np.unique(self._rng.integers(0, self._size, total), return_counts=True)
        return members, counts.astype(np.float64)


@attrs.frozen(kw_only=True)
class Steady(_Timed):
    """Split-locks at its rate, all the time."""

    kind: ClassVar[str] = "steady"
    guilty: ClassVar[bool] = True

    def begin(self, size: int, rng: Generator) -> Crowd:
        return _SteadyCrowd(self, size, rng)


class _SteadyCrowd(_TimedCrowd):
    def level(self, now: float, tick: float, felt: Floats) -> float:
        return 1.0


@attrs.frozen(kw_only=True)
class Bursty(_Timed):
    """Locks at its rate for a while, then is silent for a while (a two-state Markov chain, sampled at each tick).

    Parameters:
        on, off: mean seconds of a burst and of a pause. Bursts shorter than a tick come out as long as a tick, at the
            right share of the time.
    """

    kind: ClassVar[str] = "bursty"
    guilty: ClassVar[bool] = True
    on: float = 5.0
    off: float = 25.0

    def _check_more(self) -> None:
        _check(self.on, "on", 1e-6, unit="seconds")
        _check(self.off, "off", 1e-6, unit="seconds")

    def begin(self, size: int, rng: Generator) -> Crowd:
        return _BurstyCrowd(self, size, rng)


class _BurstyCrowd(_TimedCrowd):
    def __init__(self, how: Bursty, size: int, rng: Generator) -> None:
        super().__init__(how, size, rng)
        self._share = how.on / (how.on + how.off)
        self._ends = 1 / how.on + 1 / how.off
        self._on: Bools = rng.random(size) < self._share

    def level(self, now: float, tick: float, felt: Floats) -> Floats:
        level = self._on.astype(np.float64)
        stays = math.exp(-self._ends * tick)
        self._on = self.rng.random(self.size) < self._share * (1 - stays) + self._on * stays
        return level


@attrs.frozen(kw_only=True)
class Diurnal(_Timed):
    """Follows the day: a sine around its rate.

    Parameters:
        depth: how much of the rate comes and goes; 1: nothing at night.
        period: seconds of a day.
        peak: when the first peak is, in seconds.
        scatter: how far the members' peaks lie apart, in seconds (uniform around the peak).
    """

    kind: ClassVar[str] = "diurnal"
    guilty: ClassVar[bool] = False
    depth: float = 0.9
    period: float = DAY
    peak: float = DAY / 2
    scatter: float = 0.0

    def _check_more(self) -> None:
        _check(self.depth, "depth", 0.0, 1.0)
        _check(self.period, "period", 1e-3, unit="seconds")
        _check(self.scatter, "scatter", 0.0, unit="seconds")
        _check(self.peak, "peak", -math.inf)

    def begin(self, size: int, rng: Generator) -> Crowd:
        return _DiurnalCrowd(self, size, rng)


class _DiurnalCrowd(_TimedCrowd):
    def __init__(self, how: Diurnal, size: int, rng: Generator) -> None:
        super().__init__(how, size, rng)
        self._day = how
        self._peaks = how.peak + how.scatter * (rng.random(size) - 0.5)

    def level(self, now: float, tick: float, felt: Floats) -> Floats:
        angle = (now + tick / 2 - self._peaks) * (2 * math.pi / self._day.period)
        return np.asarray(1 + self._day.depth * np.cos(angle))


@attrs.frozen(kw_only=True)
class Escalating(_Timed):
    """Starts at its rate and multiplies it again and again.

    Parameters:
        factor, every: multiplied by `factor` in `every` seconds, smoothly.
        most: the rate at which it stops growing.
    """

    kind: ClassVar[str] = "escalating"
    guilty: ClassVar[bool] = True
    factor: float = 2.0
    every: float = 60.0
    most: float = 200_000.0

    def _check_more(self) -> None:
        _check(self.factor, "factor", 1.0, 1e6)
        _check(self.every, "every", 1e-3, unit="seconds")
        _check(self.most, "most", 0.0, 1e9, "locks a second")

    def begin(self, size: int, rng: Generator) -> Crowd:
        return _EscalatingCrowd(self, size, rng)


class _EscalatingCrowd(_TimedCrowd):
    def __init__(self, how: Escalating, size: int, rng: Generator) -> None:
        super().__init__(how, size, rng)
        self._grows = how

    def level(self, now: float, tick: float, felt: Floats) -> Floats:
        grows = self._grows
        since = np.maximum(0.0, now - grows.start - (0.0 if self.delay is None else self.delay))
        most = np.log(np.maximum(grows.most / np.maximum(self.rate, 1e-300), 1.0))
        return np.exp(np.minimum(since / grows.every * math.log(grows.factor), most)) * np.ones(self.size)


@attrs.frozen(kw_only=True)
class Adversarial(_Timed):
    """Locks in bursts, learns how long a burst may be and how soon the next may come, and stays just below.

    It knows what a guest knows: that it was held. Held within a burst: this one was too long, the next is a fifth
    shorter. Held from a burst's first tick: it is remembered, so it hides half as long again. Not held: the next burst
    is a tenth longer and comes a twentieth sooner.

    Parameters:
        on, off: seconds of the first burst and the first pause.
        notices: the part of its locks that it must be held back from to notice.
    """

    kind: ClassVar[str] = "adversarial"
    guilty: ClassVar[bool] = True
    on: float = 1.0
    off: float = 5.0
    notices: float = 0.02

    def _check_more(self) -> None:
        _check(self.on, "on", 1e-6, unit="seconds")
        _check(self.off, "off", 1e-6, unit="seconds")
        _check(self.notices, "notices", 1e-6, 1.0)

    def begin(self, size: int, rng: Generator) -> Crowd:
        return _AdversarialCrowd(self, size, rng)


class _AdversarialCrowd(_TimedCrowd):
    def __init__(self, how: Adversarial, size: int, rng: Generator) -> None:
        super().__init__(how, size, rng)
        self._notices = how.notices
        self.on = np.full(size, how.on, np.float64)
        self.off = np.full(size, how.off, np.float64)
        self._bursting = np.zeros(size, np.bool_)
        self._since = -how.off * rng.random(size)  # when the phase that it is in began, from `start`
        self._first = how.start

    def level(self, now: float, tick: float, felt: Floats) -> Floats:
        if now < self._first:
            return np.zeros(self.size)
        now -= self._first
        # Phases end at a tick's edge; half a tick forgives rounding.
        ran = now - self._since
        caught = self._bursting & (felt > self._notices)
        at_once = caught & (ran < 1.5 * tick)
        self.off[at_once] = np.minimum(self.off[at_once] * 1.5, 3600.0)
        later = caught & ~at_once
        self.on[later] = np.maximum(0.8 * ran[later], tick)
        done = self._bursting & ~caught & (ran >= self.on - tick / 2)
        self.on[done] = np.minimum(self.on[done] * 1.1, 3600.0)
        self.off[done] = np.maximum(self.off[done] * 0.95, tick)
        stop = caught | done
        go = ~self._bursting & (ran >= self.off - tick / 2)
        self._bursting = (self._bursting & ~stop) | go
        self._since[stop | go] = now
        return self._bursting.astype(np.float64)


Behaviour: TypeAlias = Quiet | Steady | Bursty | Diurnal | Escalating | Adversarial
