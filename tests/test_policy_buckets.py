"""The bucket in Python and the C core's, side by side: the same charges, limits and times leave the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from orchestra.model.spec import Limit, Meter
from orchestra.native import ffi, lib
from orchestra.native.core import Bucket as CoreBucket
from orchestra.policy.buckets import Bucket
from orchestra.policy.enforcement import HOST, Enforcement
from orchestra.simulate.buckets import Buckets

UNIT = 1 / 65536
"""The core counts in these parts of a token."""


class Core:
    """The C core's bucket under a guest that makes no more events than there are tokens for.

    The event that takes the last token has to wait, and as in the core its vCPU goes on waiting until its turn comes.
    """

    def __init__(self) -> None:
        self._bucket = CoreBucket()
        self._waiting: list[object] = []

    def put(self, limit: Limit | None, now: int) -> None:
        self._leave(now)
        self._bucket.set(limit, now)

    def give_once(self, tokens: float) -> None:
        lib.orc_bucket_set_once(self._bucket.handle, tokens)

    def once(self) -> float:
        limit = ffi.new("struct orc_limit *")
        lib.orc_bucket_limit(self._bucket.handle, 0, limit)
        return float(limit.once)

    def take(self, events: int, now: int) -> None:
        self._leave(now)
        ticket = ffi.new("struct orc_ticket *")
        if events and lib.orc_bucket_charge_many(self._bucket.handle, events, now, ticket):
            self._waiting.append(ticket)

    def tokens(self, now: int) -> float:
        """What is left, by the turn of somebody who asks for very much more than there is. A limit with a larger burst
        keeps what is left, so that it can be asked for."""
        self._leave(now)
        ticket, turn, delay = ffi.new("struct orc_ticket *"), ffi.new("int64_t *"), ffi.new("int64_t *")
        lib.orc_bucket_set(self._bucket.handle, 1.0, 1e9, -1, now)
        lib.orc_bucket_set_once(self._bucket.handle, 0.0)
        lib.orc_bucket_charge_many(self._bucket.handle, 10_000_000, now, ticket)
        lib.orc_bucket_turn(self._bucket.handle, ticket, turn, delay)
        return 10_000_001 - (int(turn[0]) - now) / 1e9

    def _leave(self, now: int) -> None:
        turn, delay = ffi.new("int64_t *"), ffi.new("int64_t *")
        for ticket in list(self._waiting):
            lib.orc_bucket_turn(self._bucket.handle, ticket, turn, delay)
            if self._bucket.limit is not None and turn[0] <= now:
                lib.orc_bucket_leave(self._bucket.handle, ticket)
                self._waiting.remove(ticket)

    def close(self) -> None:
        self._bucket.close()


@contextmanager
def core() -> Iterator[Core]:
    one = Core()
    try:
        yield one
    finally:
        one.close()


class Single:
    """`policy.buckets.Bucket`."""

    def __init__(self) -> None:
        self.bucket = Bucket()

    def put(self, limit: Limit | None, now: float) -> None:
        self.bucket.put(limit, now)

    def room(self, now: float) -> float:
        return self.bucket.room(now, 0.0)

    def take(self, events: float, now: float) -> None:
        self.bucket.take(events, now, 0.0)


class Columns:
    """A row of the simulator's, with neighbours that nobody touches."""

    def __init__(self) -> None:
        self.buckets, self.place = Buckets(3), np.array([1])

    def put(self, limit: Limit | None, now: float) -> None:
        self.buckets.set(1, limit, now)

    def room(self, now: float) -> float:
        return float(self.buckets.available(self.place, now, 0.0)[0])

    def take(self, events: float, now: float) -> None:
        self.buckets.take(self.place, np.array([self.room(now)]), np.array([float(events)]), now)


class Held:
    """What a replay and a dry run go by."""

    def __init__(self) -> None:
        self.held = Enforcement()

    def put(self, limit: Limit | None, now: float) -> None:
        self.held._now = now
        self.held.set_base(HOST, Meter.EXITS, limit)

    def room(self, now: float) -> float:
        return self.held._buckets[Meter.EXITS][HOST].room(now, 0.0)

    def take(self, events: float, now: float) -> None:
        self.held._buckets[Meter.EXITS][HOST].take(events, now, 0.0)


