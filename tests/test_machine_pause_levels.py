"""How far a VM has followed a pause: paused is not quiesced, and what is said of one pause is not taken for another."""

from __future__ import annotations

import pytest
import trio

from orchestra.machine.lifecycle import Event, Lifecycle
from orchestra.machine.pause_levels import Level, PauseLevels, PendingIo

PAUSED, QUIESCED = Level.PAUSED, Level.QUIESCED


@pytest.fixture
def reached() -> list[Level]:
    return []


@pytest.fixture
def two(reached) -> PauseLevels:
    """Two vCPUs, told to pause."""
    pause_levels = PauseLevels(2, running(), reached.append)
    pause_levels.begin()
    return pause_levels


def running() -> Lifecycle:
    life = Lifecycle()
    life.happen(Event.BUILT)
    return life


def far(pause_levels: PauseLevels) -> tuple[bool, bool]:
    return pause_levels.paused.is_set(), pause_levels.quiesced.is_set()


def test_it_is_as_far_as_the_vcpu_that_is_least_so(two, reached):
    two.come(0, 1, QUIESCED)
    assert (far(two), reached) == ((False, False), [])
    two.come(1, 1, PAUSED)
    assert (far(two), reached) == ((True, False), [PAUSED])
    two.come(1, 1, QUIESCED)
    assert (far(two), reached) == ((True, True), [PAUSED, QUIESCED])


def test_of_two_levels_at_once_the_higher_is_told(two, reached):
    two.come(0, 1, QUIESCED)
    two.come(1, 1, QUIESCED)
    assert (far(two), reached) == ((True, True), [QUIESCED])


def test_no_level_is_lost_or_told_twice(two, reached):
    for level in (QUIESCED, PAUSED, QUIESCED):
        two.come(0, 1, level)
        two.come(1, 1, level)
    assert two.level(0) is QUIESCED
    assert reached == [QUIESCED]


def test_what_is_said_of_the_pause_before_does_not_count(two, reached):
    two.end()
    two.begin()
    two.come(0, 1, QUIESCED)
    two.come(1, 1, QUIESCED)
    assert (far(two), two.level(0), reached) == ((False, False), Level.RUNNING, [])


def test_one_that_has_ended_holds_nobody_up(two, reached):
    two.gone(0)
    two.come(1, 1, QUIESCED)
    assert (far(two), reached) == ((True, True), [QUIESCED])


def test_when_all_have_ended_nobody_waits_and_nothing_is_told(two, reached):
    two.gone(0)
    two.gone(1)
    assert (far(two), reached) == ((True, True), [])


async def test_whoever_waits_for_a_pause_that_is_taken_back_goes_on(two):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(two.paused.wait)
        nursery.start_soon(two.quiesced.wait)
        await trio.testing.wait_all_tasks_blocked()
        two.end()
    assert far(two) == (False, False)


def test_an_access_says_what_it_is():
    access = PendingIo(1, "ports", 0x500, 4, False, "a task", 7)
    assert str(access) == "vCPU 1: a read of 4 bytes at ports 0x500 waits for a task"


def test_it_is_quiesced_when_no_request_to_a_device_is_in_flight_either(reached):
    pause_levels = PauseLevels(1, running(), reached.append)
    pause_levels.begin(requests=True)
    pause_levels.come(0, 1, QUIESCED)
    assert (far(pause_levels), reached) == ((True, False), [PAUSED])
    pause_levels.rest()
    assert (far(pause_levels), reached) == ((True, True), [PAUSED, QUIESCED])


def test_rest_that_comes_after_the_pause_does_not_count_for_the_next(reached):
    pause_levels = PauseLevels(1, running(), reached.append)
    pause_levels.begin(requests=True)
    pause_levels.end()
    pause_levels.rest()
    pause_levels.begin(requests=True)
    pause_levels.come(0, 2, QUIESCED)
    assert far(pause_levels) == (True, False)
