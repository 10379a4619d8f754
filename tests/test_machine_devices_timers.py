"""Timers of devices: when they expire, that one that was set again does not, and that a closed VM's never do."""

from __future__ import annotations

from hypothesis import given, strategies as st

from orchestra.machine.devices.timers import LONGEST, SHORTEST, Timers


class Clock:
    def __init__(self) -> None:
        self.now = 1
        self.sooner = 0
        self.expired: list[str] = []
        self.timers = Timers(lambda: self.now, self._count)

    def _count(self) -> None:
        self.sooner += 1

    def run(self) -> None:
        for timer, setting in self.timers.due():
            if self.timers.taken(timer, setting):
                timer.expired()


MS = 1_000_000


def test_a_timer_expires_once_at_its_time():
    clock = Clock()
    timer = clock.timers.new(lambda: clock.expired.append("a"))
    assert (timer.remaining(), clock.timers.next()) == (None, None)
    timer.arm(5 * MS)
    assert (timer.remaining(), clock.timers.next()) == (5 * MS, 1 + 5 * MS)
    clock.now += 5 * MS - 1
    clock.run()
    assert clock.expired == []
    clock.now += 1
    clock.run()
    clock.run()
    assert clock.expired == ["a"]
    assert (timer.remaining(), clock.timers.next()) == (None, None)


def test_those_that_are_due_expire_in_the_order_of_their_times():
    clock = Clock()
    first, second = (clock.timers.new(lambda name=name: clock.expired.append(name)) for name in "ab")
    first.arm(3 * MS)
    second.arm(2 * MS)
    clock.now += 4 * MS
    assert first.remaining() == 0
    clock.run()
    assert clock.expired == ["b", "a"]


def test_one_that_was_set_again_or_disarmed_since_it_was_due_does_not_expire():
    clock = Clock()
    first, second = (clock.timers.new(lambda name=name: clock.expired.append(name)) for name in "ab")
    first.arm(MS)
    second.arm(MS)
    clock.now += MS
    due = clock.timers.due()
    first.arm(MS)
    second.disarm()
    assert [clock.timers.taken(timer, setting) for timer, setting in due] == [False, False]
    assert (first.remaining(), second.remaining()) == (MS, None)


def test_whoever_waits_is_told_only_of_what_is_sooner():
    clock = Clock()
    first, second = clock.timers.new(lambda: None), clock.timers.new(lambda: None)
    first.arm(5 * MS)
    second.arm(9 * MS)
    assert clock.sooner == 1
    second.arm(2 * MS)
    assert clock.sooner == 2
    second.disarm()
    assert (clock.sooner, clock.timers.next()) == (2, 1 + 5 * MS)


def test_a_closed_vms_timers_never_expire_and_can_not_be_armed():
    clock = Clock()
    timer = clock.timers.new(lambda: clock.expired.append("a"))
    timer.arm(MS)
    clock.now += MS
    due = clock.timers.due()
    clock.timers.close()
    timer.arm(MS)
    clock.now += MS
    assert [clock.timers.taken(timer, setting) for timer, setting in due] == [False]
    assert (clock.timers.due(), clock.timers.next(), timer.remaining()) == ([], None, None)


@given(st.integers(-(1 << 70), 1 << 70))
def test_whatever_time_a_guest_asks_for_lies_within_bounds(after):
    clock = Clock()
    timer = clock.timers.new(lambda: None)
    timer.arm(after)
    assert SHORTEST <= (timer.remaining() or 0) <= LONGEST