@attrs.frozen
class Step:
    """After so many nanoseconds: another limit (None: none), or events, a part of those that there are tokens for."""

    after: int
    limit: Limit | None = None
    part: float | None = None


rates = st.floats(0.01, 1e5)
# A `max_delay` that is shorter than a token takes lets events go before their turn, and the core forgives what is left:
# that is the debt which the fluid does not know (its docstring names it).
limits = st.builds(Limit, rate=rates, burst=st.floats(1, 1e5), max_delay=st.sampled_from([None, 0.5])).map(
    lambda limit: attrs.evolve(limit, max_delay=max(0.5, 1 / limit.rate)) if limit.max_delay else limit
)
times = st.integers(0, 20_000_000_000) | st.integers(0, 1_000_000)
steps = st.lists(
    st.builds(Step, times, st.none() | limits) | st.builds(Step, times, part=st.floats(0, 1)), min_size=1, max_size=30
)


@pytest.mark.parametrize("model", [Single, Columns, Held])
@settings(deadline=None)
@given(first=limits, steps=steps)
@example(Limit(rate=10, burst=100), [Step(0, part=1.0), Step(0, None), Step(5_000_000_000, Limit(rate=1, burst=1000))])
@example(Limit(rate=3, burst=1), [Step(0, part=1.0)] * 3 + [Step(0, Limit(rate=1e5, burst=5)), Step(1, part=1.0)])
def test_the_same_charges_limits_and_times_leave_the_same_tokens(model, first, steps):
    """To a few units of the core's for each step, and what a double can tell apart."""
    now, limit = 1_000_000_000, first
    python = model()
    with core() as c:
        python.put(first, now / 1e9)
        c.put(first, now)
        for step in steps:
            now += step.after
            if step.part is None:
                limit = step.limit
                python.put(limit, now / 1e9)
                c.put(limit, now)
            elif limit is not None:
                # One that is just there in one of the two, and just not in the other, is left alone.
                events = max(0, int(step.part * python.room(now / 1e9) - 1e-3))
                python.take(events, now / 1e9)
                c.take(events, now)
        if limit is None:
            limit = Limit(rate=1.0, burst=1e9, max_delay=None)
            python.put(limit, now / 1e9)
            c.put(limit, now)
        assert c.tokens(now) == pytest.approx(python.room(now / 1e9), rel=1e-6, abs=1e-3 + 2 * UNIT * len(steps))


once_steps = st.lists(
    st.builds(Step, times, st.none() | limits)
    | st.builds(Step, times, part=st.floats(0, 1))
    | st.tuples(times, st.integers(0, 100_000)),
    min_size=1,
    max_size=30,
)


@settings(deadline=None)
@given(first=limits, steps=once_steps)
@example(Limit(rate=10, burst=100), [(0, 50), Step(0, part=1.0), (0, 50), Step(0, part=1.0), (0, 70), (0, 10), (0, 70)])
def test_what_is_given_once_is_used_first_and_is_the_same_in_both(first, steps):
    now, limit, most = 1_000_000_000, first, 0.0
    python = Bucket()
    with core() as c:
        python.put(first, now / 1e9)
        c.put(first, now)
        for step in steps:
            if isinstance(step, tuple):
                now += step[0]
                most = max(most, step[1])
                python.give_once(step[1])
                c.give_once(step[1])
            elif step.part is None:
                now, limit = now + step.after, step.limit
                python.put(limit, now / 1e9)
                c.put(limit, now)
            elif limit is not None:
                now += step.after
                events = max(0, int(step.part * python.room(now / 1e9, 0.0) - 1e-3))
                python.take(events, now / 1e9, 0.0)
                c.take(events, now)
            assert c.once() == python.once <= most
        if limit is None:
            limit = Limit(rate=1.0, burst=1e9, max_delay=None)
            python.put(limit, now / 1e9)
            c.put(limit, now)
        assert c.tokens(now) == pytest.approx(python.tokens_at(now / 1e9), rel=1e-6, abs=1e-3 + 2 * UNIT * len(steps))
